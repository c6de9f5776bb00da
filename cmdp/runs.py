"""A run of the experiment: a student distilled from the files that it starts from, and the log of its training."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cmdp.storage import checkpoint_folder, write_table

LOGGED = (  # columns of a training log that depend on nothing but the seed; the rest are times
    "step",
    "task_reward",
    "modified_reward",
    "csr",
    "cost/mean",
    "cost/q50",
    "cost/q90",
    "kl_per_token",
    "remaining_budget",
    "over_budget_tokens",
    "lambda",
    "entropy",
    "completions/mean_length",
    "loss/policy",
    "loss/single_step",
    "grad_norm",
)


class Distilled(NamedTuple):
    """A trained student with what it was trained from."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    log: list[dict]  # a dict a step
    checkpoints: Path  # to be deleted when what came of the run is written


def distil(run: str, settings: dict, task_name: str, data: Path, models: Path, start: str, name: str) -> Distilled:
    """Train a copy of the student `models`/`start` by the method of `run`, going on from its last checkpoint.

    Args:
        settings: fields of `CMDPConfig`, the seed included.
        data: the folder with train.jsonl.
        models: the folder of the teacher and of the student to start from.
        name: of the run's checkpoints.
    """
    from cmdp import methods
    from cmdp.models import load_pair
    from cmdp.tasks import load_task, read_problems

    method = methods.method_of(run)
    student, teacher, tokenizer = load_pair(models / start, models / "teacher")
    problems = read_problems(data / "train.jsonl")
    inputs = [data / "train.jsonl", *models.glob(f"{start}/*"), *models.glob("teacher/*")]
    checkpoints, resume = checkpoint_folder(name, {"method": method, **settings}, inputs)
    log = []
    if method != "sft":
        is_correct = load_task(task_name).is_correct
        with steps_to(checkpoints / "steps.txt"):
            log = methods.train(
                method, student, teacher, tokenizer, problems, is_correct, checkpoints, resume, settings
            )
    return Distilled(student, teacher, tokenizer, log, checkpoints)


def longer_problems(task: ModuleType, settings: dict, seed: int) -> list[dict[str, str]]:
    """Problems of more steps than any in training: `settings` has `prompts` and `steps` = [fewest, most]."""
    return task.problems({"longer": settings["prompts"]}, tuple(settings["steps"]), seed)["longer"]


@contextlib.contextmanager
def steps_to(path: Path) -> Iterator[None]:
    """Send what a trainer prints, a line a step, to a file beside its checkpoints: `tail -f` follows it."""
    print(f"Training: its steps are printed to {path}", flush=True)
    with open(path, "a", buffering=1, encoding="utf-8") as lines, contextlib.redirect_stdout(lines):
        yield


def write_log(log: list[dict], results: Path, timing: Path, name: str) -> None:
    """Write the training log of `name`, RUN/SEED: what the seed decides in `results`/training, times in `timing`."""
    table = pd.DataFrame([entry for entry in log if "csr" in entry])
    times = [column for column in table if column.startswith("time/")]
    write_table(table.reindex(columns=LOGGED), results / "training" / f"{name}.csv")
    write_table(table.reindex(columns=["step", *times]), timing / f"{name}.csv")
