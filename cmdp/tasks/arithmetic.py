"""Word problems over small whole numbers, generated: the default task, with a program to check every step.

    Ana has 7 then gets 5 then loses 3 then times 2 . how many ?
    so 7 + 5 = 12 ; 12 - 3 gives 9 ; next * 2 on 9 gives 18 ; # 18

A solution is one equation per step and then the answer. Each equation has one of nine phrasings, drawn at random, so
that the teacher has entropy and a student trained on the answer alone visibly drifts to one phrasing.
"""

import random
import re

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn")
VERBS = {"gets": "+", "loses": "-", "times": "*"}
LEADS = ("", "so ", "next ")
PHRASINGS = ("{a} {op} {b} = {c}", "{a} {op} {b} gives {c}", "{op} {b} on {a} gives {c}")
LARGEST = 20  # no number in a problem or its solution is larger

_N = "[0-9]{1,9}"  # `int` raises on thousands of digits
_EQUATION = re.compile(rf"(?:(so|next) )?(?:{_N} [+*-] {_N} (=|gives)|[+*-] {_N} (on) {_N} gives) {_N}")
_ANSWER = re.compile(rf"(?<!\S)# ({_N})$")
_PROMPT = re.compile(r"has (\d+)|then (gets|loses|times) (\d+)")


def vocabulary() -> list[str]:
    """Every word of prompts and solutions; each is one token."""
    words = ["has", "then", ".", "how", "many", "?", "so", "next", "=", "gives", "on", ";", "#", *VERBS.values()]
    return [*words, *NAMES, *VERBS, *map(str, range(LARGEST + 1))]


def apply(a: int, op: str, b: int) -> int:
    """The value of `a op b`."""
    return a + b if op == "+" else a - b if op == "-" else a * b


def draw(rng: random.Random, steps: int) -> tuple[int, list[tuple[str, int]]]:
    """A start and `steps` operations whose running value stays within 0..LARGEST."""
    start = value = rng.randint(1, 20)
    operations = []
    for _ in range(steps):
        verbs = ["gets"] * (value + 9 <= LARGEST) + ["loses"] * (value >= 1) + ["times"] * (0 < value * 3 <= LARGEST)
        verb = rng.choice(verbs)
        number = rng.choice((2, 3)) if verb == "times" else rng.randint(1, min(9, value) if verb == "loses" else 9)
        value = apply(value, VERBS[verb], number)
        operations.append((verb, number))
    return start, operations


def render(rng: random.Random, start: int, operations: list[tuple[str, int]]) -> dict[str, str]:
    """A problem as `prompt`, `solution` (with random phrasings) and `answer`."""
    prompt = f"{rng.choice(NAMES)} has {start}" + "".join(f" then {verb} {n}" for verb, n in operations)
    value, lines = start, []
    for verb, number in operations:
        result = apply(value, VERBS[verb], number)
        phrasing = rng.choice(LEADS) + rng.choice(PHRASINGS)
        lines.append(phrasing.format(a=value, op=VERBS[verb], b=number, c=result))
        value = result
    solution = " ; ".join([*lines, f"# {value}"])
    return {"prompt": f"{prompt} . how many ?\n", "solution": solution, "answer": str(value)}


def problems(sizes: dict[str, int], steps: tuple[int, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """Splits of `sizes` problems with `steps` = (fewest, most) operations, drawn in the order of `sizes`. No two
    problems have the same start and operations. Raises `ValueError` where there are not so many different problems."""
    rng = random.Random(seed)
    seen: set = set()

    def problem() -> dict[str, str]:
        for _ in range(100_000):
            start, operations = draw(rng, rng.randint(*steps))
            if (start, *operations) not in seen:
                seen.add((start, *operations))
                return render(rng, start, operations)
        raise ValueError(f"Too few different problems of {steps} steps for {sizes}: ask for fewer.")

    return {name: [problem() for _ in range(size)] for name, size in sizes.items()}


def is_correct(completion: str, answer: str) -> bool:
    """Whether the completion ends in "# answer"."""
    match = _ANSWER.search(completion.strip())
    return match is not None and int(match[1]) == int(answer)


def steps_are_valid(completion: str, prompt: str) -> bool:
    """Whether the completion is a valid derivation: for each step of the prompt, in order, one true equation with its
    operation and number that starts from the value before; then the last value as answer."""
    (start, _, _), *operations = _PROMPT.findall(prompt)
    *lines, answer = completion.strip().split(" ; ")
    if len(lines) != len(operations):
        return False
    value = int(start)
    for line, (_, verb, number) in zip(lines, operations, strict=True):
        op, result = VERBS[verb], apply(value, VERBS[verb], int(number))
        phrased = [lead + form.format(a=value, op=op, b=number, c=result) for lead in LEADS for form in PHRASINGS]
        if line not in phrased:
            return False
        value = result
    return answer == f"# {value}"


def style(completion: str) -> str:
    """How each equation is phrased, as its lead and form: "so=", "on", ...; "?" for what is no equation."""
    matches = [_EQUATION.fullmatch(line) for line in completion.strip().split(" ; ")[:-1]]
    return " ".join((m[1] or "") + (m[2] or m[3]) if m else "?" for m in matches)
