"""Tuning with equal effort: read the trials, choose each run's settings by code."""

from pathlib import Path

import pandas as pd

CRITERION = "accuracy_within"  # right and within the budget: what the constraint leaves of the task reward
MEASURES = ("accuracy", "csr", "accuracy_within", "cost")
SETTINGS = ("learning_rate", "lam", "penalty", "dual_rate", "step_budget")


def choose(trials: pd.DataFrame, criterion: str = CRITERION) -> pd.DataFrame:
    """The best trial of each run by `criterion` on validation prompts; of equal ones the first in the grid.

    Args:
        trials: as `read_trials` gives them.
    """
    return trials.loc[trials.groupby("run", sort=False)[criterion].idxmax()]


def best(trials: pd.DataFrame, family: str) -> str:
    """The run that did best, by `CRITERION` on validation prompts, of those whose names begin with `family`."""
    return trials.loc[trials[trials["run"].str.startswith(family)][CRITERION].idxmax(), "run"]


def settings_of(trial: pd.Series) -> dict[str, float]:
    """What a trial set, without what it left alone."""
    return {name: float(trial[name]) for name in SETTINGS if name in trial and pd.notna(trial[name])}


def read_trials(folder: Path) -> pd.DataFrame:
    """All trials, a row each: `run`, `index`, the settings tried, `seeds`, and the means of the measures over these.

    Raises:
        FileNotFoundError: there are no trials.
        ValueError: some trials were run with other seeds than the rest.
    """
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise FileNotFoundError(f"There are no trials in {folder}: run `make tune` first.")
    rows = pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)
    trials = rows.groupby(["run", "index"])
    if trials["seed"].agg(frozenset).nunique() > 1:
        raise ValueError(f"Not every trial in {folder} was run with the same seeds: run `make tune` to its end.")
    means = trials[[name for name in (*SETTINGS, *MEASURES) if name in rows]].mean()
    means.insert(0, "seeds", trials["seed"].nunique())
    return means.reset_index()
