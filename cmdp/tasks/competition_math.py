"""Competition mathematics: MATH (Hendrycks et al., 2103.03874) and MATH-500, from the Hub or from files.

The final answer stands in `\\boxed{}`: a number, an expression, an interval, a name. `steps_are_valid` judges equations
between numbers, which in MATH are only a part of the reasoning.
"""

import re
from pathlib import Path

from cmdp import tasks
from cmdp.tasks import answers
from cmdp.tasks.answers import is_correct as is_correct
from cmdp.tasks.gsm import steps_are_valid as steps_are_valid

_SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
HUB = {"EleutherAI/hendrycks_math": tuple(_SUBJECTS.split()), "HuggingFaceH4/MATH-500": ("default",)}
INSTRUCTION = "Solve the problem step by step, and put your final answer within \\boxed{}."


def problems(
    source: str | Path, sizes: dict[str, int | None], seed: int, tokenizer=None, test: str | Path | None = None
) -> dict[str, list[dict]]:
    """Disjoint splits, as of `gsm.problems`, from "EleutherAI/hendrycks_math" or files whose rows have `problem`,
    `solution` and, optionally, `answer`. `test` is the source of the test split, if another: "HuggingFaceH4/MATH-500",
    a folder or a file."""
    splits = tasks.cut(read(source, "train"), read(test or source, "test"), sizes, seed)
    return tasks.rendered(splits, INSTRUCTION, tokenizer)


def read(source: str | Path, split: str) -> list[dict[str, str]]:
    """The problems of a split: `question`, `answer` and `solution`."""
    rows = tasks.read(source, split, HUB, ("problem", "solution"))
    return [{"question": r["problem"].strip(), "answer": gold(r), "solution": r["solution"].strip()} for r in rows]


def gold(row: dict[str, str]) -> str:
    """The row's answer, or the last box of its solution. Raises `ValueError` where there is none."""
    solution = row["solution"]
    answer = row.get("answer") or (answers.extract(solution) if re.search(r"\\boxed|\\fbox", solution) else None)
    if not answer:
        raise ValueError(f"A solution has its answer in \\boxed{{}}; this has none: {solution[-80:]!r}.")
    return answers.tidy(answer)
