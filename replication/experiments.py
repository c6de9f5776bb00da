"""The table of runs (experiments.yaml), the settings they share (params.yaml), and the completions they left.

Imports no torch: tables, claims, figures and README are made from results files alone.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml
from omegaconf import OmegaConf

from cmdp.storage import check_names, read, read_yaml, write_text

EXPERIMENTS, PARAMS = Path("experiments.yaml"), Path("params.yaml")
RESULTS, FIGURES = Path("results"), Path("figures")
START, CHOSEN = RESULTS / "start", RESULTS / "chosen.yaml"
TUNING = ("seeds", "samples", "trials", "further", "ladder", "csr", "start", "entries")
# What a run of the study keeps of each completion; a default run keeps every column of `evaluation`.
COLUMNS = ["seed", "prompt", "decoding", "correct", "valid", "tokens", "entropy", "cost", "peak"]


@dataclass(frozen=True)
class Row:
    """One run: a method with settings of its own, from one start, over some seeds."""

    key: str
    method: str
    seeds: list[int]
    part: str = "study"
    family: str = "method"
    start: str = "student"
    name: str = ""  # runs of one name are pooled over seeds; the key unless given
    tuned: str = ""  # the entry of results/chosen.yaml it starts from; the name unless given
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        check_names(self.key, self.part, self.start)

    def folder(self, root: Path = RESULTS / "runs") -> Path:
        """Where its results lie."""
        return root / self.part / self.key


def sections(path: Path, *names: str) -> list[dict]:
    """Sections of a YAML file. Raises `ValueError` for one that it has not."""
    content = read_yaml(path)
    if missing := [name for name in names if not isinstance(content.get(name), dict)]:
        raise ValueError(f"{path} has no section {missing[0]!r}. It has: {', '.join(map(str, content))}.")
    return [content[name] for name in names]


def tuning(path: Path = EXPERIMENTS) -> dict:
    """The section `tuning`. Raises `ValueError` if it lacks one of `TUNING`."""
    (found,) = sections(path, "tuning")
    if missing := [name for name in TUNING if name not in found]:
        raise ValueError(f"{path}: tuning has no {missing[0]}.")
    return found


def rows(path: Path = EXPERIMENTS, part: str | None = None) -> dict[str, Row]:
    """The runs by key, of one `part` or all. Raises `ValueError` for an unknown field, or a name's seed given twice."""
    found, seen = {}, {}
    for key, fields in sections(path, "runs")[0].items():
        if not isinstance(fields, dict) or not {"method", "seeds"} <= set(fields):
            raise ValueError(f"{path}: run {key} needs a method and seeds.")
        if unknown := sorted(set(fields) - set(Row.__dataclass_fields__)):
            raise ValueError(f"{path}: run {key} has unknown fields {unknown}: use {sorted(Row.__dataclass_fields__)}.")
        name = fields.get("name", key)
        found[key] = Row(**fields | {"key": key, "name": name, "tuned": fields.get("tuned", name)})
        for seed in found[key].seeds:
            if (other := seen.setdefault((name, seed), key)) != key:
                raise ValueError(f"{path}: runs {other} and {key} both train {name} with seed {seed}.")
    return {key: row for key, row in found.items() if part in (None, row.part)}


def row(key: str, path: Path = EXPERIMENTS) -> Row:
    """The run `key`. Raises `ValueError` if the table has none."""
    table = rows(path)
    if key not in table:
        raise ValueError(f"{path} has no run {key!r}. It has: {', '.join(table)}.")
    return table[key]


def gather(table: str, runs: dict[str, Row], root: Path = RESULTS / "runs") -> pd.DataFrame:
    """One table of all `runs`, their names as column `run`. Raises `FileNotFoundError` if a run has not been made."""
    tables = []
    for row in runs.values():
        path = row.folder(root) / f"{table}.csv"
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}: run `dvc repro run@{row.key}` first.")
        tables.append(read(path, keep_default_na=table != "completions").assign(run=row.name))
    gathered = pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)
    return gathered[["run", *gathered.columns.drop("run")]]


def print_keys(part: str) -> None:
    """Print the runs of a part, or the entries of `tuning`, as a pattern, "sft|grpo|...", for parallel.sh and xargs."""
    print("|".join(tuning()["entries"] if part == "tuning" else rows(part=part)))


def shrink(folder: str) -> None:
    """Lay profiles/smoke.yaml over the parameter files under `folder`; keep the runs it names, with one seed."""
    smoke = OmegaConf.load("profiles/smoke.yaml")
    for name, change in smoke.files.items():
        path = Path(folder, name)
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), change))
        if "runs" in merged:
            merged["runs"] = {key: merged["runs"][key] | {"seeds": [0]} for key in smoke.keep}
        write_text(yaml.safe_dump(merged, sort_keys=False), path)
