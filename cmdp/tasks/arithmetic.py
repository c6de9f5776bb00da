"""Chains of small sums, generated: the default task, whose teacher is careless by design (method, section 11).

    Dan 7 + 5 * 2 =
    12 24

A problem applies its operations from left to right, and a solution is the value after each. The name says who solved
it: `slips` gives how often a step of that person's training solutions is one too large; the solution then goes on from
there. The answer asked for is always the true one, so a model of such solutions knows the sums and samples slips.
"""

import random
import re

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn")
LARGEST = 20  # no true value of a problem is larger
MOST_STEPS = 4
_LARGEST_SLIPPED = LARGEST + sum(3**step for step in range(MOST_STEPS))  # slips of 1, each tripled by what follows
_PROMPT = re.compile(r"(\d+)|([-+*]) (\d+)")


def vocabulary() -> list[str]:
    """Every word of prompts and solutions; each is one token."""
    return ["=", "+", "-", "*", *NAMES, *map(str, range(_LARGEST_SLIPPED + 1))]


def apply(a: int, op: str, b: int) -> int:
    """The value of `a op b`."""
    return a + b if op == "+" else a - b if op == "-" else a * b


def draw(rng: random.Random, steps: int) -> tuple[str, int, list[tuple[str, int]]]:
    """A name, a start, and `steps` operations whose running value stays within 1..LARGEST."""
    name = rng.choice(NAMES)
    while True:
        start = value = rng.randint(1, 9)
        operations = []
        while 1 <= value <= LARGEST and len(operations) < steps:
            op = rng.choice("+-*")
            operations.append((op, rng.randint(2, 3) if op == "*" else rng.randint(1, 6)))
            value = apply(value, *operations[-1])
        if 1 <= value <= LARGEST:
            return name, start, operations


def solve(start: int, operations: list[tuple[str, int]], slip=lambda: 0) -> list[int]:
    """The value after each operation; `slip` gives what a step adds to it."""
    values = [start]
    for operation in operations:
        values.append(apply(values[-1], *operation) + slip())
    return values[1:]


def problems(
    sizes: dict[str, int], steps: list[int], seed: int, slips: dict[str, float] | None = None
) -> dict[str, list[dict[str, str]]]:
    """Splits of `sizes` problems, drawn in the order of `sizes`: rows of `prompt`, `solution` and `answer`.

    No two problems are the same, but for the split `supervised`: its problems may come back, none of them is in another
    split, and its solutions slip. Raises `ValueError` where there are not so many different problems.

    Args:
        steps: the numbers of operations to choose from.
        slips: by name, how often a step slips; never unless given.
    """
    if max(steps) > MOST_STEPS:
        raise ValueError(f"A problem has at most {MOST_STEPS} steps, not {max(steps)}.")
    rng, seen, splits = random.Random(seed), set(), {}
    for split, size in sorted(sizes.items(), key=lambda item: item[0] == "supervised"):
        supervised, rows, tries = split == "supervised", [], 0
        while len(rows) < size:
            name, start, operations = draw(rng, rng.choice(steps))
            prompt, tries = f"{name} {start} {' '.join(f'{op} {n}' for op, n in operations)} =", tries + 1
            if tries > 100 * size:
                raise ValueError(f"Too few different problems of {steps} steps for {sizes}: ask for fewer.")
            if prompt in seen:
                continue
            rate = (slips or {}).get(name, 0.0) if supervised else 0.0
            solution = solve(start, operations, lambda rate=rate: int(rng.random() < rate))
            answer = str(solve(start, operations)[-1])
            rows.append({"prompt": prompt, "solution": " ".join(map(str, solution)), "answer": answer})
            if not supervised:
                seen.add(prompt)
        splits[split] = rows
    return {split: splits[split] for split in sizes}


def is_correct(completion: str, answer: str) -> bool:
    """Whether the completion ends in the answer."""
    return completion.split()[-1:] == [answer]


def steps_are_valid(completion: str, prompt: str) -> bool:
    """Whether the completion is the value after each step of the prompt, all right."""
    (start, *_), *operations = _PROMPT.findall(prompt)
    return completion.split() == [str(value) for value in solve(int(start), [(op, int(n)) for _, op, n in operations])]
