"""Figures and notebooks of the study: from its tables alone, arms that were not run left out, the same files again."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from cmdp.figures import FAMILIES
from cmdp.study import figures

ROOT = Path(__file__).parents[1]
ARMS = yaml.safe_load((ROOT / "study" / "params.yaml").read_text())["arms"]
DRAWN = ("frontier", "paired", "sensitivity", "ablations", "capacity", "violation", "drift")
METHODS = [arm for arm, settings in ARMS.items() if settings["family"] == "method"]
AWARE = ("cmdp", "cmdp-overshoot", "cmdp-hinge", "cmdp-adaptive", "dual", "saute-constant", "worst-case")
SWEPT = ("cmdp", "cmdp-hinge", "cmdp-adaptive")  # trained for other budgets, too
MEASURES = (
    *("accuracy", "csr", "accuracy_within", "validity", "cost", "kl_per_token", "entropy", "tokens", "lucky"),
    *("calibration_error", "diversity", "style_distance", "longer_accuracy", "longer_csr", "longer_validity"),
)


@pytest.fixture
def results(tmp_path):
    write_tables(tmp_path / "results" / "study")
    return tmp_path / "results" / "study"


def write_tables(folder: Path) -> None:
    """Tables of every arm of study/params.yaml, with made-up numbers."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)

    def spread(*names: str) -> dict:
        value, width = rng.uniform(0.6, 0.95), rng.uniform(0.01, 0.04)
        return dict(zip(names, (value, value - width, value + width), strict=True))

    def write(name: str, rows: list[dict]) -> None:
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)

    common = {"seeds": 2}
    summary = []
    for arm, settings in ARMS.items():
        keys = {"arm": arm, "family": settings["family"], "run": settings["run"], "start": settings["start"]}
        for measure in MEASURES:
            values = spread("mean", "low", "high")
            if measure in ("cost", "kl_per_token"):
                values = {name: 4 * (value - 0.55) for name, value in values.items()}
            summary.append({**keys, "budget": 2.0, "measure": measure, **values, **common})
    write("summary", summary)
    frontier = []
    for budget in (1, 2, 4):
        for method in METHODS:
            if method == "teacher" or (budget != 2 and method in AWARE and method not in SWEPT):
                continue
            shares = {**spread("csr", "csr_low", "csr_high"), **spread("within", "within_low", "within_high")}
            accuracy = spread("accuracy", "accuracy_low", "accuracy_high")
            trained_at = budget if method in AWARE else None
            frontier.append({"method": method, "budget": budget, "trained_at": trained_at, **accuracy, **shares})
    write("frontier", frontier)
    rivals = ("gkd-grpo-strong", "grpo", "gkd")
    pairs = [(arm, rival) for rival in rivals for arm in METHODS if arm not in (rival, "teacher")]
    paired = []
    for arm, rival in pairs:
        for measure in MEASURES[:4]:
            values = {name: (value - 0.75) / 4 for name, value in spread("difference", "low", "high").items()}
            paired.append({"arm": arm, "rival": rival, "measure": measure, **values, **common})
    write("paired", paired)
    write(
        "wins", [{"arm": a, "rival": b, **spread("win_rate", "low", "high"), "ties": 0.8, **common} for a, b in pairs]
    )
    strength = []
    for method in ("gkd-grpo", "cmdp", "cmdp-hinge"):
        for lam in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
            for measure in MEASURES[:3]:
                near = int(0.1 <= lam <= 0.3)
                row = {"method": method, "lam": lam, "measure": measure, **spread("mean", "low", "high")}
                strength.append({**row, **common, "near_best": near})
    write("strength", strength)
    edges = [0, 0.5, 1, 1.5, 2, np.inf]
    violation = []
    for method in METHODS:
        for low, high in itertools.pairwise(edges):
            values = {name: rng.random() for name in ("accuracy", "validity", "confidence", "entropy")}
            label = f"{low:g} to {high:g}" if high < np.inf else f"over {low:g}"
            violation.append({"method": method, "bin": label, "low": low, "high": high, "count": 100, **values})
    write("violation", violation)
    verdict = {"published": "+12.3 points", "verdict": "inconclusive", "evidence": "so [a, b]", "conditions": "small"}
    write("claims", [{"id": f"C{number}", "claim": "higher CSR", **verdict} for number in range(1, 10)])
    write("timing", [{"arm": arm, **spread("seconds", "low", "high"), "ratio_to_gkd_grpo": 1.1} for arm in METHODS])


def drop(results: Path, name: str, keep) -> None:
    table = pd.read_csv(results / f"{name}.csv")
    table[keep(table)].to_csv(results / f"{name}.csv", index=False)


def labelled(axes) -> dict:
    """The points of each run that a panel shows: (n, 2)."""
    return {bars.get_label(): bars.lines[0].get_xydata() for bars in axes.containers}


def test_every_figure_is_drawn_as_svg_and_png_and_byte_for_byte_again(results, tmp_path):
    for folder in ("once", "again"):
        figures.draw_all(results, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert names == sorted(f"{name}.{kind}" for name in DRAWN for kind in ("svg", "png"))
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
