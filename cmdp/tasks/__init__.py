"""Tasks: where problems come from, and what a right answer and a right derivation are.

A task is a module. `problems(...)` gives its problems, split by split: rows with `prompt`, `answer` and, for supervised
learning, `solution`. `is_correct(completion, answer)` is the task reward and `steps_are_valid(completion, prompt)`
checks the reasoning.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType

NAMES = ("arithmetic", "gsm", "competition_math")


def load_task(name: str) -> ModuleType:
    """The task's module. Raises `ValueError` for a name that is not one of `NAMES`."""
    if name not in NAMES:
        raise ValueError(f"The task is one of {NAMES}, not {name!r}.")
    return importlib.import_module(f"cmdp.tasks.{name}")


def read_problems(path: str | Path) -> list[dict[str, str]]:
    """The problems of a JSONL file, one a line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There are no problems at {path}: run the data stage (`dvc repro data`) first.")
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
