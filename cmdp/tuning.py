"""Tuning with equal effort: read the trials, choose each run's settings by code."""

from pathlib import Path

import pandas as pd

CRITERION = "accuracy_within"  # right and within the budget: what the constraint leaves of the task reward
SETTINGS = ("learning_rate", "lam", "penalty", "dual_rate", "step_budget")


def choose(trials: pd.DataFrame) -> pd.DataFrame:
    """The best trial of each run by `CRITERION` on validation prompts; of equal ones the first in the grid.

    Args:
        trials: a row a trial: `run`, `index`, the settings tried and the measures.
    """
    return trials.loc[trials.groupby("run", sort=False)[CRITERION].idxmax()]


def best(trials: pd.DataFrame, family: str) -> str:
    """The run that did best, by `CRITERION` on validation prompts, of those whose names begin with `family`."""
    return trials.loc[trials[trials["run"].str.startswith(family)][CRITERION].idxmax(), "run"]


def settings_of(trial: pd.Series) -> dict[str, float]:
    """What a trial set, without what it left alone."""
    return {name: float(trial[name]) for name in SETTINGS if name in trial and pd.notna(trial[name])}


def read_trials(folder: Path) -> pd.DataFrame:
    """All trials, a row each. Raises `FileNotFoundError` where there are none."""
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise FileNotFoundError(f"There are no trials in {folder}: run `make tune` first.")
    return pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)
