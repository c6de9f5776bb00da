"""Tasks: the problems, what counts as a correct answer, and what counts as valid reasoning.

A task is a module with `problems(...)`, its problems by split (rows with `prompt`, `answer` and `solution`);
`is_correct(completion, answer)`, the task reward; and `steps_are_valid(completion, prompt)`.
"""

import importlib
import inspect
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from cmdp.storage import named

NAMES = ("arithmetic", "gsm", "competition_math")


def load_task(name: str) -> ModuleType:
    """The task's module. Raises `ValueError` for a name that is not one of `NAMES`."""
    if name not in NAMES:
        raise ValueError(f"The task is one of {NAMES}, not {name!r}.")
    return importlib.import_module(f"cmdp.tasks.{name}")


def load_problems(settings: Mapping, tokenizer=None) -> dict[str, list[dict]]:
    """The problems by split. `settings`, the `task` section of a parameter file, has the task's `name` and the
    arguments of its `problems`. Raises `ValueError` where the name or an argument is unknown, or one is missing."""
    problems = load_task(settings.get("name")).problems
    signature = inspect.signature(problems)
    arguments = {key: value for key, value in settings.items() if key not in ("name", "prompt_length")}
    arguments |= {"tokenizer": tokenizer} if "tokenizer" in signature.parameters else {}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        valid = ", ".join(name for name in signature.parameters if name != "tokenizer")
        raise ValueError(f"Settings of task {settings['name']!r} are {valid}: {error}.") from error
    return problems(**arguments)


def read(source: str | Path, split: str, hub: Mapping[str, tuple], fields: tuple[str, ...]) -> list[dict]:
    """The rows of a split ("train" or "test"), each with a text in all `fields`.

    `source` is a data set on the Hub, if `hub` has it with the configurations to read; a folder with `<split>.jsonl`,
    `<split>.parquet` or `<split>-*.parquet`; or such a file. Raises `FileNotFoundError` where there is nothing, or the
    data set is neither cached nor reachable, and `ValueError` where a file cannot be read or a row lacks a field."""
    path = Path(source)
    names = (f"{split}.jsonl", f"{split}.parquet", f"{split}-*.parquet")
    files = [path] if path.is_file() else next(filter(None, (sorted(path.glob(name)) for name in names)), [])
    if str(source) in hub and not path.exists():
        from datasets import load_dataset

        fault = f"is neither cached nor reachable on the Hub: unset HF_HUB_OFFLINE, or give a folder with {names[0]}"
        with named(source, fault, FileNotFoundError):
            rows = [row for name in hub[str(source)] for row in load_dataset(str(source), name, split=split)]
    elif files:
        with named(files[0], "is neither JSONL, one problem per line, nor parquet", ValueError):
            if files[0].suffix == ".parquet":
                from pyarrow.parquet import read_table

                rows = read_table(files).to_pylist()
            else:
                lines = files[0].read_text(encoding="utf-8").split("\n")
                rows = [json.loads(line) for line in lines if line.strip()]
    else:
        raise FileNotFoundError(f"No problems at {path}: give {', '.join(names)} or one of {', '.join(hub)}.")
    for index, row in enumerate(rows, 1):
        if missing := [name for name in fields if not isinstance(row, dict) or not isinstance(row.get(name), str)]:
            raise ValueError(f"Problem {index} of {source} ({split}) has no text in {missing}.")
    return rows


def cut(train: list[dict], test: list[dict], sizes: Mapping[str, int | None], seed: int) -> dict[str, list[dict]]:
    """Disjoint splits: "test" from the head of `test`, all others from `train`, shuffled by `seed`, in the order of
    `sizes`; None takes all that is left. A question is kept once, and not in `train` if `test` has it. Raises
    `ValueError` where there are too few problems."""
    tests, pool = {}, {}
    for row in test:
        tests.setdefault(key(row["question"]), row)
    for row in train:
        if (question := key(row["question"])) not in tests:
            pool.setdefault(question, row)
    held_out, rest, splits = list(tests.values()), list(pool.values()), {}
    random.Random(seed).shuffle(rest)
    for name, size in sizes.items():
        left = held_out if name == "test" else rest
        if size is not None and size > len(left):
            raise ValueError(f"There are {len(left)} problems left for {name!r}, and {size} were asked for.")
        splits[name] = left[:size]
        del left[:size]
    return splits


def key(question: str) -> str:
    """What identifies a question: its words, numbers and signs, whatever its case, punctuation and white space."""
    return " ".join(re.findall(r"\w+|[-+*/^=<>%.]", question.lower()))


def rendered(splits: dict[str, list[dict]], instruction: str, tokenizer) -> dict[str, list[dict[str, str]]]:
    """The splits as rows of `prompt`, `answer` and `solution`. A prompt is the question and the instruction: the user's
    turn of the tokenizer's chat template, which writes the special tokens, or plain text without a template."""

    def render(question: str, answer: str, solution: str) -> dict[str, str]:
        prompt = f"{instruction}\n\nQuestion: {question}\nAnswer:"
        if tokenizer is not None and tokenizer.chat_template:
            message = {"role": "user", "content": f"{question}\n\n{instruction}"}
            prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        return {"prompt": prompt, "answer": answer, "solution": solution}

    return {name: [render(**problem) for problem in rows] for name, rows in splits.items()}
