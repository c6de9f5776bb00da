"""Made-up completions and tables of a small study, for the tests of tables, claims and figures."""

import itertools

import numpy as np
import pandas as pd

from replication.experiments import COLUMNS, Row

STEPS = np.array([2, 4] * 30)  # of each prompt of `completions`
LAMBDAS = {"soft-0.2": 0.2, "soft-0.5": 0.5, "soft-1.2": 1.2}
NAMES = ("teacher", "sft", "grpo", "gkd", *LAMBDAS, "dual", "minillm", "kdrl", "cmdp", "cmdp-chance")
METHODS = {name: name for name in NAMES} | dict.fromkeys(LAMBDAS, "gkd-grpo") | {"teacher": "sft"}


def row(name: str, **fields) -> Row:
    """A run of the study named for what it is tuned as."""
    return Row(
        **{"key": name, "name": name, "tuned": name, "method": METHODS.get(name, name), "seeds": [0, 1]} | fields
    )


ROWS = {name: row(name) for name in NAMES} | {"teacher": row("teacher", tuned="sft", start="teacher")}


def completions(**rates: dict) -> pd.DataFrame:
    """Four samples of 60 prompts by four seeds for every run of `NAMES`, as `tables.read_completions` gives them;
    `rates` sets a run's shares of correct and valid answers (`complex`: of correct ones to problems of four steps), and
    its mean cost."""
    draw, parts = np.random.default_rng(0), []
    for name in NAMES:
        rate = {"correct": 0.7, "valid": 0.7, "cost": 0.25} | rates.get(name.replace("-", "_").replace(".", ""), {})
        grid = pd.DataFrame(itertools.product(range(4), range(60), range(4)), columns=["seed", "prompt", 0])
        count = len(grid)
        correct = np.where(STEPS[grid["prompt"]] == 4, rate.get("complex", rate["correct"]), rate["correct"])
        table = grid.drop(columns=0).assign(
            run=name,
            decoding="sampled",
            correct=(draw.random(count) < correct).astype(int),
            valid=(draw.random(count) < rate["valid"]).astype(int),
            tokens=5,
            entropy=0.3,
            cost=draw.exponential(rate["cost"], count),
            peak=0.1,
        )
        right = table.groupby(["seed", "prompt"])["valid"].transform("mean")
        parts.append(table.assign(right=right, accurate=right + table["correct"] - table["valid"]))
    return pd.concat(parts, ignore_index=True)[["run", *COLUMNS, "right", "accurate"]]


def times() -> pd.DataFrame:
    """Times of every run of `NAMES` by two seeds."""
    rows = [(name, seed, 100, 50.0 + seed, 1000) for name in NAMES for seed in (3, 4)]
    return pd.DataFrame(rows, columns=["run", "seed", "steps", "seconds", "parameters"])
