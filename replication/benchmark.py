"""Time of a training step next to the soft Lagrangian, dual ascent and TRL's trainers: `GRPOTrainer`, with a reference
model as large as the teacher, and `DistillationTrainer`, the price of GKD. All have the same student, teacher, prompts
and completions, all of one length, and take turns in one process, so that other load falls on all alike.
"""

import contextlib
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
import yaml
from datasets import Dataset
from scipy.stats import bootstrap

from cmdp.memory import device_name
from cmdp.methods import METHODS
from cmdp.models import build_model, build_tokenizer, pick_device
from cmdp.storage import provenance, write_table
from replication.experiments import RESULTS

TIMED = ("_generate", "_generate_and_score_completions")  # methods of all trainers; the second calls the first
PROMPT_LENGTH = 16  # tokens
SIZES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def benchmark(name: str, results: Path = RESULTS) -> None:
    """Time steps of every trainer at the sizes `name` and write `results`/benchmark/NAME.csv: a row per trainer and
    phase, in seconds, and per ratio of `cmdp` to another's step of the same turn, with median, least and greatest over
    the turns, the median's bootstrapped 95 % interval (low, high), library versions and the processor. Raises
    `ValueError` if there are no such sizes."""
    if name not in SIZES:
        raise ValueError(f"There is no benchmark {name!r}. Benchmarks: {', '.join(SIZES)}.")
    sizes = SIZES[name]
    (prompts, group), (repeats, warmup), turns = sizes["batch"], sizes["turns"], []
    rows = [{"prompt": " ".join([f"w{i}"] * PROMPT_LENGTH)} for i in range(prompts) for _ in range(group)]
    with TemporaryDirectory() as folder:
        trainers = make_trainers(sizes, rows, folder)
        names = list(trainers)
        for turn in range(warmup + repeats):
            first = turn % len(names)  # no one always follows the same other
            turns.append({name: _step(trainers[name], rows) for name in names[first:] + names[:first]})
    seconds = {name: pd.DataFrame([turn[name] for turn in turns[warmup:]]) for name in names}  # a row per turn
    steps = pd.DataFrame({name: table["step"] for name, table in seconds.items()})
    steps["slower of TRL's"] = steps[["trl-grpo", "trl-distillation"]].max(axis=1)
    for other in steps.columns.drop("cmdp"):
        seconds[f"cmdp / {other}"] = pd.DataFrame({"step": steps["cmdp"] / steps[other]})
    measured = pd.concat(seconds, axis=1)
    ends = bootstrap((measured,), np.median, axis=0, method="percentile", rng=0).confidence_interval
    table = measured.agg(["median", "min", "max"]).T.assign(low=ends.low, high=ends.high)
    table = table.rename_axis(["trainer", "phase"]).reset_index()
    table.insert(2, "unit", ["ratio" if "/" in trainer else "seconds" for trainer in table["trainer"]])
    libraries = {library: provenance()["libraries"][library] for library in ("torch", "trl")}
    about = {"repeats": repeats, **libraries, "device": device_name(pick_device(sizes["use_cpu"]))}
    write_table(table.assign(**about), results / "benchmark" / f"{name}.csv")


def make_trainers(sizes: dict, rows: list[dict], folder: str) -> dict:
    """The trainers, each with its own copy of the models and with AdamW, their phases timed."""
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    from cmdp.trainer import CMDPConfig, CMDPTrainer

    tokenizer = build_tokenizer([f"w{i}" for i in range(sizes["vocabulary"])])
    student, teacher = (build_model(tokenizer, **sizes[role], seed=0) for role in ("student", "teacher"))
    common = {"output_dir": folder, "use_cpu": sizes["use_cpu"], "bf16": False, "seed": 0, "report_to": []}
    common |= {"per_device_train_batch_size": len(rows), "gradient_checkpointing": False}
    common["max_completion_length"] = sizes["completion_length"]
    common["generation_kwargs"] = {"min_new_tokens": sizes["completion_length"]}  # no one ends early
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
        trainer.current_gradient_accumulation_steps, trainer.seconds = 1, {}
        for name in TIMED:
            setattr(trainer, name, _clock(trainer.seconds, name)(getattr(trainer, name)))
    return trainers


@contextlib.contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Leave the seconds that a block, or a function so decorated, takes in `seconds` as `name`."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish()
    start = time.perf_counter()
    yield
    finish()
    seconds[name] = time.perf_counter() - start


def _step(trainer, rows: list[dict]) -> dict[str, float]:
    """Seconds of one optimisation step, by phase."""
    with _clock(trainer.seconds, "step"):
        trainer.training_step(trainer.model, rows, None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    generation, rollout, step = (trainer.seconds[name] for name in (*TIMED, "step"))
    return {"generation": generation, "scoring": rollout - generation, "update": step - rollout, "step": step}
