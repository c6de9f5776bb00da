"""Collections of problems that others wrote: read from the Hugging Face Hub or from JSONL files, cut into splits that
share no question, and rendered as prompts.

The Hub is asked only for the names that a task lists, and only where HF_HUB_OFFLINE is not set.
"""

import random
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, str]  # question, answer, solution


def read(source: str | Path, split: str, hub: dict[str, tuple[str, ...]]) -> list[dict]:
    """The rows of a split as their authors named the fields.

    Args:
        source: a key of `hub`, a folder that holds `<split>.jsonl`, or one JSONL file.
        split: "train" or "test".
        hub: the Hub's data sets that may be asked for, each with the configurations to read, one after the other.

    Raises:
        FileNotFoundError: there is nothing at the path, or the data set is neither cached nor to be reached.
        ValueError: a file is not JSONL.
    """
    from datasets import Dataset, load_dataset

    path = Path(source)
    if str(source) in hub and not path.exists():
        try:
            parts = [load_dataset(str(source), name, split=split) for name in hub[str(source)]]
        except (OSError, ValueError) as error:  # offline and not cached, no such data set, no connection
            raise FileNotFoundError(
                f"{source} is neither in the cache of `datasets` nor to be had from the Hub ({type(error).__name__}): "
                f"unset HF_HUB_OFFLINE to download it, or give a folder with {split}.jsonl instead of its name."
            ) from error
        return [row for part in parts for row in part]
    path = path / f"{split}.jsonl" if path.is_dir() else path
    if not path.is_file():
        known = " or ".join(hub)
        raise FileNotFoundError(f"There are no problems at {path}: give a JSONL file, a folder with them, or {known}.")
    # Not `load_dataset("json")`, which counts a download on the network even where the file is local.
    with tempfile.TemporaryDirectory() as cache:
        try:
            return Dataset.from_json(str(path), cache_dir=cache, keep_in_memory=True).to_list()
        except Exception as error:
            raise ValueError(f"{path} is not JSONL, one problem a line: {error.__cause__ or error}") from error


def fields(rows: Iterable[dict], names: tuple[str, ...], source: str | Path) -> list[dict]:
    """The rows, once each is known to hold a text under every one of `names`.

    Raises:
        ValueError: one does not; the message says which.
    """
    rows = list(rows)
    for index, row in enumerate(rows):
        missing = [name for name in names if not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(f"Problem {index + 1} of {source} has no text in {missing}: it needs {names}.")
    return rows


def cut(train: list[Row], test: list[Row], sizes: dict[str, int | None], seed: int) -> dict[str, list[Row]]:
    """Splits of the sizes asked for: "test" from the head of `test`, every other from `train` in an order drawn by
    `seed`, one after the other as `sizes` names them; None takes all that is left.

    A question that is asked twice is kept once, and in `train` not at all if `test` asks it, whatever part of `test` is
    taken. Case, punctuation and white space make no difference.

    Raises:
        ValueError: there are too few.
    """
    asked = {key(row["question"]) for row in test}
    pool = []
    for row in train:
        if (asks := key(row["question"])) not in asked:
            asked.add(asks)
            pool.append(row)
    test = list({key(row["question"]): row for row in reversed(test)}.values())[::-1]
    random.Random(seed).shuffle(pool)
    splits = {}
    for name, size in sizes.items():
        source = test if name == "test" else pool
        size = len(source) if size is None else size
        if size > len(source):
            raise ValueError(f"There are {len(source)} problems left for {name!r}, and {size} were asked for.")
        splits[name] = source[:size]
        if name != "test":
            pool = pool[size:]
    check_disjoint(splits)
    return splits


def check_disjoint(splits: dict[str, list[Row]]) -> None:
    """Raises `ValueError` where a question is asked in two splits, or twice in one."""
    where: dict[str, str] = {}
    for name, rows in splits.items():
        for row in rows:
            other = where.setdefault(key(row["question"]), name)
            if other != name:
                raise ValueError(f"{other!r} and {name!r} share the question {row['question'][:80]!r}.")


def key(question: str) -> str:
    """What makes two questions the same: their words, numbers and signs."""
    return " ".join(re.findall(r"\w+|[-+*/^=<>%.]", question.lower()))


def rendered(
    splits: dict[str, list[Row]], instruction: str, tokenizer: "PreTrainedTokenizerBase | None"
) -> dict[str, list[dict[str, str]]]:
    """The splits with `prompt`, `answer` and `solution` in every row, as a task gives them."""
    prompt: Callable[[str], str] = lambda question: render(tokenizer, question, instruction)  # noqa: E731
    return {
        name: [
            {"prompt": prompt(row["question"]), "answer": row["answer"], "solution": row["solution"]} for row in rows
        ]
        for name, rows in splits.items()
    }


def render(tokenizer: "PreTrainedTokenizerBase | None", question: str, instruction: str) -> str:
    """The prompt, up to where the student is to begin: the question and then the instruction as the user's turn of the
    tokenizer's chat template; without a template (or a tokenizer), instruction, "Question: ...", "Answer:".

    The template writes the tokenizer's special tokens, so the prompt is to be encoded without adding them again.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return f"{instruction}\n\nQuestion: {question}\nAnswer:"
    message = {"role": "user", "content": f"{question}\n\n{instruction}"}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
