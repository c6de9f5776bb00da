"""The verdicts follow from the intervals, and the committed ones from the committed results."""

from pathlib import Path

import pandas as pd
import pytest
import yaml
from made_up import BASELINES, METHODS, NAMES, STEPS, completions, times

from replication import claims
from replication.experiments import rows

ROOT = Path(__file__).parents[2]
SETTINGS = {"comparisons": 11, "tolerance": 0.02, "alike": 0.05, "target": 0.95, "near": 0.05}
THEORY = {"penalty_bound": {"any policy": {"greatest_p_over_bound": 0.9}}}


def strengths(**near: int) -> pd.DataFrame:
    """Of three lambdas each, the middle one is best, and the others are near it or, for the methods named, not."""
    rows = [
        (method, lam, "accuracy_within", mean, 0.4, 0.6, 1, int(lam == 1.0 or near.get(method.replace("-", "_"), 1)))
        for method in ("cmdp", "cmdp-hinge", "gkd-grpo")
        for lam, mean in ((0.1, 0.49), (1.0, 0.5), (10.0, 0.49))
    ]
    return pd.DataFrame(rows, columns=["method", "lam", "measure", "mean", "low", "high", "seeds", "near_best"])


def trials() -> pd.DataFrame:
    """Of two learning rates each, the lower is chosen; minillm is the most accurate on validation prompts."""
    rows = [
        (name, METHODS[name], 1.0, rate, (0.8 if name == "minillm" else 0.7) - rate, 0.6 - rate, int(rate == 0.001))
        for name in NAMES
        for rate in (0.001, 0.002)
    ]
    columns = ["run", "method", "lam", "learning_rate", "accuracy", "accuracy_within", "chosen"]
    return pd.DataFrame(rows, columns=columns)


def benchmark(ratio: float = 1.0) -> pd.DataFrame:
    rows = [(f"cmdp / {name}", ratio, ratio - 0.02, ratio + 0.02, 15) for name in ("gkd-grpo", "dual", "trl-grpo")]
    return pd.DataFrame(rows, columns=["trainer", "median", "low", "high", "repeats"])


def judged(
    table: pd.DataFrame, theory=THEORY, ratio=1.0, seeds=5, settings=SETTINGS, sweeps=None, **near: int
) -> pd.DataFrame:
    sweeps = (strengths(**near) if sweeps is None else sweeps).assign(seeds=seeds)
    study = claims.Study(
        completions=table,
        times=times(),
        strengths=sweeps,
        trials=trials(),
        benchmark=benchmark(ratio),
        theory=theory,
        steps=STEPS,
        soft="gkd-grpo-strong",
        ours="cmdp-adaptive",
        budget=2.0,
        settings=settings,
    )
    return claims.judge(study).set_index("id")


def verdicts(table: pd.DataFrame, **given) -> pd.Series:
    return judged(table, **given)["verdict"]


def test_a_clear_gain_is_replicated():
    table = completions(
        cmdp={"correct": 1.0, "complex": 0.7, "valid": 0.97, "cost": 0.2},
        gkd_grpo_strong={"correct": 0.7, "complex": 0.75},
        **{"minillm": {"cost": 0.2}, "sft": {"correct": 0.3}},
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
    weak = {"correct": 0.1, "complex": 0.8, "valid": 0.5, "cost": 2.5}
    found = verdicts(completions(cmdp=weak, sft={"correct": 0.3}), cmdp=0)
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
    own = completions(sft={"correct": 0.3})
    assert verdicts(own)["L2"] == "not replicated"
    assert verdicts(own, seeds=1)["L2"] == "inconclusive"  # single runs
    assert verdicts(completions())["L2"] == "inconclusive"  # the student is near the best before it is trained
    beyond = strengths()
    beyond.loc[(beyond["method"] == "gkd-grpo") & (beyond["lam"] == 10.0), "mean"] = 0.6
    assert verdicts(own, sweeps=beyond)["L2"] == "inconclusive"  # the soft Lagrangian's best may lie further out


def test_harder_problems_count_by_the_part_of_the_accuracy_that_is_lost():
    assert verdicts(completions(cmdp={"complex": 0.6}, gkd_grpo_strong={"complex": 0.6}))["L1"] == "inconclusive"
    # as many points lost, but a larger part of what there was
    assert (
        verdicts(completions(cmdp={"correct": 0.5, "complex": 0.1}, gkd_grpo_strong={"correct": 1.0, "complex": 0.6}))[
            "L1"
        ]
        == "replicated"
    )
    evidence = judged(completions(cmdp={"correct": 1.0, "complex": 0.0})).loc["L1", "evidence"]
    assert evidence.startswith("of its accuracy cmdp loses 100.0 % [100.0, 100.0] from 2 to 3 steps")
    assert "of problems longer than any in training cmdp solves 1" in evidence


def test_another_adherence_decides_only_where_both_differences_agree():
    assert verdicts(completions(cmdp={"cost": 4.0, "correct": 0.4}))["C5"] == "not replicated"
    assert verdicts(completions(cmdp={"cost": 0.3, "correct": 0.95}))["C5"] == "replicated"
    assert verdicts(completions(cmdp={"cost": 4.0, "correct": 0.95}))["C5"] == "inconclusive"


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


def test_the_conditions_say_how_both_were_tuned():
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


def test_verdicts_ask_for_the_runs_that_they_need():
    table = completions()
    with pytest.raises(ValueError, match=r"The verdicts need the runs \['minillm'\]: run the study first"):
        verdicts(table[table["run"] != "minillm"])


def test_a_student_that_has_grown_is_no_deployment_without_augmentation():
    grown = times().assign(parameters=lambda table: 1000 + (table["run"] == "cmdp"))
    study = claims.Study(completions(), grown, *[None] * 5, "gkd-grpo-strong", "cmdp-adaptive", 2.0, SETTINGS)
    assert claims.same_student(study, {})[0] == "not replicated"


def test_the_trl_trainer_is_set_beside_the_best_baseline_where_it_was_run():
    assert "against trl-gkd" not in judged(completions()).loc["C6", "evidence"]
    beside = pd.concat([completions(), completions().query("run == 'gkd'").assign(run="trl-gkd")])
    assert "against trl-gkd: " in judged(beside).loc["C6", "evidence"]


# ---- claims.yaml and the committed verdicts ----


def test_every_claim_names_its_judge_and_every_judge_a_claim():
    assert [claim["id"] for claim in claims.CLAIMS] == [*(f"C{number}" for number in range(1, 10)), "L1", "L2"]
    assert {claim["judge"] for claim in claims.CLAIMS if "judge" in claim} == set(claims.JUDGES)
    assert set(next(claim for claim in claims.CLAIMS if claim["id"] == "C6")["baselines"]) == set(BASELINES)
    known = {row.name for row in rows(ROOT / "experiments.yaml").values()}
    assert {run for claim in claims.CLAIMS for run in claim.get("baselines", [])} <= known


def test_the_level_is_shared_by_as_many_comparisons_as_there_are_verdicts():
    settings = yaml.safe_load((ROOT / "experiments.yaml").read_text())["claims"]
    assert settings["comparisons"] == len(claims.CLAIMS)


def test_the_committed_verdicts_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = claims.judge(claims.read_study())
    pd.testing.assert_frame_equal(found, pd.read_csv(ROOT / "results" / "claims.csv"))
