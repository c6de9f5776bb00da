"""One command on one's own data: `cmdp distill --student ID --teacher ID --dataset FILE --reward exact --budget 2.0`.

Its keys, on the command line or in a YAML file (`--config`), are the fields of `Distill` and of `CMDPConfig`. They make
an `Experiment` of the student before training and of one run, which is trained and measured like any other.
"""

import argparse
import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmdp import storage, train
from cmdp.methods import START

DEFAULTS = {  # where the user says nothing
    **{"max_steps": 100, "per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 256},
    **{"lr_scheduler_type": "constant", "warmup_steps": 5, "max_grad_norm": 0.5},
    **{"logging_steps": 1, "save_steps": 25, "save_total_limit": 1, "per_device_eval_batch_size": 32},
}
LORA_RATE = 2e-5  # learning rate of an adapter; CMDPConfig's default is for all weights


def _option(help: str, **default):
    return field(metadata={"help": help}, **default)


@dataclass
class Distill:
    """What is distilled into what, from which data: the keys beside the fields of `CMDPConfig`."""

    student: str = _option("Hub id, local folder or GGUF file.")
    teacher: str = _option("The same; it has the student's tokenizer.")
    dataset: str = _option("JSONL, JSON, parquet or CSV; a folder with train.* and test.*; a Hub id[:configuration].")
    reward: str = _option("gsm8k, math, exact, or PATH.py:function with TRL's signature and values in [0, 1].")
    method: str = _option("A method of cmdp.methods.", default="cmdp-chance")
    output: str | None = _option("Name in models/ and results/: STUDENT-DATASET unless given.", default=None)
    lora: bool = _option("Train a LoRA adapter, not all weights.", default=False)
    lora_r: int = _option("Its rank.", default=16)
    lora_alpha: int = _option("Its scale.", default=32)
    student_4bit: bool = _option("Hold the student's frozen weights in 4 bits (with --lora).", default=False)
    student_adapter: str | None = _option("Go on training this LoRA adapter.", default=None)
    teacher_4bit: bool = _option("Hold the teacher in 4 bits.", default=False)
    teacher_adapter: str | None = _option("LoRA adapter of the teacher.", default=None)
    test: str | None = _option("Held-out data, if not the test split of the dataset or a tenth of it.", default=None)
    split_seed: int = _option("Seed of that tenth.", default=0)
    prompt_column: str | None = _option("Else prompt, question or problem.", default=None)
    answer_column: str | None = _option("Else answer.", default=None)
    instruction: str | None = _option("Follows each question; else the reward's own.", default=None)
    prompt_length: int = _option("Longer prompts are left out (tokens).", default=512)
    prompts: int = _option("Held-out prompts that are measured.", default=200)
    samples: int = _option("Completions of each.", default=4)
    before: bool = _option("Measure the student before training too.", default=True)


def parse(words: list[str]) -> tuple[Distill, dict[str, Any]]:
    """The keys on a command line, as `Distill` and the fields of `CMDPConfig` that are given. Raises `ValueError` for
    an unknown key, a missing one, or a value that does not convert."""
    from cmdp.trainer import CMDPConfig

    parser, own = train.arguments(Distill, CMDPConfig), {entry.name for entry in dataclasses.fields(Distill)}
    parser.prog = "cmdp distill"
    for action in parser._actions:
        action.default = action.default if action.dest in own else argparse.SUPPRESS
    file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file.add_argument("--config", type=Path, help="A YAML file of these keys.")
    (found, words), unknown = file.parse_known_args(words), []
    if found.config:
        unknown = parser.set_defaults_with_config(**storage.read_yaml(found.config))
    given, more = parser.parse_known_args(words)
    if unknown or more:
        raise ValueError(f"There is no {[*unknown, *more][0]}: `cmdp distill --help` lists the keys.")
    settings = {name: value for name, value in vars(given).items() if name not in own}
    return Distill(**{name: getattr(given, name) for name in own}), settings


def experiment(options: Distill, settings: dict[str, Any]) -> train.Experiment:
    """The experiment that the keys describe, checked. Raises `ValueError` as `train.build` does."""
    names = [re.sub(r"\.(gguf|jsonl?|parquet|csv)$", "", Path(x).name) for x in (options.student, options.dataset)]
    name = options.output or re.sub("[^a-z0-9.-]+", "-", "-".join(names).lower()).strip("-.")
    if "output_dir" in settings:
        raise ValueError("--output_dir is not used: --output names the folders in models/ and results/.")
    if "budget" not in settings:
        raise ValueError("--budget is missing: nats per token (--budget_form per_token) or per completion (total).")
    adapted = options.lora or options.student_adapter
    length = {"max_steps": -1} if "num_train_epochs" in settings else {}
    settings = DEFAULTS | length | ({"learning_rate": LORA_RATE} if adapted else {}) | settings
    task = {"name": options.reward, "source": options.dataset, "seed": options.split_seed}
    task |= {"sizes": {"test": None, "train": None}, "prompt_length": options.prompt_length, "test": options.test}
    task |= {key: getattr(options, key) for key in ("prompt_column", "answer_column", "instruction")}
    template = settings.pop("chat_template_kwargs", None)
    task["chat_template_kwargs"] = json.loads(template) if isinstance(template, str) else template
    student = {"model": options.student, "four_bit": options.student_4bit, "adapter": options.student_adapter}
    if options.lora:
        student["lora"] = {"r": options.lora_r, "alpha": options.lora_alpha}
    teacher = {"model": options.teacher, "four_bit": options.teacher_4bit, "adapter": options.teacher_adapter}
    measured = {"prompts": options.prompts, "samples": options.samples}
    measured["batch_size"] = settings["per_device_eval_batch_size"]
    budget = {"budget": settings.pop("budget"), "budget_form": settings.pop("budget_form", "total")}
    runs = ({START: {"method": START}} if options.before else {}) | {options.method: {"method": options.method}}
    content = {"name": name, "task": task, "student": student, "teacher": teacher, "budget": budget, "runs": runs}
    content |= {"seeds": [int(settings.pop("seed", 0))], "train": settings, "evaluate": measured}
    return train.build(content, "cmdp distill")
