"""The study's tables say what its completions say, and its verdicts follow from the intervals."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from cmdp.storage import write_table
from replication import claims, tables
from replication import run as arms
from replication.run import COLUMNS

ROOT = Path(__file__).parents[1]
SETTINGS = {"comparisons": 11, "tolerance": 0.02, "alike": 0.05, "target": 0.95, "near": 0.05}
THEORY = {"penalty_bound": {"any policy": {"greatest_p_over_bound": 0.9}}}
STEPS = np.array([2, 3] * 30)  # of each of the prompts below
NAMES = ("sft", "cmdp", "cmdp-adaptive", *claims.BASELINES)


def completions(**rates: dict) -> pd.DataFrame:
    """Four samples of 60 prompts (and two of 20 longer ones) by four seeds for every arm of `NAMES`; `rates` sets an
    arm's shares of right and valid answers (`complex`: of right ones to problems of three steps), and its mean cost."""
    draw, parts = np.random.default_rng(0), []
    for name in NAMES:
        rate = {"right": 0.7, "valid": 0.7, "cost": 1.0} | rates.get(name.replace("-", "_"), {})
        for split, prompts, samples in (("test", 60, 4), ("longer", 20, 2)):
            grid = pd.DataFrame(
                itertools.product(range(4), range(prompts), range(samples)), columns=["seed", "prompt", 0]
            )
            count = len(grid)
            complex_too = rate.get("complex", rate["right"])
            right = np.where(STEPS[grid["prompt"]] == 3, complex_too, rate["right"]) if split == "test" else 0.1
            table = grid.drop(columns=0).assign(
                arm=name,
                split=split,
                correct=(draw.random(count) < right).astype(int),
                valid=(draw.random(count) < rate["valid"]).astype(int),
                tokens=20,
                entropy=0.3,
                cost=draw.exponential(rate["cost"], count),
                peak=0.5,
                confidence=0.75,
                style=draw.choice(["so= on", "= gives"], count),
            )
            parts.append(table)
    return pd.concat(parts, ignore_index=True)[["arm", *COLUMNS]]


def times() -> pd.DataFrame:
    rows = [(name, seed, 100, 50.0 + seed, 1000) for name in NAMES for seed in (3, 4)]
    return pd.DataFrame(rows, columns=["arm", "seed", "steps", "seconds", "parameters"])


def strengths(**near: int) -> pd.DataFrame:
    """Of three lambdas each, the middle one is best, and the others are near it or, for the methods named, not."""
    rows = [
        (method, lam, "accuracy_within", mean, 0.4, 0.6, 1, int(lam == 1.0 or near.get(method.replace("-", "_"), 1)))
        for method in ("cmdp", "cmdp-hinge", "gkd-grpo")
        for lam, mean in ((0.1, 0.49), (1.0, 0.5), (10.0, 0.49))
    ]
    return pd.DataFrame(rows, columns=["method", "lam", "measure", "mean", "low", "high", "seeds", "near_best"])


def trials() -> pd.DataFrame:
    """Of two learning rates each, the lower is chosen; minillm has most right answers on validation prompts."""
    rows = [
        (name, 1.0, rate, (0.8 if name == "minillm" else 0.7) - rate, 0.6 - rate, int(rate == 0.001))
        for name in NAMES
        for rate in (0.001, 0.002)
    ]
    return pd.DataFrame(rows, columns=["run", "lam", "learning_rate", "accuracy", "accuracy_within", "chosen"])


def benchmark(ratio: float = 1.0) -> pd.DataFrame:
    rows = [(f"cmdp / {name}", ratio, ratio - 0.02, ratio + 0.02, 15) for name in ("gkd-grpo", "dual", "trl-grpo")]
    return pd.DataFrame(rows, columns=["trainer", "median", "low", "high", "repeats"])


def judged(
    table: pd.DataFrame, theory=THEORY, ratio=1.0, seeds=5, settings=SETTINGS, sweeps=None, **near: int
) -> pd.DataFrame:
    sweeps = strengths(**near) if sweeps is None else sweeps
    tables = times(), sweeps.assign(seeds=seeds), trials(), benchmark(ratio)
    names = "gkd-grpo-strong", "cmdp-adaptive"
    return claims.claims(table, *tables, theory, STEPS, *names, 2.0, settings).set_index("id")


def verdicts(table: pd.DataFrame, **given) -> pd.Series:
    return judged(table, **given)["verdict"]


# ---- tables ----


def test_the_runs_of_the_default_experiment_and_the_arms_make_one_table(tmp_path):
    own = completions()
    for folder, split in (("runs", "test"), ("longer", "longer")):
        for seed in (0, 1):
            part = own[(own["arm"] == "cmdp") & (own["split"] == split) & (own["seed"] == seed)]
            part = part.rename(columns={"arm": "run"}).drop(columns="split").assign(decoding="sampled")
            greedy = part.head(3).assign(decoding="greedy")
            write_table(pd.concat([part, greedy]), tmp_path / folder / "cmdp" / f"{seed}.csv")
        shutil.copy(tmp_path / folder / "cmdp" / "1.csv", tmp_path / folder / "cmdp" / "7.csv")  # of an earlier run
    (tmp_path / "study" / "arms").mkdir(parents=True)
    more = own[(own["arm"] == "cmdp") & (own["seed"] >= 2)]
    more.drop(columns="arm").to_csv(tmp_path / "study" / "arms" / "cmdp.csv", index=False)
    params = {"methods": ["cmdp"], "seeds": [0, 1]}
    table = arms.read(tmp_path, params, {"cmdp": {"seeds": [2, 3]}, "absent": {"seeds": [0]}})
    key = ["split", "seed", "prompt", "cost"]
    expected = own[own["arm"] == "cmdp"].sort_values(key, ignore_index=True)
    pd.testing.assert_frame_equal(
        table.sort_values(key, ignore_index=True), expected, check_dtype=False, check_column_type=False
    )
    with pytest.raises(ValueError, match=r"seeds \[1\] of cmdp: give the study's arm others"):
        arms.read(tmp_path, params, {"cmdp": {"seeds": [1, 2]}})


def test_nothing_to_read_is_said_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*cmdp/0.csv: train and evaluate .*make repro"):
        arms.read(tmp_path, {"methods": ["cmdp"], "seeds": [0]}, {})


def test_summary_has_each_mean_and_measures_satisfaction_at_the_budget_that_was_asked_for():
    table = completions()
    about = {"cmdp": {"family": "budget", "run": "cmdp", "start": "student", "set": {"budget": 0.5}}}
    found = tables.summary(table, about, 2.0).set_index(["arm", "measure"])
    test = table[(table["arm"] == "cmdp") & (table["split"] == "test")]
    assert found.loc[("cmdp", "accuracy"), "mean"] == pytest.approx(test["correct"].mean())
    assert found.loc[("cmdp", "csr"), "mean"] == pytest.approx((test["cost"] <= 0.5).mean())
    assert found.loc[("cmdp", "csr"), "budget"] == 0.5
    grpo = table[(table["arm"] == "grpo") & (table["split"] == "test")]
    assert found.loc[("grpo", "csr"), "mean"] == pytest.approx((grpo["cost"] <= 2.0).mean())
    assert found.loc[("grpo", "lucky"), "mean"] == pytest.approx((grpo["correct"] * (1 - grpo["valid"])).mean())
    longer = table[(table["arm"] == "grpo") & (table["split"] == "longer")]
    assert found.loc[("grpo", "longer_accuracy"), "mean"] == pytest.approx(longer["correct"].mean())
    assert ((found["low"] <= found["mean"] + 1e-12) & (found["mean"] <= found["high"] + 1e-12)).mean() > 0.95


def test_methods_that_know_no_budget_stand_at_every_budget_and_others_at_their_own():
    about = {
        name: {"family": "method", "run": name, "start": "student"} for name in NAMES if name != "cmdp-adaptive"
    } | {"cmdp-adaptive": {"family": "budget", "run": "cmdp-adaptive", "start": "student", "set": {"budget": 1.0}}}
    found = tables.frontier(completions(), about, 2.0)
    assert set(found[found["method"] == "grpo"]["budget"]) == {1.0, 2.0}
    assert found[found["method"] == "grpo"]["trained_at"].isna().all()
    assert list(found[found["method"] == "cmdp"]["trained_at"]) == [2.0]
    assert list(found[found["method"] == "cmdp-adaptive"]["trained_at"]) == [1.0]
    grpo = found[found["method"] == "grpo"].set_index("budget")
    assert grpo.loc[1.0, "csr"] < grpo.loc[2.0, "csr"]
    assert (grpo["within"] <= grpo[["accuracy", "csr"]].min(axis=1)).all()


def test_differences_are_paired_over_the_seeds_that_both_have():
    table = completions()
    ours = table[(table["arm"] == "cmdp") & (table["split"] == "test")]
    mean, low, high, seeds = tables.difference(ours[ours["seed"] < 3], ours[ours["seed"] > 0], "correct")
    assert (mean, low, high, seeds) == (0.0, 0.0, 0.0, 2)  # the same completions: no difference, and none in any draw
    shifted = ours.assign(correct=ours["correct"] - 0.25)
    assert tables.difference(ours, shifted, "correct")[:3] == pytest.approx((0.25, 0.25, 0.25))


def test_a_valid_derivation_wins_and_two_alike_tie():
    table = completions(cmdp={"valid": 1.0}, grpo={"valid": 0.0}, gkd={"valid": 1.0})
    found = tables.wins(table, ["grpo", "gkd"], ["cmdp"]).set_index("rival")
    assert tuple(found.loc["grpo", ["win_rate", "ties"]]) == (1.0, 0.0)
    assert tuple(found.loc["gkd", ["win_rate", "ties"]]) == (0.5, 1.0)


def test_calibration_error_is_the_gap_between_confidence_and_truth():
    table = pd.DataFrame({"confidence": [0.95, 0.95, 0.55, 0.55], "correct": [1, 1, 0, 1]})
    assert tables.calibration_error(table, np.ones(4)) == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)
    assert tables.calibration_error(table.assign(correct=0), np.ones(4)) == pytest.approx(0.75)
    assert tables.calibration_error(table, np.array([0.0, 0, 1, 0])) == pytest.approx(0.55)


def test_style_is_as_far_from_the_teachers_as_the_shares_of_its_phrasings():
    table = pd.DataFrame({"style": ["so= on", "on on", ""]})
    counts = tables.phrasings(table, ["on", "so="])
    assert counts.tolist() == [[1, 1], [2, 0], [0, 0]]
    assert tables.total_variation(counts[0], counts[1]) == pytest.approx(0.5)
    assert tables.total_variation(counts[0], counts[0]) == 0.0


def test_strength_marks_what_is_near_the_methods_best():
    rows = [("low", "cmdp", 0.90), ("cmdp", "cmdp", 0.97), ("high", "cmdp", 1.0), ("soft", "gkd-grpo-weak", 0.5)]
    summary = pd.DataFrame(
        [(arm, run, "accuracy_within", mean, mean, mean, 1) for arm, run, mean in rows],
        columns=["arm", "run", "measure", "mean", "low", "high", "seeds"],
    )
    about = {
        name: {"family": "strength", "run": "cmdp", "set": {"lam": lam}} for name, lam in (("low", 0.1), ("high", 3))
    }
    about |= {"cmdp": {"family": "method", "run": "cmdp"}, "soft": {"family": "method", "run": "gkd-grpo-weak"}}
    tuned = {"cmdp": {"lam": 1.0}, "gkd-grpo-weak": {"lam": 0.01}}
    found = tables.strength(summary, about, tuned, near=0.05)
    assert dict(zip(found["lam"], found["near_best"], strict=True)) == {0.1: 0, 1.0: 1, 3.0: 1, 0.01: 1}


def test_ranges_say_which_trials_of_a_method_are_near_its_best():
    rows = [
        ("gkd-grpo-weak", 0.01, 1e-4, 0.5),
        ("gkd-grpo-medium", 0.1, 1e-3, 0.77),
        ("gkd-grpo-strong", 1.0, 2e-3, 0.8),
    ]
    rows += [("gkd", None, 1e-3, 0.9), ("gkd", None, 2e-3, 0.7)]
    found = tables.ranges(pd.DataFrame(rows, columns=["run", "lam", "learning_rate", "accuracy_within"]), near=0.05)
    assert found.drop(columns="parameter").to_dict("split")["data"] == [
        ["gkd-grpo", 2e-3, 1e-3, 2e-3, 1e-4, 2e-3, 2, 3],
        ["gkd-grpo", 1.0, 0.1, 1.0, 0.01, 1.0, 2, 3],
        ["gkd", 1e-3, 1e-3, 1e-3, 1e-3, 2e-3, 1, 2],
    ]
    assert list(found["parameter"]) == ["learning_rate", "lam", "learning_rate"]


def test_every_completion_is_in_one_bin_of_the_budget():
    table = completions()
    found = tables.violation(table, ["cmdp", "grpo"], 2.0)
    assert found.groupby("method")["count"].sum().tolist() == [960, 960]
    within = found[(found["method"] == "cmdp") & (found["high"] <= 1)]["count"].sum()
    test = table[(table["arm"] == "cmdp") & (table["split"] == "test")]
    assert within == (test["cost"] <= 2.0).sum()


def test_step_times_are_set_against_the_soft_lagrangians():
    found = tables.timing(times()).set_index("arm")
    assert found.loc["cmdp", ["seconds", "low", "high", "ratio_to_gkd_grpo"]].tolist() == [0.535, 0.53, 0.54, 1.0]
    resumed = times().assign(**{"time/generation": 0.2, "time/update": 0.1})  # phases say it also of an interrupted run
    resumed.loc[resumed["arm"] == "cmdp", "seconds"] = 0.5
    resumed.loc[resumed["arm"] == "grpo", ["time/generation", "time/update"]] = np.nan  # as of TRL's own trainers
    found = tables.timing(resumed).set_index("arm")["seconds"]
    assert (found["cmdp"], found["grpo"]) == pytest.approx((0.3, 0.535))


# ---- verdicts ----


def test_a_clear_gain_is_replicated():
    table = completions(
        cmdp={"right": 1.0, "complex": 0.7, "valid": 0.97, "cost": 0.2},
        gkd_grpo_strong={"right": 0.7, "complex": 0.75},
        **{"minillm": {"cost": 0.2}, "sft": {"right": 0.3}},
    )
    found = verdicts(table)
    assert dict(found) == {
        "C1": "replicated",
        "C2": "replicated",
        "C3": "replicated",
        "C4": "not tested at this scale",
        "C5": "replicated",
        "C6": "replicated",
        "C7": "replicated",
        "C8": "replicated",
        "C9": "replicated",
        "L1": "replicated",
        "L2": "not replicated",
    }


def test_a_clear_loss_is_not():
    weak = {"right": 0.1, "complex": 0.8, "valid": 0.5, "cost": 2.5}
    found = verdicts(completions(cmdp=weak, sft={"right": 0.3}), cmdp=0)
    for claim in ("C1", "C2", "C3", "C5", "C6", "C9", "L1"):
        assert found[claim] == "not replicated", claim
    assert found["L2"] == "replicated"  # its lambda has the narrower range


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.3, "replicated"),
        (0.01, 0.05, "replicated"),  # smaller than published, but a gain
        (-0.02, 0.04, "not replicated"),
        (-0.02, 0.2, "inconclusive"),
        (-0.3, -0.1, "not replicated"),
    ],
)
def test_a_gain_is_judged_by_its_interval(low, high, verdict):
    assert claims.gain(low, high, published=0.1) == verdict


def test_a_broken_bound_refutes_the_guarantee():
    broken = {"penalty_bound": {"any policy": {"greatest_p_over_bound": 1.1}}}
    assert verdicts(completions(cmdp={"cost": 0.1}), theory=broken)["C9"] == "not replicated"


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "replicated"), (1.06, "inconclusive"), (1.2, "not replicated")])
def test_overhead_is_judged_by_steps_that_took_turns(ratio, verdict):
    assert verdicts(completions(), ratio=ratio)["C8"] == verdict


def test_how_wide_a_range_works_is_left_open_where_it_cannot_be_told():
    own = completions(sft={"right": 0.3})
    assert verdicts(own)["L2"] == "not replicated"
    assert verdicts(own, seeds=1)["L2"] == "inconclusive"  # single runs
    assert verdicts(completions())["L2"] == "inconclusive"  # the student is near the best before it is trained
    beyond = strengths()
    beyond.loc[(beyond["method"] == "gkd-grpo") & (beyond["lam"] == 10.0), "mean"] = 0.6
    assert verdicts(own, sweeps=beyond)["L2"] == "inconclusive"  # the soft Lagrangian's best may lie further out


def test_harder_problems_count_by_the_part_of_right_answers_that_is_lost():
    assert verdicts(completions(cmdp={"complex": 0.6}, gkd_grpo_strong={"complex": 0.6}))["L1"] == "inconclusive"
    # as many points lost, but a larger part of what there was
    assert (
        verdicts(completions(cmdp={"right": 0.5, "complex": 0.1}, gkd_grpo_strong={"right": 1.0, "complex": 0.6}))["L1"]
        == "replicated"
    )
    evidence = judged(completions(cmdp={"right": 1.0, "complex": 0.0})).loc["L1", "evidence"]
    assert evidence.startswith("of its right answers cmdp loses 100.0 % [100.0, 100.0] from 2 to 3 steps")
    assert "of problems longer than any in training cmdp solves 1" in evidence


def test_another_adherence_decides_only_where_both_differences_agree():
    assert verdicts(completions(cmdp={"cost": 4.0, "right": 0.4}))["C5"] == "not replicated"
    assert verdicts(completions(cmdp={"cost": 0.3, "right": 0.95}))["C5"] == "replicated"
    assert verdicts(completions(cmdp={"cost": 4.0, "right": 0.95}))["C5"] == "inconclusive"


def test_the_weakest_of_two_comparisons_is_the_verdict():
    assert verdicts(completions(cmdp={"valid": 0.95}, gkd={"valid": 0.95}))["C3"] != "replicated"
    assert verdicts(completions(cmdp={"valid": 0.95}))["C3"] == "replicated"


@pytest.mark.parametrize(
    ("near", "means", "expected"),
    [
        ((1, 1, 0), (0.49, 0.5, 0.1), (0.1, 1.0, False)),
        ((1, 0, 1), (0.49, 0.1, 0.5), (10.0, 10.0, True)),  # no gap is bridged
        ((1, 1, 1), (0.5, 0.49, 0.49), (0.1, 10.0, True)),
    ],
)
def test_the_range_that_works_has_no_gap_and_says_where_it_may_go_on(near, means, expected):
    sweep = pd.DataFrame({"lam": [0.1, 1.0, 10.0], "near_best": near, "mean": means})
    assert claims.span(sweep) == expected


def test_the_steps_of_the_held_out_problems_are_those_of_their_solutions():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    steps = claims.problem_steps(params)
    assert len(steps) == params["task"]["sizes"]["test"]
    assert set(steps) == set(range(params["task"]["steps"][0], params["task"]["steps"][1] + 1))


def test_the_conditions_say_how_the_rivals_were_tuned():
    conditions = judged(completions()).loc["C1", "conditions"]
    assert "cmdp the best of 2 trials (at an edge in lam and learning_rate)" in conditions
    assert "gkd-grpo the best of 6 trials" in conditions


def test_more_comparisons_widen_the_intervals(monkeypatch):
    table = completions()
    ends = []
    for comparisons in (1, 100):
        evidence = judged(table, settings=SETTINGS | {"comparisons": comparisons}).loc["C1", "evidence"]
        low, high = evidence.partition("[")[2].partition("]")[0].split(", ")
        ends.append(float(high) - float(low))
    assert ends[1] > 1.3 * ends[0]


def test_verdicts_ask_for_the_arms_that_they_need():
    table = completions()
    with pytest.raises(ValueError, match=r"The verdicts need the arms \['minillm'\]"):
        verdicts(table[table["arm"] != "minillm"])


# ---- the study's own files ----


def test_every_arm_has_a_method_a_start_and_settings_that_the_trainer_knows():
    from cmdp.methods import method_of
    from cmdp.trainer import CMDPConfig

    settings = yaml.safe_load((ROOT / "study" / "params.yaml").read_text())
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert set(params["methods"]) <= set(settings["arms"])  # each gets its further seeds
    for name, about in settings["arms"].items():
        assert method_of(about["run"]), name
        assert about["start"] in params, name
        CMDPConfig("out", report_to=[], bf16=False, **about.get("set", {}))
        if name in params["methods"]:
            assert not set(about["seeds"]) & set(params["seeds"]), name
    assert settings["claims"]["comparisons"] == len(verdicts(completions()))


def test_the_committed_verdicts_are_those_of_the_committed_results():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= yaml.safe_load((ROOT / "tuning" / "chosen.yaml").read_text())
    settings = yaml.safe_load((ROOT / "study" / "params.yaml").read_text())
    completions = arms.read(ROOT / "results", params, settings["arms"])
    found = claims.judge(completions, ROOT / "results", params, settings["claims"])
    assert {path.stem for path in (ROOT / "results" / "study" / "arms").glob("*.csv")} == set(settings["arms"])
    committed = pd.read_csv(ROOT / "results" / "study" / "claims.csv")
    pd.testing.assert_frame_equal(found, committed)
