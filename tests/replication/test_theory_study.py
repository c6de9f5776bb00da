"""The theory study end to end on tiny settings: it repeats itself, its summary is of its files, its figures draw."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cmdp.storage import read_yaml, write_json
from replication import theory
from replication.theory import LEARNERS, OURS, plots, run, tables
from replication.theory.contest import against_optimum, trials
from replication.theory.optimum import best_soft
from replication.theory.trees import budget_grid, budgeted_values, make_trees, outcome

TINY = {
    "seed": 0,
    "tree": {"vocab": 3, "depth": 3, "sharpness": 1.0, "success": 0.3},
    "budgets": [0.1, 0.3],
    "grid": {"levels": 15, "power": 2},
    "soft_lambdas": [0.02, 20.0, 30],
    "frontier": {"limit": 0.6, "points": 5},
    "refinement": {"trees": 2, "levels": [6, 11]},
    "penalty_bound": {
        "trees": 2,
        "points": 9,
        "budget": 0.2,
        "penalties": [0.0, 0.3, 3.0],
        "per_token": 0.1,
        "fine": 2000,
    },
    "augmentation": {"trees": 1, "shape": [2, 2, False], "budget": 0.2, "starts": 2},
    "gradient": {"trees": 6, "budget": 0.3, "step": 1e-6, "lambda": 2.0, "penalty": 0.5},
    "jump": {"budget": 0.2, "soft_lambda": 0.2, "lambda": 1.0, "points": 101},
    "exact_penalty": {"trees": 3, "levels": 15, "lambdas": [0.1, 100.0, 4], "bisections": 4, "tolerance": 1e-5},
    "example": {"shape": [2, 3, False], "budget": 0.2, "stream": 58},
    "learners": {
        "test_trees": 4,
        "tuning_trees": 2,
        "margin": 0.03,
        "bins": 5,
        "allowed": 0.01,
        "variants": {
            "exact gradient": {"samples": 0, "steps": 8, "start_noise": 1.0},
            "sampled": {"samples": 4, "steps": 8, "start_noise": 1.0},
        },
        "methods": list(LEARNERS),
        "strengths": {"default": [3.0, 30.0], "gkd-grpo": [0.5, 1.0, 2.0, 4.0]},
        "learning_rates": {"1": [0.02, 0.05, 0.1, 0.3], "2": [0.05, 0.2], "4": [0.1]},
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("theory")
    run(TINY, folder)
    yield folder
    torch.set_num_threads(threads)


def test_the_same_parameters_give_the_same_bytes(results, tmp_path):
    run(TINY, tmp_path)
    names = sorted(path.name for path in results.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert len(names) > 10
    for name in names:
        assert (results / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_stage_runs_the_study_with_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "RESULTS", tmp_path)
    monkeypatch.setattr(theory, "run", lambda parameters, folder: write_json(parameters, folder / "summary.json"))
    (tmp_path / "theory").mkdir()
    (tmp_path / "theory" / "stale.csv").touch()
    theory.write()
    (written,) = (tmp_path / "theory").iterdir()  # the folder is replaced as a whole
    settings = json.loads(written.read_text())
    assert settings == read_yaml(Path(theory.__file__).with_name("params.yaml"))
    assert set(settings) == set(TINY)


def test_another_seed_gives_other_trees(results):
    trees = [make_trees(TINY | {"seed": seed}).teacher for seed in (0, 1)]
    assert not torch.allclose(*trees)
    streams = [make_trees(TINY, 2, stream).teacher for stream in (1, 2)]
    assert not torch.allclose(*streams)


def test_the_summary_carries_the_parameters(results):
    assert json.loads((results / "summary.json").read_text())["parameters"] == TINY


def test_every_method_has_as_many_trials():
    counts = {method: len(trials(TINY, method)) for method in LEARNERS}
    assert set(counts.values()) == {4}


def test_the_choice_keeps_the_rule(results):
    tuning = pd.read_csv(results / "tuning.csv")
    for _, part in tuning.groupby(["variant", "method", "budget"]):
        (chosen,) = part[part["chosen"]].itertuples()
        kept = part[part["violation"] <= 0.01]
        if len(kept):
            assert chosen.violation <= 0.01
            assert chosen.reward == kept["reward"].max()
        else:
            assert chosen.violation == part["violation"].min()
    judged = pd.read_csv(results / "learners.csv")  # and the test trees are trained with the choice
    pairs = ["variant", "method", "budget", "strength", "learning_rate"]
    assert len(judged[pairs].drop_duplicates().merge(tuning[tuning["chosen"]], on=pairs)) == 2 * len(LEARNERS) * 2


def test_no_soft_optimum_that_never_violates_beats_the_budgeted_one(results):
    optimum = pd.read_csv(results / "optimum.csv")
    assert (optimum["soft_never"] <= optimum["upper"] + 1e-9).all()
    assert (optimum["teacher"] <= optimum["lower"] + 1e-9).all()
    assert (optimum["lower"] <= optimum["upper"]).all()
    assert (optimum["soft_never"] <= optimum["soft_rarely"]).all()


def test_a_learner_that_keeps_the_budget_does_not_beat_the_optimum(results):
    both = pd.read_csv(results / "learners.csv").merge(pd.read_csv(results / "optimum.csv"), on=["tree", "budget"])
    kept = both[both["violation"] == 0]
    assert len(kept) > 10
    assert (kept["reward"] <= kept["upper"] + 1e-9).all()


def test_the_table_is_the_mean_of_the_files(results):
    judged, optimum = pd.read_csv(results / "learners.csv"), pd.read_csv(results / "optimum.csv")
    table = against_optimum(optimum, judged, TINY["seed"])
    written = pd.read_csv(results / "against_optimum.csv")
    np.testing.assert_allclose(written["of_optimum"], table["of_optimum"], rtol=1e-5)
    row = table[(table["method"] == "cmdp") & (table["variant"] == "sampled") & (table["budget"] == 0.3)].iloc[0]
    part = judged[(judged["method"] == "cmdp") & (judged["variant"] == "sampled") & (judged["budget"] == 0.3)]
    best = optimum[optimum["budget"] == 0.3]["lower"].sum()
    assert row["of_optimum"] == pytest.approx(part["reward"].sum() / best)
    assert row["csr"] == pytest.approx(1 - part["violation"].mean())
    assert row["csr_low"] <= row["csr"] <= row["csr_high"]


def test_best_soft_is_best_among_the_admissible():
    trees = make_trees(TINY)
    few, many = (best_soft(trees, 0.3, np.geomspace(0.02, 20, count)) for count in (4, 40))
    upper = budgeted_values(trees, budget_grid(TINY, 0.3), "upper")[:, 0, -1]
    assert (many["soft_never"] <= upper).all()
    assert (many["soft_never_violation"] == 0).all()
    assert (many["soft_rarely_violation"] <= 0.05).all()
    assert many["soft_never"].sum() >= few["soft_never"].sum() - 0.05
    teacher = outcome(trees, trees.teacher, 0.3)["reward"].numpy()
    none = best_soft(trees, 1e-9, np.array([0.02]))  # where no lambda is admissible the teacher still is
    np.testing.assert_allclose(none["soft_never"], teacher)


def test_the_summary_tells_what_the_guarantees_say(results):
    found = json.loads((results / "summary.json").read_text())["results"]
    assert found["penalty_bound"]["any policy"]["greatest_p_at_positive_n"] == 0
    assert all(case["greatest_p_over_bound"] <= 1 + 1e-9 for case in found["penalty_bound"].values())
    assert found["penalty_bound"]["per token"]["greatest_p_at_positive_n"] > 0.1
    assert max(found["gradient"]["greatest_relative_error"].values()) < 1e-4
    assert found["jump"]["exhausted"]["greatest"] > found["jump"]["overshoot"]["greatest"] > 1e-3
    assert found["jump"]["hinge"]["greatest"] < 1e-9
    assert all(form["greatest_error"] < 1e-9 for form in found["jump"].values())
    assert found["optimum"]["policy_error"] < 1e-9
    assert found["optimum"]["greatest_violation"] == 0


def test_every_figure_is_drawn_and_the_same_twice(results, tmp_path):
    for folder in ("a", "b"):
        plots.draw_all(results, tmp_path / folder)
    drawn = sorted((tmp_path / "a").iterdir())
    assert len(drawn) == 2 * 7
    for path in drawn:
        assert path.stat().st_size > 5000
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_figures_draw_the_numbers_of_the_files(results):
    """No value is clipped to a floor, and no learner is moved above the optimum at its own budget."""
    gains = pd.read_csv(results / "exact_penalty_gain.csv").groupby(["budget", "lambda"])["gain"].mean()
    lines = plots.exact_penalty(results).axes[0].lines
    drawn = np.concatenate([line.get_ydata() for line in lines])
    np.testing.assert_allclose(np.sort(drawn), np.sort(gains[gains > 1e-9]))
    against = pd.read_csv(results / "against_optimum.csv").query("variant == 'sampled' and budget != 'all'")
    best = pd.read_csv(results / "optimum.csv").groupby("budget")["lower"].mean()
    points = np.concatenate([line.get_xydata() for line in plots.frontier(results).axes[0].lines[4:]])
    assert len(points) == len(against)
    expected = against["of_optimum"] * against["budget"].astype(float).map(best)
    np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(expected))
    distance = points[:, :1] - best.index.to_numpy()  # right of its own budget
    assert ((distance > -1e-9) & (distance < 0.054)).any(1).all()


def test_the_notebook_s_tables_are_of_the_files(results):
    of_files = tables.bracket, tables.augmentation, tables.first_cost
    for table in (*of_files, tables.gain_over_soft, tables.prices):
        assert not table(results).isna().any(axis=None)
    for part, rows in (("penalty_bound", 3), ("gradient", 1), ("jump", 3), ("optimum", 1), ("exact_penalty", 1)):
        assert len(tables.numbers(results, part)) == rows
    shares = pd.read_csv(results / "optimum.csv")["soft_on_average_violation"]
    assert tables.numbers(results, "mean_is_not_enough")["median"].item() == f"{shares.median():.3g}"
    learners = tables.learners(results)
    assert set(learners.index[learners["gain in CSR (points)"] != ""]) == {"cmdp", "worst-case", *OURS}
    row = pd.read_csv(results / "against_optimum.csv").query("method == 'grpo' and variant == 'sampled'").iloc[0]
    assert row["budget"] == "all"
    expected = "{:.1f} [{:.1f}, {:.1f}]".format(*100 * row[["csr", "csr_low", "csr_high"]])
    assert learners["CSR (%)"]["grpo"] == expected


def test_names_tables_and_figures_need_no_torch():
    modules = "replication.theory.plots, replication.theory.tables, replication.readme"
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
