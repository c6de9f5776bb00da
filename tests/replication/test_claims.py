"""The verdicts follow from the intervals, and the committed ones from the committed results."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from made_up import LAMBDAS, METHODS, NAMES, ROWS, STEPS, completions, times

from replication import claims
from replication.experiments import rows

ROOT = Path(__file__).parents[2]
SETTINGS = {"comparisons": 11, "tolerance": 0.02, "alike": 0.05, "target": 0.95, "near": 0.05}
THEORY = {"penalty_bound": {"any policy": {"greatest_p_over_bound": 0.9}}}
BASELINES = [*LAMBDAS, "grpo", "gkd", "dual", "minillm", "kdrl"]
CLAIMS = [claim | ({"baselines": BASELINES} if claim["id"] == "C6" else {}) for claim in claims.CLAIMS]


def trials(**works: float) -> pd.DataFrame:
    """Of four learning rates each, the first is chosen and keeps the target; of the others the share `works` do.
    minillm is the most accurate."""
    rows = []
    for name in NAMES:
        part = works.get(name.split("-")[0], 0.5)
        for number in range(4):
            kept = number / 4 < part or number == 0
            accuracy = (0.8 if name == "minillm" else 0.7) - number / 1000
            rows.append((name, METHODS[name], 0.001 * 2**number, accuracy, 0.96 if kept else 0.9, int(number == 0)))
    return pd.DataFrame(rows, columns=["run", "method", "learning_rate", "accuracy", "csr", "chosen"])


def benchmark(ratio: float = 1.0) -> pd.DataFrame:
    rows = [(f"cmdp / {name}", ratio, ratio - 0.02, ratio + 0.02, 15) for name in ("gkd-grpo", "dual", "trl-grpo")]
    return pd.DataFrame(rows, columns=["trainer", "median", "low", "high", "repeats"])


def equal(csr=0.97, difference=0.05, half=0.01, weak=None) -> pd.DataFrame:
    """`tables.equal_csr` of ours at three budgets: the same, but for what is `weak` at 0.3 nats."""
    table = pd.DataFrame({"method": "cmdp-chance", "budget": [0.5, 0.3, 0.8], "csr": csr, "difference": difference})
    for name, value in (weak or {}).items():
        table.loc[1, name] = value
    table = table.assign(csr_low=table["csr"] - half, csr_high=table["csr"] + half, soft_lambda=0.5)
    table = table.assign(low=table["difference"] - half, high=table["difference"] + half)
    return table.assign(target_difference=0.0, target_low=0.0, target_high=0.0)


def judged(table: pd.DataFrame, theory=THEORY, ratio=1.0, settings=SETTINGS, own=None, given=CLAIMS, **works: float):
    study = claims.Study(
        completions=table,
        times=times(),
        trials=trials(**works),
        equal=equal() if own is None else own,
        benchmark=benchmark(ratio),
        theory=theory,
        steps=STEPS,
        rows=ROWS,
        lambdas=LAMBDAS,
        soft="soft-0.5",
        subject="cmdp",
        ours="cmdp-chance",
        budget=0.5,
        settings=settings,
    )
    return claims.judge(study, given).set_index("id")


def verdicts(table: pd.DataFrame, **given) -> pd.Series:
    return judged(table, **given)["verdict"]


def test_a_clear_gain_is_replicated():
    table = completions(
        cmdp={"correct": 1.0, "complex": 0.7, "valid": 0.97, "cost": 0.05},
        soft_05={"correct": 0.7, "complex": 0.75},
        minillm={"cost": 0.05},
    )
    assert dict(verdicts(table, cmdp=0.25)) == {
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
        "L2": "replicated",  # one trial of four works, and two of the soft Lagrangian's
        "O1": "supported",
        "O2": "supported",
    }


def test_a_clear_loss_is_not():
    weak = {"correct": 0.1, "complex": 0.8, "valid": 0.3, "cost": 0.7}
    loose = {name: {"cost": 2.0} for name in ("soft_02",)}
    found = verdicts(completions(cmdp=weak, **loose), cmdp=0.75)
    for claim in ("C1", "C2", "C3", "C5", "C6", "C9", "L1", "L2"):
        assert found[claim] == "not replicated", claim


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
    assert verdicts(completions(cmdp={"cost": 0.03}), theory=broken)["C9"] == "not replicated"


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "replicated"), (1.06, "inconclusive"), (1.2, "not replicated")])
def test_overhead_is_judged_by_steps_that_took_turns(ratio, verdict):
    assert verdicts(completions(), ratio=ratio)["C8"] == verdict


@pytest.mark.parametrize(
    ("own", "soft", "verdict"),
    [
        (0.25, 0.5, "replicated"),
        (0.5, 0.5, "not replicated"),
        (0.75, 0.5, "not replicated"),
        (0.25, 0.25, "not replicated"),
    ],
)
def test_tuning_is_careful_where_fewer_trials_work_than_of_the_soft_lagrangian(own, soft, verdict):
    found = judged(completions(), cmdp=own, soft=soft).loc["L2"]
    assert found["verdict"] == verdict
    assert found["evidence"].startswith(
        f"{int(4 * own)} of 4 tuning trials of cmdp work, {int(12 * soft)} of 12 of the"
    )


def test_a_method_of_which_no_trial_keeps_the_target_needs_careful_tuning():
    study = judged_study(trials().assign(csr=lambda table: np.where(table["run"] == "cmdp", 0.5, 0.96)))
    assert claims.careful_tuning(study, {}) == (
        "replicated",
        {"soft_works": "12 of 12", "subject_works": "0 of 4", "ours_works": "4 of 4"},
    )
    one_more = trials().assign(csr=lambda table: np.where(table["run"] == "soft-0.2", 0.96, 0.5))
    one_more.loc[(one_more["run"] == "cmdp") & (one_more["learning_rate"] == 0.001), "csr"] = 0.96
    assert claims.careful_tuning(judged_study(one_more), {})[0] == "inconclusive"  # 1 of 4 and 4 of 12


def judged_study(own: pd.DataFrame) -> claims.Study:
    """A study of which only the trials are looked at."""
    names = (
        "completions",
        "times",
        "equal",
        "benchmark",
        "theory",
        "steps",
        "rows",
        "lambdas",
        "soft",
        "ours",
        "budget",
    )
    return claims.Study(**dict.fromkeys(names), trials=own, subject="cmdp", settings=SETTINGS)


def test_harder_problems_count_by_the_part_of_the_accuracy_that_is_lost():
    assert verdicts(completions(cmdp={"complex": 0.6}, soft_05={"complex": 0.6}))["L1"] == "inconclusive"
    # as many points lost, but a larger part of what there was
    table = completions(cmdp={"correct": 0.5, "complex": 0.1}, soft_05={"correct": 1.0, "complex": 0.6})
    assert verdicts(table)["L1"] == "replicated"
    evidence = judged(completions(cmdp={"correct": 1.0, "complex": 0.0})).loc["L1", "evidence"]
    assert evidence.startswith("of its accuracy cmdp loses 100.0 % [100.0, 100.0] from 2 to 4 steps")


def test_reasoning_is_judged_at_equal_csr():
    """A run that is as valid as the soft Lagrangian chosen, but stricter, is better than the curve there."""
    curve = {"soft_02": {"valid": 0.9, "cost": 0.6}, "soft_05": {"valid": 0.7}, "soft_12": {"valid": 0.3, "cost": 0.05}}
    found = judged(completions(cmdp={"valid": 0.7, "cost": 0.12}, **curve)).loc["C2"]
    assert found["verdict"] == "replicated"
    assert "within the curve" in found["evidence"]
    found = judged(completions(cmdp={"valid": 0.9, "cost": 5.0}, **curve)).loc["C2"]
    assert found["verdict"] == "inconclusive"
    assert "looser than the curve" in found["evidence"]


@pytest.mark.parametrize(
    ("given", "every", "some"),
    [
        ({}, "supported", "supported"),
        ({"difference": 0.0}, "supported", "inconclusive"),
        ({"difference": -0.005, "half": 0.002}, "supported", "not supported"),
        ({"weak": {"difference": -0.01}}, "inconclusive", "supported"),
        ({"weak": {"difference": -0.1}}, "not supported", "supported"),
        ({"weak": {"csr": 0.95}}, "inconclusive", "supported"),
        ({"weak": {"csr": 0.9}}, "not supported", "supported"),
        ({"weak": {"difference": np.nan}}, "inconclusive", "supported"),
    ],
)
def test_our_claims_follow_from_the_judgement_at_equal_csr(given, every, some):
    ours = [claim for claim in CLAIMS if claim["id"] in ("O1", "O2")]
    found = judged(completions(), own=equal(**given), given=ours)
    assert found["verdict"].to_dict() == {"O1": every, "O2": some}
    assert found.loc["O1", "evidence"].startswith("cmdp-chance at 0.3 nats: CSR ")


def test_the_baseline_of_competitive_accuracy_keeps_the_budget():
    assert "against minillm, the most accurate" in judged(completions()).loc["C6", "evidence"]
    loose = trials().assign(csr=lambda table: np.where(table["run"].isin(["minillm", "grpo"]), 0.5, 0.96))
    study = judged_study(loose)
    study.completions, study.soft, study.ours, study.budget = completions(), "soft-0.5", "cmdp-chance", 0.5
    claim = next(claim for claim in CLAIMS if claim["id"] == "C6")
    assert claims.competitive(study, claim)[1]["best"] not in ("minillm", "grpo")


def test_another_adherence_decides_only_where_both_differences_agree():
    assert verdicts(completions(cmdp={"cost": 1.0, "correct": 0.4}))["C5"] == "not replicated"
    assert verdicts(completions(cmdp={"cost": 0.07, "correct": 0.95}))["C5"] == "replicated"
    assert verdicts(completions(cmdp={"cost": 1.0, "correct": 0.95}))["C5"] == "inconclusive"


def test_the_weakest_of_two_comparisons_is_the_verdict():
    assert verdicts(completions(cmdp={"valid": 0.95}, gkd={"valid": 0.95}))["C3"] != "replicated"
    assert verdicts(completions(cmdp={"valid": 0.95}))["C3"] == "replicated"


def test_the_conditions_say_the_scale_and_the_effort():
    found = judged(completions())
    scale = "arithmetic, a student of 1,000 parameters, 4 seeds"
    assert found.loc["C1", "conditions"] == f"{scale}, budget 0.5 nats; each the best of 4 trials"
    assert found.loc[["O1", "O2"], "conditions"].str.startswith(scale).all()
    assert "within 2 points is competitive" in found.loc["C6", "conditions"]


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
    study = judged_study(trials())
    study.times = times().assign(parameters=lambda table: 1000 + (table["run"] == "cmdp"))
    assert claims.same_student(study, {})[0] == "not replicated"


# ---- claims.yaml and the committed verdicts ----


def test_every_claim_names_its_judge_and_every_judge_a_claim():
    assert [claim["id"] for claim in claims.CLAIMS] == [*(f"C{n}" for n in range(1, 10)), "L1", "L2", "O1", "O2"]
    assert {claim["judge"] for claim in claims.CLAIMS if "judge" in claim} == set(claims.JUDGES)
    known = {row.name for row in rows(ROOT / "experiments.yaml").values()}
    assert {run for claim in claims.CLAIMS for key in ("baselines", "beside") for run in claim.get(key, [])} <= known


def test_every_tuned_baseline_may_be_the_best_one():
    entries = yaml.safe_load((ROOT / "experiments.yaml").read_text())["tuning"]["entries"]
    baselines = set(next(claim for claim in claims.CLAIMS if claim["id"] == "C6")["baselines"])
    methods = ("grpo", "gkd", "gkd-grpo", "dual", "minillm", "kdrl")
    assert baselines == {name for name, entry in entries.items() if entry["method"] in methods}


def test_the_level_is_shared_by_as_many_comparisons_as_the_paper_makes_claims():
    settings = yaml.safe_load((ROOT / "experiments.yaml").read_text())["claims"]
    assert settings["comparisons"] == sum(not claim["id"].startswith("O") for claim in claims.CLAIMS)


def test_the_committed_verdicts_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = claims.read_study()
    assert sorted(set(study.steps)) == yaml.safe_load((ROOT / "params.yaml").read_text())["task"]["steps"]
    pd.testing.assert_frame_equal(claims.judge(study), pd.read_csv(ROOT / "results" / "claims.csv"))
