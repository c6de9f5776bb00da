"""Figures come from results files alone, all of them, and the same files give the same figures."""

import numpy as np
import pandas as pd
import pytest

from cmdp.statistics import summarise
from cmdp.storage import write_table
from replication import plots as figures

RUNS = ("sft", "grpo", "gkd-grpo-weak", "cmdp-hinge")
PARAMS = {"methods": RUNS, "seeds": [0, 1], "budget": {"budget": 1.0}}


@pytest.fixture
def results(tmp_path):
    rng = np.random.default_rng(0)
    tables = []
    for run in RUNS:
        for seed in (0, 1):
            size = 24
            table = pd.DataFrame({"run": run, "seed": seed, "prompt": np.arange(size) % 6}).assign(
                decoding=np.where(np.arange(size) < 18, "sampled", "greedy"),
                correct=rng.integers(0, 2, size),
                valid=rng.integers(0, 2, size),
                tokens=rng.integers(1, 9, size),
                truncated=0,
                entropy=rng.random(size),
                cost=rng.exponential(size=size),
                peak=rng.random(size),
            )
            write_table(table, tmp_path / "runs" / run / f"{seed}.csv")
            tables.append(table)
    summarise(pd.concat(tables), 1.0).to_csv(tmp_path / "summary.csv", index=False)
    steps = pd.DataFrame({"step": range(1, 21), "task_reward": 0.5, "csr": 0.9, "cost/mean": 1.5})
    pd.concat([steps.assign(run=run, seed=0) for run in RUNS[1:]]).to_csv(tmp_path / "curves.csv", index=False)
    positions = pd.DataFrame({"position": range(1, 9), "mean": 1.0, "q10": 0.5, "q50": 0.9, "q90": 1.7})
    pd.concat([positions.assign(run=run, seed=0) for run in RUNS]).to_csv(tmp_path / "positions.csv", index=False)
    return tmp_path


def test_every_figure_is_drawn_as_svg_and_png_and_byte_for_byte_again(results, tmp_path):
    for folder in ("once", "again"):
        figures.draw_all(results, tmp_path / folder, PARAMS)
    names = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert names == sorted(
        f"{name}.{kind}"
        for name in ("frontier", "cost_by_position", "cost_distribution", "training")
        for kind in ("svg", "png")
    )
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_runs_of_one_method_share_a_colour_and_methods_do_not():
    colours = {run: figures.style(run)[0] for run in figures.FAMILIES}
    assert len(set(map(tuple, colours.values()))) == len(colours)
    assert len({figures.style(run)[1] for run in figures.FAMILIES}) == len(colours)
    weak, strong = figures.style("gkd-grpo-weak"), figures.style("gkd-grpo-strong")
    assert weak[0] == strong[0] == colours["gkd-grpo"]
    assert weak[1] != strong[1]


def test_the_frontier_stands_where_the_summary_says(results):
    summary = pd.read_csv(results / "summary.csv")
    axes = figures.frontier(summary, 1.0).axes[0]
    table = summary.set_index(["run", "measure"])["mean"]
    points = {bars.get_label(): bars.lines[0].get_xydata()[0] for bars in axes.containers}
    for run in RUNS:
        assert points[run] == pytest.approx([100 * table[run, "csr"], 100 * table[run, "accuracy"]])
