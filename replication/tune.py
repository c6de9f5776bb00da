"""Tuning with equal effort: gather the trials of results/tuning, which `run` trains, and choose each run's settings."""

from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from cmdp.storage import write_table, write_text
from replication import experiments
from replication.experiments import EXPERIMENTS, RESULTS

MEASURED = ["accuracy", "csr", "cost", "score"]
ROLES = {"soft": "gkd-grpo", "subject": "cmdp", "ours": "cmdp-chance"}  # the method of each role in the verdicts
HEADER = "# Chosen from results/tuning.csv: what each run adds to `train` in params.yaml. Generated.\n\n"


def write_choice(results: Path = RESULTS) -> None:
    """Choose every entry's best trial by its score, and for each role its best entry under the constraint."""
    tuning = experiments.tuning()
    entries, table = tuning["entries"], trials(results / "tuning", tuning)
    best = table.groupby("run", sort=False)["score"].idxmax()  # of equal ones the first
    write_table(table.assign(chosen=table.index.isin(best).astype(int)), results / "tuning.csv")
    chosen, runs = table.loc[best].set_index("run"), {"sft": {}}
    for name, entry in entries.items():
        ladders = tuning["start"] | entry.get("start", {})
        runs[name] = entry["fixed"] | {key: float(chosen.loc[name, key]) for key in ladders}
    runs |= {name: dict(runs[of]) for name, of in tuning.get("derived", {}).items()}
    kept = under_constraint(chosen, tuning["csr"])
    methods = np.array([entries[run]["method"] for run in kept.index])
    leading = {role: kept[methods == method].idxmax() for role, method in ROLES.items()}
    write_text(HEADER + yaml.safe_dump({"best": leading, "runs": runs}, sort_keys=False), results / "chosen.yaml")


def trials(folder: Path, tuning: dict) -> pd.DataFrame:
    """All trials of `tuning` (experiments.yaml), a row each: `run`, `trial`, `seeds`, the settings tried, and the means
    over seeds of `MEASURED`. Raises `FileNotFoundError` if an entry has no trials, `ValueError` if fewer or more than
    were asked for, or other seeds."""
    tables = []
    for name in tuning["entries"]:
        path = folder / f"{name}.csv"
        if not path.is_file():
            raise FileNotFoundError(f"There are no trials in {path}: run `make tune` first.")
        grouped = (rows := pd.read_csv(path)).groupby("trial")
        extra = len(grouped) - tuning["trials"]  # beyond an edge
        if not 0 <= extra <= tuning["further"] or any(list(own) != tuning["seeds"] for _, own in grouped["seed"]):
            asked = f"{tuning['trials']} trials with seeds {tuning['seeds']}"
            raise ValueError(f"{path} has not the {asked} that {EXPERIMENTS} asks for: finish `make tune`.")
        means = grouped[[*rows.columns.drop(["trial", "seed", *MEASURED])]].first().join(grouped[MEASURED].mean())
        tables.append(means.reset_index().assign(run=name, seeds=len(tuning["seeds"])))
    table = pd.concat(tables, ignore_index=True)
    return table[[*(first := ["run", "trial", "seeds"]), *table.columns.drop([*first, *MEASURED]), *MEASURED]]


def under_constraint(trials: pd.DataFrame, target: float) -> pd.Series:
    """The accuracy of trials whose CSR is `target` or more; below any such, the CSR less one."""
    return trials["accuracy"].where(trials["csr"] >= target, trials["csr"] - 1)
