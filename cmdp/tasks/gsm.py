"""Grade-school word problems: GSM8K, from the Hub or from files, and GSM-Symbolic, generated offline.

    Natalia sold 48/2 = 24 clips in May.
    Natalia sold 48+24 = 72 clips altogether in April and May.
    #### 72

GSM8K (Cobbe et al., 2110.14168) without its calculator annotations (`<<48/2=24>>`). GSM-Symbolic (Mirzadeh et al.,
2410.05229) comes from reasoning-gym: templates of GSM8K's questions, filled by a seed.
"""

from pathlib import Path

from cmdp import tasks
from cmdp.tasks import answers, steps
from cmdp.tasks.answers import is_correct

HUB = {"openai/gsm8k": ("main",)}
SYMBOLIC = "gsm-symbolic"
INSTRUCTION = (
    "Solve the problem step by step, and write each calculation as an equation. "
    'End with a line "#### n", where n is the answer, a number alone.'
)
_SUFFIX = " Give the result as your final answer. Do not include units."


def problems(source: str | Path, sizes: dict[str, int | None], seed: int, tokenizer=None) -> dict[str, list[dict]]:
    """Disjoint splits of `sizes` problems (None: all that are left): "test" from GSM8K's test split, all others
    from its training split by `seed`. `tokenizer` renders the prompts, see `tasks.rendered`.

    `source` is "openai/gsm8k" on the Hub; a folder or file (see `tasks.read`, also for errors) whose rows have
    `question` and `answer`, the last line of which is `#### n`; or "gsm-symbolic". Raises `ValueError` where there are
    too few problems or a row is malformed."""
    if str(source) == SYMBOLIC:
        return tasks.rendered(symbolic(sizes, seed), INSTRUCTION, tokenizer)
    splits = tasks.cut(read(source, "train"), read(source, "test"), sizes, seed)
    return tasks.rendered(splits, INSTRUCTION, tokenizer)


def read(source: str | Path, split: str) -> list[dict[str, str]]:
    """GSM8K's problems of a split: `question`, `answer` (the number alone) and `solution`, without annotations."""
    rows = []
    for row in tasks.read(source, split, HUB, ("question", "answer")):
        answer = answers.extract(row["answer"]) if "####" in row["answer"] else None
        if answer is None or answers.number(answer) is None:
            raise ValueError(f"A solution ends in `#### n` with a number n, not in {row['answer'][-40:]!r}.")
        solution = steps.without_annotations(row["answer"]).strip()
        rows.append({"question": row["question"].strip(), "answer": answer.replace(",", ""), "solution": solution})
    return rows


def symbolic(sizes: dict[str, int | None], seed: int) -> dict[str, list[dict[str, str]]]:
    """Different GSM-Symbolic problems, dealt to the splits in the order of `sizes`. The templates are shared: names and
    numbers are held out. Raises `ValueError` where a size is None, or too few different problems turn up."""
    from reasoning_gym import create_dataset

    if None in sizes.values():
        raise ValueError(f"{SYMBOLIC} is generated: say how many problems for each of {tuple(sizes)}.")
    needed = sum(sizes.values())
    drawn: dict[str, dict[str, str]] = {}
    for example in create_dataset("gsm_symbolic", size=2 * needed + 100, seed=seed):
        question = example["question"].removesuffix(_SUFFIX).strip()
        answer, solution = example["answer"], example["metadata"]["answer_cot"].strip()
        # a template whose own solution is wrong, mostly by rounding, has no reliable answer
        if all(equation.holds for equation in steps.equations(solution)) and is_correct(solution, answer):
            drawn.setdefault(tasks.key(question), {"question": question, "answer": answer, "solution": solution})
        if len(drawn) == needed:
            rows = iter(drawn.values())
            return {name: [next(rows) for _ in range(size)] for name, size in sizes.items()}
    raise ValueError(f"{SYMBOLIC} gave {len(drawn)} different problems, and {needed} were asked for.")


def steps_are_valid(completion: str, prompt: str) -> bool:
    """Whether the completion states an answer and equations that `steps` reads, all of which hold. Whether they fit the
    problem is not checked. A completion longer than `steps.LONGEST` characters is not valid."""
    if len(completion) > steps.LONGEST or answers.extract(completion) is None:
        return False
    found = [*steps.equations(completion), *steps.annotations(completion)]
    holds = [equation.holds for equation in found if isinstance(equation, steps.Equation)]
    return bool(holds) and all(holds)
