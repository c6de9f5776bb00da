"""The pipeline's command: `python -m replication STAGE [NAME]`. dvc.yaml runs its stages."""

import argparse
import importlib
import os
import warnings

from cmdp.cli import call

STAGES = {  # stage: the function it calls, what it does, and whether it takes a name
    "pretrain": ("run:pretrain", "train a start model on solutions: results/start/NAME", True),
    "run": ("run:run", "train and measure one run, all of its seeds: results/runs/PART/NAME", True),
    "trial": ("run:trial", "train and measure the tuning trials of one run: results/tuning/NAME.csv", True),
    "choose": ("tune:write_choice", "choose each run's settings from its trials: results/chosen.yaml", False),
    "tables": ("tables:write", "compute the tables of a part, default or study", True),
    "claims": ("claims:write", "judge the paper's claims: results/claims.csv", False),
    "figures": ("plots:draw", "draw the figures of default, study, theory or laptop", True),
    "theory": ("theory:write", "guarantees and learners on token trees: results/theory", False),
    "readme": ("readme:fill_all", "fill the generated tables of README.md and docs/", False),
    "benchmark": ("benchmark:benchmark", "time a step next to TRL's trainers: results/benchmark/NAME.csv", True),
    "laptop-problems": ("laptop:write_problems", "write the problems of profiles/laptop.yaml: problems/laptop", False),
    "laptop-unpack": ("laptop:unpack", "unpack the weights of SmolLM2-135M: models/smollm2/base", False),
    "laptop-start": ("laptop:start", "train a start adapter, teacher or student: results/smollm2/NAME", True),
    "laptop-keep": ("laptop:keep", "keep the adapter that a run trained, in bfloat16: results/smollm2/NAME", True),
    "laptop-ceiling": ("laptop:write_ceiling", "what a budget buys of it: results/smollm2/ceiling.csv", False),
    "laptop-account": ("laptop:write_account", "what its students' nats bought: results/NAME/ceiling.csv", True),
    "laptop-knows": ("laptop:measure_tasks", "what SmolLM2-135M knows: results/smollm2/tasks.csv", False),
    "profile": ("profile:run", "train and measure profiles/NAME.yaml and judge C4 or C5 on it: results/NAME", True),
    "keys": ("experiments:print_keys", "print the runs of a part, or the entries of tuning, as a pattern", True),
    "smoke": ("experiments:shrink", "shrink the parameter files under the folder NAME to profiles/smoke.yaml", True),
}


def main() -> None:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # before NumPy loads
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, to one another
    parser = argparse.ArgumentParser(prog="python -m replication", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="stage", dest="stage")
    for stage, (_, help_, takes_name) in STAGES.items():
        command = commands.add_parser(stage, help=help_)
        if takes_name:
            command.add_argument("name")
    arguments = parser.parse_args()
    place, _, takes_name = STAGES[arguments.stage]
    module, _, function = place.partition(":")

    def stage(*names: str) -> None:
        getattr(importlib.import_module(f"replication.{module}"), function)(*names)

    call(f"replication {arguments.stage}", stage, *([arguments.name] if takes_name else []))
