"""The theory study end to end on tiny settings: it repeats itself, its summary is of its files, its figures draw."""

import json

import numpy as np
import pytest
import torch

from cmdp import theory, theory_figures
from cmdp.tabular import budgeted_values, outcome
from cmdp.tabular_learners import STRENGTH

TINY = {
    "seed": 0,
    "tree": {"vocab": 3, "depth": 3, "sharpness": 1.0, "success": 0.3},
    "budgets": [0.1, 0.3],
    "grid": {"levels": 15, "power": 2},
    "soft_lambdas": [0.02, 20.0, 30],
    "frontier": {"limit": 0.6, "points": 5},
    "refinement": {"trees": 2, "levels": [6, 11]},
    "timing": [[2, 3, 11]],
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
        "resamples": 50,
        "variants": {
            "exact gradient": {"samples": 0, "steps": 8, "start_noise": 1.0},
            "sampled": {"samples": 4, "steps": 8, "start_noise": 1.0},
        },
        "methods": list(STRENGTH),
        "strengths": {"default": [3.0, 30.0], "gkd-grpo": [0.5, 1.0, 2.0, 4.0]},
        "learning_rates": {"1": [0.02, 0.05, 0.1, 0.3], "2": [0.05, 0.2], "4": [0.1]},
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("theory")
    theory.run(TINY, folder)
    yield folder
    torch.set_num_threads(threads)


def test_the_same_parameters_give_the_same_bytes(results, tmp_path):
    theory.run(TINY, tmp_path)
    names = sorted(path.name for path in results.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir()) and len(names) > 10
    for name in names:
        if name != "timing.csv":  # seconds are no function of the seed
            assert (results / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_another_seed_gives_other_trees(results):
    trees = [theory.test_trees(TINY | {"seed": seed}).teacher for seed in (0, 1)]
    assert not torch.allclose(*trees)
    streams = [theory.make_trees(TINY, 2, stream).teacher for stream in (1, 2)]
    assert not torch.allclose(*streams)


def test_every_file_carries_its_parameters(results):
    for path in results.glob("*.csv"):
        with path.open() as file:
            assert json.loads(file.readline().removeprefix("# ")) == TINY
    assert json.loads((results / "summary.json").read_text())["parameters"] == TINY


def test_every_method_has_as_many_trials():
    counts = {method: len(theory.trials(TINY, method)) for method in STRENGTH}
    assert set(counts.values()) == {4}


def test_the_choice_keeps_the_rule(results):
    tuning = theory.read(results / "tuning.csv")
    for _, part in tuning.groupby(["variant", "method", "budget"]):
        (chosen,) = part[part["chosen"]].itertuples()
        kept = part[part["violation"] <= 0.01]
        if len(kept):
            assert chosen.violation <= 0.01 and chosen.reward == kept["reward"].max()
        else:
            assert chosen.violation == part["violation"].min()
    judged = theory.read(results / "learners.csv")  # and the test trees are trained with the choice
    pairs = ["variant", "method", "budget", "strength", "learning_rate"]
    assert len(judged[pairs].drop_duplicates().merge(tuning[tuning["chosen"]], on=pairs)) == 2 * len(STRENGTH) * 2


def test_no_soft_optimum_that_never_violates_beats_the_budgeted_one(results):
    optimum = theory.read(results / "optimum.csv")
    assert (optimum["soft_never"] <= optimum["upper"] + 1e-9).all()
    assert (optimum["teacher"] <= optimum["lower"] + 1e-9).all() and (optimum["lower"] <= optimum["upper"]).all()
    assert (optimum["soft_never"] <= optimum["soft_rarely"]).all()


def test_a_learner_that_keeps_the_budget_does_not_beat_the_optimum(results):
    both = theory.read(results / "learners.csv").merge(theory.read(results / "optimum.csv"), on=["tree", "budget"])
    kept = both[both["violation"] == 0]
    assert len(kept) > 10 and (kept["reward"] <= kept["upper"] + 1e-9).all()


def test_the_table_is_the_mean_of_the_files(results):
    table = theory.learners_table(results, 20, 0)
    row = table[(table["method"] == "cmdp") & (table["variant"] == "sampled") & (table["budget"] == 0.3)].iloc[0]
    judged, optimum = theory.read(results / "learners.csv"), theory.read(results / "optimum.csv")
    part = judged[(judged["method"] == "cmdp") & (judged["variant"] == "sampled") & (judged["budget"] == 0.3)]
    best = optimum[optimum["budget"] == 0.3]["lower"].sum()
    assert row["of_optimum"] == pytest.approx(part["reward"].sum() / best)
    assert row["csr"] == pytest.approx(1 - part["violation"].mean())
    assert row["csr_low"] <= row["csr"] <= row["csr_high"]


def test_best_soft_is_best_among_the_admissible():
    trees = theory.test_trees(TINY)
    few, many = (theory.best_soft(trees, 0.3, np.geomspace(0.02, 20, count)) for count in (4, 40))
    upper = budgeted_values(trees, theory.budget_grid(TINY, 0.3), "upper")[:, 0, -1]
    assert (many["soft_never"] <= upper).all() and (many["soft_never_violation"] == 0).all()
    assert (many["soft_rarely_violation"] <= 0.05).all()
    assert many["soft_never"].sum() >= few["soft_never"].sum() - 0.05
    teacher = outcome(trees, trees.teacher, theory.constant(0.3, 4))["reward"].numpy()
    none = theory.best_soft(trees, 1e-9, np.array([0.02]))  # where no lambda is admissible the teacher still is
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
    assert found["optimum"]["policy_minus_value"] < 1e-7 and found["optimum"]["greatest_violation"] == 0


def test_every_figure_is_drawn_and_the_same_twice(results, tmp_path):
    drawn = theory_figures.draw_all(results, tmp_path / "a")
    theory_figures.draw_all(results, tmp_path / "b")
    assert len(drawn) == 7
    for path in drawn:
        assert path.stat().st_size > 5000
        for name in (path.name, path.with_suffix(".svg").name):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
