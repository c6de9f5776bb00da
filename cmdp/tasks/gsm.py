"""Grade-school word problems: GSM8K, from the Hub or from files, and GSM-Symbolic, generated offline.

    Natalia sold 48/2 = 24 clips in May.
    Natalia sold 48+24 = 72 clips altogether in April and May.
    #### 72

GSM8K (Cobbe et al., 2110.14168) has its calculator annotations (`<<48/2=24>>`) taken out of what a student is shown.
GSM-Symbolic (Mirzadeh et al., 2410.05229) comes from reasoning-gym: templates of GSM8K's questions, filled by a seed.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from cmdp.tasks import answers, corpus, steps
from cmdp.tasks.answers import is_correct

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_gsm8k", "is_correct", "problems", "steps_are_valid"]

HUB = {"openai/gsm8k": ("main",)}
SYMBOLIC = "gsm-symbolic"
INSTRUCTION = (
    "Solve the problem step by step, and write each calculation as an equation. "
    'End with a line "#### n", where n is the answer, a number alone.'
)
_SUFFIX = " Give the result as your final answer. Do not include units."


def problems(
    source: str | Path,
    sizes: dict[str, int | None],
    seed: int,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> dict[str, list[dict[str, str]]]:
    """Splits of `sizes` problems, which share no question; "test" is GSM8K's own test split, or a part of it, and all
    others are cut from its training split by `seed`.

    Args:
        source: "openai/gsm8k" on the Hub; a folder with train.jsonl and test.jsonl, whose rows have `question` and
            `answer`, the last line of which is `#### n`; or "gsm-symbolic".
        sizes: problems in each split; None takes all there are (not with "gsm-symbolic").
        tokenizer: its chat template renders the prompts; without one they are plain text.

    Raises:
        FileNotFoundError: the problems are not there, or not to be had offline.
        ValueError: there are too few, or a row is not as it should be.
    """
    if str(source) == SYMBOLIC:
        splits = symbolic(sizes, seed)
    else:
        splits = corpus.cut(*(read(source, split) for split in ("train", "test")), sizes, seed)
    return corpus.rendered(splits, INSTRUCTION, tokenizer)


def read(source: str | Path, split: str) -> list[corpus.Row]:
    """GSM8K's problems of a split: `question`, `answer` (the number alone) and `solution`, without annotations."""
    rows = corpus.fields(corpus.read(source, split, HUB), ("question", "answer"), source)
    return [
        {
            "question": row["question"].strip(),
            "answer": gold(row["answer"]),
            "solution": steps.without_annotations(row["answer"]).strip(),
        }
        for row in rows
    ]


def gold(solution: str) -> str:
    """The right answer at the end of a solution. Raises `ValueError` where there is none."""
    answer = answers.extract(solution) if "####" in solution else None
    if answer is None or answers.number(answer) is None:
        raise ValueError(f"A solution ends in `#### n` with a number n, not in {solution[-40:]!r}.")
    return answer.replace(",", "")


def symbolic(sizes: dict[str, int | None], seed: int) -> dict[str, list[corpus.Row]]:
    """GSM-Symbolic problems, drawn one after the other and dealt to the splits in the order of `sizes`; a question that
    has been asked before is drawn again. The templates are shared: what is held out is names and numbers.

    Raises:
        ValueError: a size is None, or not so many different problems turn up.
    """
    from reasoning_gym import create_dataset

    if None in sizes.values():
        raise ValueError(f"{SYMBOLIC} is generated: say how many problems for each of {tuple(sizes)}.")
    needed = sum(sizes.values())
    drawn: dict[str, corpus.Row] = {}
    for example in create_dataset("gsm_symbolic", size=2 * needed + 100, seed=seed):
        if len(drawn) == needed:
            break
        question = example["question"].removesuffix(_SUFFIX).strip()
        solution = example["metadata"]["answer_cot"].strip()
        # where a template's own solution goes wrong, by a rounding mostly, its answer is not to be trusted
        is_sound = all(equation.holds for equation in steps.equations(solution))
        if is_sound and is_correct(solution, example["answer"]):
            drawn.setdefault(
                corpus.key(question), {"question": question, "answer": example["answer"], "solution": solution}
            )
    if len(drawn) < needed:
        raise ValueError(f"{SYMBOLIC} gave {len(drawn)} different problems, and {needed} were asked for.")
    rows = iter(drawn.values())
    splits = {name: [next(rows) for _ in range(size)] for name, size in sizes.items()}
    corpus.check_disjoint(splits)
    return splits


def steps_are_valid(completion: str, prompt: str) -> bool:
    """Whether the completion states an equation between numbers, every one that it states is right, and an answer
    follows. Whether the equations fit the problem is not checked. A text longer than `steps.LONGEST` is no derivation.
    """
    if len(completion) > steps.LONGEST or answers.extract(completion) is None:
        return False
    found = steps.equations(completion)
    return bool(found) and all(equation.holds for equation in found)


def check_gsm8k(source: str | Path) -> dict:
    """Hold the verifier and the step checker against GSM8K's own solutions.

    Returns:
        Counts over all splits: `problems`; `accepted`, solutions that `is_correct` finds right; `refused`, solutions
        found wrong for the answer of the next problem that has another; `annotations` and `equations` (in the text
        without annotations), how many were `read`, are `wrong`, and in how many `solutions` with a wrong one;
        `valid` solutions by `steps_are_valid`; and `flagged`, the wrong equations with split and row.
    """
    counts = {"problems": 0, "accepted": 0, "refused": 0, "valid": 0}
    annotated = {"read": 0, "unread": 0, "wrong": 0, "solutions": 0}
    written = {"read": 0, "wrong": 0, "solutions": 0, "without": 0}
    flagged = []
    for split in ("train", "test"):
        rows = corpus.fields(corpus.read(source, split, HUB), ("question", "answer"), source)
        golds = [gold(row["answer"]) for row in rows]
        for index, row in enumerate(rows):
            solution = row["answer"]
            other = next(g for g in golds[index + 1 :] + golds if answers.number(g) != answers.number(golds[index]))
            counts["problems"] += 1
            counts["accepted"] += is_correct(solution, golds[index])
            counts["refused"] += not is_correct(solution, other)
            found = steps.annotations(solution)
            wrong = [e for e in found if isinstance(e, steps.Equation) and not e.holds]
            annotated["unread"] += sum(isinstance(e, str) for e in found)
            annotated["read"] += sum(not isinstance(e, str) for e in found)
            annotated["wrong"] += len(wrong)
            annotated["solutions"] += bool(wrong)
            found = steps.equations(solution)
            wrong = [equation for equation in found if not equation.holds]
            counts["valid"] += bool(found) and not wrong  # as `steps_are_valid`: all state an answer
            written["read"] += len(found)
            written["wrong"] += len(wrong)
            written["solutions"] += bool(wrong)
            written["without"] += not found
            flagged += [f"{split} {index + 1}: {equation.left} = {equation.right}" for equation in wrong]
    return {**counts, "annotations": annotated, "equations": written, "flagged": flagged}
