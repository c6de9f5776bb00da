"""Time of a training step next to TRL's trainers, the soft Lagrangian and dual ascent.

TRL's `GRPOTrainer` has a reference model as large as the teacher: the price of GRPO with a KL term. TRL's
`DistillationTrainer` is the price of GKD. All trainers have the same student, teacher, prompts and number of
completions, all of one length, and take turns in one process, so that other load on the machine falls on all alike.
Ratios are of steps of one turn.
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
from replication.experiments import RESULTS

PHASES = ("generation", "scoring", "update", "step")
PROMPT_LENGTH = 16  # tokens
SIZES = {  # the experiment's own sizes, and a vocabulary large enough for its heads to dominate
    "default": {
        "student": {"layers": 2, "hidden": 64, "heads": 4},
        "teacher": {"layers": 3, "hidden": 96, "heads": 4},
        "vocabulary": 50,  # words
        "batch": (64, 2),  # prompts per step, completions per prompt
        "completion_length": 32,
        "turns": (45, 2),  # that count, and before them that do not
        "use_cpu": True,
    },
    "large-vocabulary": {
        "student": {"layers": 4, "hidden": 128, "heads": 4},
        "teacher": {"layers": 6, "hidden": 256, "heads": 4},
        "vocabulary": 8000,
        "batch": (4, 4),
        "completion_length": 64,
        "turns": (7, 1),
        "use_cpu": True,
    },
}


def benchmark(name: str, results: Path = RESULTS) -> pd.DataFrame:
    """Time the trainers at the sizes `name` and write `results`/benchmark/NAME.csv. Raises `ValueError` if unknown."""
    if name not in SIZES:
        raise ValueError(f"There is no benchmark {name!r}. Benchmarks: {', '.join(SIZES)}.")
    table = measure(SIZES[name])
    write_table(table, results / "benchmark" / f"{name}.csv")
    return table


def measure(sizes: dict) -> pd.DataFrame:
    """Time steps of every trainer at `sizes`, laid out as in `SIZES`.

    Returns:
        A row per trainer and phase, in seconds, and per ratio of `cmdp` to another: median, min and max over the
        repeats, the bootstrapped 95 % interval of the median (low, high), library versions and the processor.
    """
    (prompts, group), (repeats, warmup) = sizes["batch"], sizes["turns"]
    rows = [{"prompt": " ".join([f"w{i}"] * PROMPT_LENGTH)} for i in range(prompts) for _ in range(group)]
    turns = []
    with TemporaryDirectory() as folder:
        trainers = make_trainers(sizes, rows, folder)
        names = list(trainers)
        for turn in range(warmup + repeats):
            first = turn % len(names)  # no one always follows the same other
            turns.append({name: _step(trainers[name], rows) for name in names[first:] + names[:first]})
    turns = turns[warmup:]

    measured = {(name, phase): [turn[name][phase] for turn in turns] for name in trainers for phase in PHASES}
    steps = {name: measured[name, "step"] for name in trainers}
    steps["slower of TRL's"] = list(map(max, steps["trl-grpo"], steps["trl-distillation"]))
    for name, theirs in steps.items():
        if name != "cmdp":
            measured[f"cmdp / {name}", "step"] = [a / b for a, b in zip(steps["cmdp"], theirs, strict=True)]
    lines = []
    for (name, phase), values in measured.items():
        ends = bootstrap((values,), np.median, method="percentile", rng=0).confidence_interval
        unit = "ratio" if "/" in name else "seconds"
        lines.append((name, phase, unit, np.median(values), min(values), max(values), ends.low, ends.high))
    table = pd.DataFrame(lines, columns=["trainer", "phase", "unit", "median", "min", "max", "low", "high"])
    libraries = {name: provenance()["libraries"][name] for name in ("torch", "trl")}
    return table.assign(repeats=repeats, **libraries, device=device_name(pick_device(sizes["use_cpu"])))


def make_trainers(sizes: dict, rows: list[dict], folder: str) -> dict:
    """The trainers, each with its own copy of the models and with AdamW, their phases timed."""
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    from cmdp.trainer import CMDPConfig, CMDPTrainer

    tokenizer = build_tokenizer([f"w{i}" for i in range(sizes["vocabulary"])])
    student, teacher = (build_model(tokenizer, **sizes[role], seed=0) for role in ("student", "teacher"))
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": len(rows),
        "max_completion_length": sizes["completion_length"],
        "generation_kwargs": {"min_new_tokens": sizes["completion_length"]},  # no one ends early
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": sizes["use_cpu"],
        "seed": 0,
        "report_to": [],
    }
    grpo = {**common, "num_generations": sizes["batch"][1], "loss_type": "dapo"}
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
    reference = trainers["trl-grpo"]  # whose own reference would be the student once more, not of the teacher's size
    add_fused_lm_head(teacher, temperature=reference.temperature)
    reference.ref_model = reference.accelerator.prepare_model(teacher, evaluation_mode=True)
    reference.beta = 0.04
    for trainer in trainers.values():
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        for name in ("_generate", "_generate_and_score_completions"):
            _time_method(trainer, name)
    return trainers


def _time_method(trainer, name: str) -> None:
    """Have the method `name` leave the seconds it took in `trainer.seconds`."""
    method = getattr(trainer, name)

    def timed(*arguments):
        start = _now()
        result = method(*arguments)
        trainer.seconds[name] = _now() - start
        return result

    setattr(trainer, name, timed)


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
