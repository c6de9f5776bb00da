"""Tuning with equal effort: gather the trials of results/tuning, which `run` trains, and choose each run's settings."""

from pathlib import Path

import pandas as pd
import yaml

from cmdp.storage import read_yaml, write_table, write_text
from replication.experiments import EXPERIMENTS, RESULTS

CRITERION = "accuracy_within"  # correct and within the budget: the task reward that the constraint leaves
MEASURES = ("accuracy", "csr", "accuracy_within", "cost")
SETTINGS = ("learning_rate", "lam", "penalty", "dual_rate", "step_budget")
HEADER = "# Chosen from results/tuning.csv: what each run adds to `train` in params.yaml. Generated.\n\n"


def write_choice(results: Path = RESULTS) -> None:
    """Choose every run's settings, and the best soft Lagrangian and constrained variant, on validation prompts."""
    tuning, table = read_yaml(EXPERIMENTS)["tuning"], trials(results / "tuning")
    chosen = best(table)
    write_table(table.assign(chosen=table.index.isin(chosen.index).astype(int)), results / "tuning.csv")
    runs = {"sft": {}} | {row["run"]: settings_of(row) for _, row in chosen.iterrows()}
    for run, about in tuning["derived"].items():
        own = best(table[table["run"] == about["from"]], about.get("by", CRITERION))
        runs[run] = settings_of(own.iloc[0])
    methods = table["run"].map({run: about["method"] for run, about in tuning["trials"].items()})
    leading = {role: table.loc[table[methods.isin(of)][CRITERION].idxmax()] for role, of in tuning["best"].items()}
    best_runs = {role: trial["run"] for role, trial in leading.items()}
    content = yaml.safe_dump({"best": best_runs, "runs": runs}, sort_keys=False)
    write_text(HEADER + content, results / "chosen.yaml")


def trials(folder: Path) -> pd.DataFrame:
    """All trials, a row each: `run`, `index`, `seeds`, the settings tried, and the measures' means over the seeds.

    Raises:
        FileNotFoundError: there are no trials.
        ValueError: trials were run with different seeds.
    """
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise FileNotFoundError(f"There are no trials in {folder}: run `make tune` first.")
    rows = pd.concat([pd.read_csv(path).assign(run=path.stem) for path in paths], ignore_index=True)
    grouped = rows.groupby(["run", "index"])
    if grouped["seed"].agg(frozenset).nunique() > 1:
        raise ValueError(f"The trials in {folder} were not all run with the same seeds: finish `make tune`.")
    means = grouped[[name for name in (*SETTINGS, *MEASURES) if name in rows]].mean()
    means.insert(0, "seeds", grouped["seed"].nunique())
    return means.reset_index()


def best(table: pd.DataFrame, criterion: str = CRITERION) -> pd.DataFrame:
    """Each run's best trial by `criterion`; of equal ones the first in the grid."""
    return table.loc[table.groupby("run", sort=False)[criterion].idxmax()]


def settings_of(trial: pd.Series) -> dict[str, float]:
    """What a trial set, without what it left alone."""
    return {name: float(trial[name]) for name in SETTINGS if name in trial and pd.notna(trial[name])}
