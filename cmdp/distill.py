"""One command on one's own data: `cmdp distill --student ID --teacher ID --dataset FILE --reward exact --budget 2.0`.

Its keys, on the command line or in a YAML file (`--config`), are the fields of `Distill` and of `CMDPConfig`. They make
an `Experiment` of the student before training and of one run, which is trained and measured like any other.
"""

import argparse
import dataclasses
import json
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from cmdp import storage, train
from cmdp.methods import START
from cmdp.trainer import CMDPConfig, option

DEFAULTS = {  # where the user says nothing
    **{"max_steps": 100, "per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 256},
    **{"lr_scheduler_type": "constant", "warmup_steps": 5, "max_grad_norm": 0.5},
    **{"logging_steps": 1, "save_steps": 25, "save_total_limit": 1, "per_device_eval_batch_size": 32},
}
LORA_RATE = 2e-5  # learning rate of an adapter; CMDPConfig's default is for all weights


@dataclass
class Distill:
    """What is distilled into what, from which data: the keys beside the fields of `CMDPConfig`."""

    student: str = option(MISSING, "Hub id, local folder or GGUF file.")
    teacher: str = option(MISSING, "The same; it has the student's tokenizer.")
    dataset: str = option(MISSING, "JSONL, JSON, parquet, CSV; folder with train.* and test.*; Hub id[:configuration].")
    reward: str = option(MISSING, "gsm8k, math, exact (all of the completion), PATH.py:function (TRL's, in [0, 1]).")
    method: str = option("cmdp-chance", "A method of cmdp.methods.")
    output: str | None = option(None, "Name in models/ and results/: STUDENT-DATASET unless given.")
    lora: bool = option(False, "Train a LoRA adapter, not all weights.")
    lora_r: int = option(16, "Its rank.")
    lora_alpha: int = option(32, "Its scale.")
    student_4bit: bool = option(False, "Hold the student's frozen weights in 4 bits (with --lora).")
    student_adapter: str | None = option(None, "Go on training this LoRA adapter.")
    teacher_4bit: bool = option(False, "Hold the teacher in 4 bits.")
    teacher_adapter: str | None = option(None, "LoRA adapter of the teacher.")
    test: str | None = option(None, "Held-out data, if not the test split of the dataset or a tenth of it.")
    split_seed: int = option(0, "Seed of that tenth.")
    prompt_column: str | None = option(None, "Else prompt, question or problem.")
    answer_column: str | None = option(None, "Else answer.")
    instruction: str | None = option(None, "Follows each question; else the reward's own.")
    prompt_length: int = option(512, "Longer prompts are left out (tokens).")
    prompts: int = option(200, "Held-out prompts that are measured, at most.")
    samples: int = option(4, "Completions of each.")
    before: bool = option(True, "Measure the student before training too.")


def parse(words: list[str]) -> tuple[Distill, dict[str, Any]]:
    """The keys on a command line, as `Distill` and the fields of `CMDPConfig` that are given. Raises `ValueError` for
    an unknown key, a missing one, or a value that does not convert."""
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
    with storage.named("--chat_template_kwargs", "takes a JSON object", ValueError):
        task["chat_template_kwargs"] = dict(json.loads(template)) if isinstance(template, str) else template
    student = {"model": options.student, "four_bit": options.student_4bit, "adapter": options.student_adapter}
    adapter = {"r": options.lora_r, "alpha": options.lora_alpha}
    if options.lora:
        student["lora"] = adapter
    elif adapter != {"r": Distill.lora_r, "alpha": Distill.lora_alpha}:
        raise ValueError("--lora_r and --lora_alpha need --lora.")
    teacher = {"model": options.teacher, "four_bit": options.teacher_4bit, "adapter": options.teacher_adapter}
    batch = settings["per_device_eval_batch_size"]
    measured = {"prompts": options.prompts, "samples": options.samples, "batch_size": batch}
    budget = {"budget": settings.pop("budget"), "budget_form": settings.pop("budget_form", "total")}
    runs = ({START: {"method": START}} if options.before else {}) | {options.method: {"method": options.method}}
    content = {"name": name, "task": task, "student": student, "teacher": teacher, "budget": budget, "runs": runs}
    content |= {"seeds": [int(settings.pop("seed", 0))], "train": settings, "evaluate": measured}
    return train.build(content, "the keys")
