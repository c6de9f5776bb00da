"""Grade-school word problems: GSM8K, from the Hub or from files, and GSM-Symbolic, generated offline.

    Natalia sold 48/2 = 24 clips in May.
    Natalia sold 48+24 = 72 clips altogether in April and May.
    #### 72

GSM8K (Cobbe et al., 2110.14168) without its calculator annotations (`<<48/2=24>>`). GSM-Symbolic (Mirzadeh et al.,
2410.05229) comes from reasoning-gym: templates of GSM8K's questions, filled by a seed.
"""

from cmdp import tasks
from cmdp.tasks import answers, steps
from cmdp.tasks.answers import is_correct

SYMBOLIC = "gsm-symbolic"
INSTRUCTION = (
    "Solve the problem step by step, and write each calculation as an equation. "
    'End with a line "#### n", where n is the answer, a number alone.'
)
_SUFFIX = " Give the result as your final answer. Do not include units."


def parse(row: dict) -> dict[str, str]:
    """`answer` (the number alone) and `solution`, without annotations, of a row whose `answer` ends in `#### n` or is a
    number. Raises `ValueError` for any other."""
    text = str(row.get("answer"))
    answer = answers.extract(text) if "####" in text else text.strip()
    if answer is None or answers.number(answer) is None:
        raise ValueError(f"its answer ends in `#### n` or is a number, not {text[-40:]!r} (columns: {', '.join(row)})")
    return {"answer": answer.replace(",", ""), "solution": steps.without_annotations(text).strip()}


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


GENERATED = {SYMBOLIC: symbolic}


def steps_are_valid(completion: str, prompt: str) -> bool:
    """Whether the completion states an answer and equations that `steps` reads, all of which hold. Whether they fit the
    problem is not checked. A completion longer than `steps.LONGEST` characters is not valid."""
    if len(completion) > steps.LONGEST or answers.extract(completion) is None:
        return False
    found = [*steps.equations(completion), *steps.annotations(completion)]
    holds = [equation.holds for equation in found if isinstance(equation, steps.Equation)]
    return bool(holds) and all(holds)
