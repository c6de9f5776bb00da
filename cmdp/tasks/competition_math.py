"""Competition mathematics: MATH (Hendrycks et al., 2103.03874) and MATH-500, from the Hub or from files.

The final answer stands in `\\boxed{}`: a number, an expression, an interval, a name. `steps_are_valid` judges equations
between numbers, which in MATH are only a part of the reasoning.
"""

import re

from cmdp.tasks import answers
from cmdp.tasks.answers import is_correct as is_correct
from cmdp.tasks.gsm import steps_are_valid as steps_are_valid

INSTRUCTION = "Solve the problem step by step, and put your final answer within \\boxed{}."


def parse(row: dict) -> dict[str, str]:
    """`answer`, the row's own or the last box of its `solution`, and `solution`. Raises `ValueError` if it has none."""
    solution = str(row.get("solution") or "")
    answer = answers.extract(solution) if re.search(r"\\boxed|\\fbox", solution) else None
    answer = answer if row.get("answer") in (None, "") else str(row["answer"])
    if not answer:
        raise ValueError(f"its solution has no answer in \\boxed{{}}: {solution[-80:]!r} (columns: {', '.join(row)})")
    return {"answer": answers.tidy(answer), "solution": solution.strip()}
