"""Competition mathematics: MATH (Hendrycks et al., 2103.03874) and MATH-500, from the Hub or from files.

A solution is prose and LaTeX, and its final answer stands in `\\boxed{}`: a number, an expression, an interval, a name.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from cmdp.tasks import answers, corpus
from cmdp.tasks.answers import is_correct
from cmdp.tasks.gsm import steps_are_valid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of `steps_are_valid`: it judges equations between numbers, which in MATH are a part of the reasoning only
__all__ = ["is_correct", "problems", "steps_are_valid"]

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
MATH_500 = "HuggingFaceH4/MATH-500"
HUB = {"EleutherAI/hendrycks_math": SUBJECTS, MATH_500: ("default",)}
INSTRUCTION = "Solve the problem step by step, and put your final answer within \\boxed{}."


def problems(
    source: str | Path,
    sizes: dict[str, int | None],
    seed: int,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    test: str | Path | None = None,
) -> dict[str, list[dict[str, str]]]:
    """Splits of `sizes` problems, which share no question; "test" is the test split, or a part of it, and all others
    are cut from the training split by `seed`.

    Args:
        source: "EleutherAI/hendrycks_math" on the Hub, or a folder with train.jsonl and test.jsonl, whose rows have
            `problem`, `solution` and, optionally, `answer` (otherwise what the solution has in its last `\\boxed{}`).
        sizes: problems in each split; None takes all there are.
        tokenizer: its chat template renders the prompts; without one they are plain text.
        test: where the test split is, if not at `source`: "HuggingFaceH4/MATH-500", a folder, or a JSONL file.

    Raises:
        FileNotFoundError: the problems are not there, or not to be had offline.
        ValueError: there are too few, or a row is not as it should be.
    """
    splits = corpus.cut(read(source, "train"), read(test or source, "test"), sizes, seed)
    return corpus.rendered(splits, INSTRUCTION, tokenizer)


def read(source: str | Path, split: str) -> list[corpus.Row]:
    """The problems of a split: `question`, `answer` and `solution`."""
    rows = corpus.fields(corpus.read(source, split, HUB), ("problem", "solution"), source)
    return [
        {"question": row["problem"].strip(), "answer": gold(row), "solution": row["solution"].strip()} for row in rows
    ]


def gold(row: dict[str, str]) -> str:
    """The right answer: what the row says, or the last box of its solution. Raises `ValueError` where there is none."""
    answer = row.get("answer") or (answers.extract(row["solution"]) if "boxed" in row["solution"] else None)
    if not answer:
        raise ValueError(f"A solution has its answer in \\boxed{{}}; this has none: {row['solution'][-80:]!r}")
    return answers.tidy(answer)
