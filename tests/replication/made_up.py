"""Made-up completions and tables of a small study, for the tests of tables, claims and figures."""

import itertools

import numpy as np
import pandas as pd

from replication.experiments import COLUMNS, Row

STEPS = np.array([2, 3] * 30)  # of each prompt of `completions`
BASELINES = ("grpo", "gkd", "gkd-grpo-weak", "gkd-grpo-medium", "gkd-grpo-strong", "dual", "minillm", "kdrl")
NAMES = ("sft", "cmdp", "cmdp-adaptive", *BASELINES)
METHODS = {name: name for name in NAMES} | {f"gkd-grpo-{name}": "gkd-grpo" for name in ("weak", "medium", "strong")}


def row(name: str, **fields) -> Row:
    """A run of the study named for what it is tuned as."""
    return Row(
        **{"key": name, "name": name, "tuned": name, "method": METHODS.get(name, name), "seeds": [0, 1]} | fields
    )


ROWS = {name: row(name) for name in NAMES}


def completions(**rates: dict) -> pd.DataFrame:
    """Four samples of 60 prompts (and two of 20 longer ones) by four seeds for every run of `NAMES`; `rates` sets a
    run's shares of correct and valid answers (`complex`: of correct ones to problems of three steps), and its mean
    cost."""
    draw, parts = np.random.default_rng(0), []
    for name in NAMES:
        rate = {"correct": 0.7, "valid": 0.7, "cost": 1.0} | rates.get(name.replace("-", "_"), {})
        for split, prompts, samples in (("test", 60, 4), ("longer", 20, 2)):
            grid = pd.DataFrame(
                itertools.product(range(4), range(prompts), range(samples)), columns=["seed", "prompt", 0]
            )
            count = len(grid)
            complex_too = rate.get("complex", rate["correct"])
            correct = np.where(STEPS[grid["prompt"]] == 3, complex_too, rate["correct"]) if split == "test" else 0.1
            table = grid.drop(columns=0).assign(
                run=name,
                split=split,
                correct=(draw.random(count) < correct).astype(int),
                valid=(draw.random(count) < rate["valid"]).astype(int),
                tokens=20,
                entropy=0.3,
                cost=draw.exponential(rate["cost"], count),
                peak=0.5,
                confidence=0.75,
                style=draw.choice(["so= on", "= gives"], count),
            )
            parts.append(table)
    return pd.concat(parts, ignore_index=True)[["run", *COLUMNS]]


def times() -> pd.DataFrame:
    """Times of every run of `NAMES` by two seeds."""
    rows = [(name, seed, 100, 50.0 + seed, 1000) for name in NAMES for seed in (3, 4)]
    return pd.DataFrame(rows, columns=["run", "seed", "steps", "seconds", "parameters"])
