"""What the runs of an experiment measured, a file a run and seed, and all of them gathered."""

from pathlib import Path

import pandas as pd

from cmdp.statistics import summarise
from cmdp.storage import provenance, write_json, write_table


def write_measures(tables: dict[str, pd.DataFrame], results: Path, run: str, seed: int) -> None:
    """Write the tables of an evaluation, each under `results` in the folder that it is named for."""
    for folder, table in tables.items():
        table.insert(0, "run", run)
        table.insert(1, "seed", seed)
        write_table(table, results / folder / run / f"{seed}.csv")


def gather(folder: Path, params: dict) -> pd.DataFrame:
    """The tables of all runs and seeds in `folder`, one after the other, with columns `run` and `seed`.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    tables = []
    for run in params["methods"]:
        for seed in params["seeds"]:
            path = folder / run / f"{seed}.csv"
            if not path.is_file():
                raise FileNotFoundError(f"There is no {path}: train and evaluate it first (`make repro` does).")
            table = pd.read_csv(path)
            if "run" not in table:
                table.insert(0, "run", run)
                table.insert(1, "seed", seed)
            tables.append(table)
    return pd.concat([table for table in tables if len(table)], ignore_index=True)


def collect(params: dict, results: Path, timing: Path) -> None:
    """Gather all runs of `params` into `results`: summary, metrics, training curves, times, provenance."""
    summary = summarise(gather(results / "runs", params), params["budget"]["budget"], params["budget"]["budget_form"])
    write_table(summary, results / "summary.csv")
    nested = {
        run: {row.measure: round(row.mean, 4) for row in group.itertuples()}
        for run, group in summary.groupby("run", sort=False)
    }
    write_json(nested, results / "metrics.json")
    write_table(gather(results / "training", params), results / "curves.csv")
    write_table(gather(results / "positions", params), results / "positions.csv")
    times = gather(timing, params)
    times = times.groupby("run", sort=False).median(numeric_only=True).drop(columns=["seed", "step"])
    write_table(times.reset_index(), results / "timing.csv")
    write_json(provenance(), results / "provenance.json")
