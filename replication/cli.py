"""The pipeline's command: `python -m replication STAGE [NAME]`. dvc.yaml runs its stages."""

import argparse
import importlib
import os
import warnings

from cmdp.cli import call

STAGES = {  # stage: the function it calls, what it does, and how many arguments it takes
    "pretrain": ("run:pretrain", "train a start model on solutions: results/start/NAME", 1),
    "run": ("run:run", "train and measure one run, all of its seeds: results/runs/PART/NAME", 1),
    "trial": ("run:trial", "train and measure the tuning trials of one run: results/tuning/NAME.csv", 1),
    "choose": ("tune:write_choice", "choose each run's settings from its trials: results/chosen.yaml", 0),
    "tables": ("tables:write", "compute the tables of a part, default or study", 1),
    "claims": ("claims:write", "judge the paper's claims: results/claims.csv", 0),
    "figures": ("plots:draw", "draw the figures of default, study, theory or laptop", 1),
    "theory": ("theory:write", "guarantees and learners on token trees: results/theory", 0),
    "readme": ("readme:fill_all", "fill the generated tables of README.md and docs/", 0),
    "benchmark": ("benchmark:benchmark", "time a step next to TRL's trainers: results/benchmark/NAME.csv", 1),
    "laptop-problems": ("laptop:write_problems", "write the problems of profiles/laptop.yaml: problems/laptop", 0),
    "laptop-unpack": ("laptop:unpack", "unpack the weights of SmolLM2-135M: models/smollm2/base", 0),
    "laptop-start": ("laptop:start", "train a start adapter, teacher or student: results/smollm2/NAME", 1),
    "laptop-keep": ("laptop:keep", "keep the adapter in the folder NAME of a run: results/smollm2/RUN", 1),
    "laptop-teacher": ("laptop:measure_teacher", "measure the teacher: results/smollm2/teacher.csv", 0),
    "laptop-ceiling": ("laptop:write_ceiling", "what a budget buys of it: results/smollm2/ceiling.csv", 0),
    "laptop-account": ("laptop:write_account", "what its students' nats bought: results/NAME/ceiling.csv", 1),
    "laptop-knows": ("laptop:measure_tasks", "what SmolLM2-135M knows: results/smollm2/tasks.csv", 0),
    "profile": ("profile:run", "train, measure and judge profiles/NAME.yaml, with overrides: results/NAME", "+"),
    "keys": ("experiments:print_keys", "print the runs of a part, or the entries of tuning, as a pattern", 1),
    "smoke": ("experiments:shrink", "shrink the parameter files under the folder NAME to profiles/smoke.yaml", 1),
}


def main() -> None:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # before NumPy loads
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own, to one another
    parser = argparse.ArgumentParser(prog="python -m replication", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="stage", dest="stage")
    for stage, (_, help_, count) in STAGES.items():
        command = commands.add_parser(stage, help=help_)
        if count:
            command.add_argument("name", nargs=count)
    arguments = parser.parse_args()
    place, _, count = STAGES[arguments.stage]
    module, _, function = place.partition(":")

    def stage(*names: str) -> None:
        getattr(importlib.import_module(f"replication.{module}"), function)(*names)

    call(f"replication {arguments.stage}", stage, *(arguments.name if count else []))
