"""How long a training step takes, next to TRL's trainers: `GRPOTrainer` with a reference model as large as the teacher,
which is the price of plain GRPO with a KL term, and `DistillationTrainer`, which is the price of GKD; and next to the
soft Lagrangian and dual ascent by our own trainer.

All have the same student, teacher, prompts and number of completions, every completion as long as the others,
and take turns in one process, so that what else the machine does falls on all alike. Ratios are of steps of one turn.
"""

import copy
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.stats import bootstrap

from cmdp.memory import device_name
from cmdp.methods import METHODS
from cmdp.models import build_model, build_tokenizer, pick_device
from cmdp.storage import provenance, write_table

PHASES = ("generation", "scoring", "update", "step")


def benchmark(params: dict, out: Path) -> pd.DataFrame:
    """Time steps of every trainer and write the table to `out`.

    Args:
        params: `student` and `teacher` (layers, hidden, heads each), `vocabulary` in words, `prompts` a step,
            `num_generations` a prompt, `prompt_length` and `completion_length` in tokens, `repeats`, `warmup` (turns
            that do not count), `use_cpu`, `seed`.

    Returns:
        A row for each trainer and phase, in seconds, and for each ratio of `cmdp` to another: median, min and max over
        the repeats, the bootstrapped 95 % interval of the median (low, high), the versions and the processor.
    """
    prompts = [" ".join([f"w{i}"] * params["prompt_length"]) for i in range(params["prompts"])]
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(params["num_generations"])]
    with TemporaryDirectory() as folder:
        trainers = _trainers(params, rows, folder)
        turns = []
        for turn in range(params["warmup"] + params["repeats"]):
            names = list(trainers)
            names = names[turn % len(names) :] + names[: turn % len(names)]  # no one always follows the same other
            turns.append({name: _step(trainers[name], rows) for name in names})
    turns = turns[params["warmup"] :]

    measured = {(name, phase): [turn[name][phase] for turn in turns] for name in trainers for phase in PHASES}
    steps = {name: measured[name, "step"] for name in trainers}
    steps["slower of TRL's"] = list(map(max, steps["trl-grpo"], steps["trl-distillation"]))
    for name, theirs in steps.items():
        if name != "cmdp":
            measured[f"cmdp / {name}", "step"] = [a / b for a, b in zip(steps["cmdp"], theirs, strict=True)]
    table = pd.DataFrame([(*key, *_spread(np.array(values))) for key, values in measured.items()])
    table.columns = ["trainer", "phase", "median", "min", "max", "low", "high"]
    table.insert(2, "unit", ["ratio" if "/" in name else "seconds" for name in table["trainer"]])
    versions = provenance()["libraries"]
    libraries = {name: versions[name] for name in ("torch", "trl")}
    device = device_name(pick_device(params["use_cpu"]))
    table = table.assign(repeats=len(turns), **libraries, device=device)
    write_table(table, out)
    return table


def _spread(values: np.ndarray) -> tuple[float, ...]:
    """(median, min, max, low, high)."""
    found = bootstrap((values,), np.median, method="percentile", rng=0).confidence_interval
    return np.median(values), values.min(), values.max(), found.low, found.high


def _trainers(params: dict, rows: list[dict], folder: str) -> dict:
    """The trainers, each with its own copy of the models, each with AdamW."""
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    from cmdp.trainer import CMDPConfig, CMDPTrainer

    length, group = params["completion_length"], params["num_generations"]
    tokenizer = build_tokenizer([f"w{i}" for i in range(params["vocabulary"])])
    student, teacher = (build_model(tokenizer, **params[role], seed=params["seed"]) for role in ("student", "teacher"))
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": len(rows),
        "max_completion_length": length,
        "generation_kwargs": {"min_new_tokens": length},  # no one ends early
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": params["use_cpu"],
        "seed": params["seed"],
        "report_to": [],
    }
    grpo = {**common, "num_generations": group, "loss_type": "dapo"}
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}

    def reward(completion_ids, **_):
        return [ids[0] % 2 for ids in completion_ids]

    def ours(**settings):
        models = copy.deepcopy(student), copy.deepcopy(teacher)
        return CMDPTrainer(*models, reward, CMDPConfig(**grpo, **settings), **data)

    trainers = {  # every trajectory exceeds a budget of 0: the single-step part has all tokens to do
        "cmdp": ours(**METHODS["cmdp"], budget=0.0),
        "gkd-grpo": ours(**METHODS["gkd-grpo"]),
        "dual": ours(**METHODS["dual"], budget=0.0, dual_rate=0.1),
        "trl-grpo": GRPOTrainer(copy.deepcopy(student), reward, GRPOConfig(**grpo, beta=0.0), **data),
        "trl-distillation": DistillationTrainer(student, copy.deepcopy(teacher), DistillationConfig(**common), **data),
    }
    reference = trainers[
        "trl-grpo"
    ]  # TRL would load the student once more as the reference: we want the teacher's size
    add_fused_lm_head(teacher, temperature=reference.temperature)
    reference.ref_model = reference.accelerator.prepare_model(teacher, evaluation_mode=True)
    reference.beta = 0.04
    for trainer in trainers.values():
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        for name in ("_generate", "_generate_and_score_completions"):
            setattr(trainer, name, _timed(trainer, getattr(trainer, name), name))
    return trainers


def _timed(trainer, method, name: str):
    """`method`, leaving the seconds that it took in `trainer.seconds`."""

    def call(*arguments):
        start = _now()
        result = method(*arguments)
        trainer.seconds[name] = _now() - start
        return result

    return call


def _step(trainer, rows: list[dict]) -> dict[str, float]:
    """Seconds of one optimisation step, by phase."""
    trainer.seconds = {}
    start = _now()
    trainer.training_step(trainer.model, rows, None)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    step = _now() - start
    generation, rollout = trainer.seconds["_generate"], trainer.seconds["_generate_and_score_completions"]
    return {"generation": generation, "scoring": rollout - generation, "update": step - rollout, "step": step}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
