"""Tables of the default experiment and of the study say what the completions say."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from made_up import NAMES, ROWS, completions, row, times

from cmdp.storage import read_yaml, write_table
from replication import tables
from replication.experiments import COLUMNS, rows

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, table: pd.DataFrame, training: pd.DataFrame, default: bool = True) -> None:
    """The files of one run."""
    write_table(table, folder / "completions.csv")
    phases = {f"time/{phase}": 0.1 if len(training) else None for phase in ("generation", "scoring", "update")}
    write_table(pd.DataFrame([{"seed": 0, "steps": 2, "seconds": 1.0, "parameters": 9} | phases]), folder / "times.csv")
    if default:
        positions = pd.DataFrame({"seed": [0], "position": [1], "count": [4], "mean": [0.1]})
        write_table(positions.assign(q10=0.0, q50=0.1, q90=0.2), folder / "positions.csv")
        write_table(training, folder / "training.csv")


@pytest.fixture
def default(tmp_path, monkeypatch):
    """An experiment of which only the start, `sft`, is measured, without greedy decoding."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    content = {"runs": {"sft": {"part": "default", "method": "sft", "seeds": [0]}}}
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump(content))
    table = completions().query("run == 'cmdp' and seed == 0").drop(columns="run")
    table = table.assign(decoding="sampled", truncated=0)
    write_run(tmp_path / "results" / "runs" / "default" / "sft", table, pd.DataFrame(columns=["seed", "step", "csr"]))
    return tmp_path / "results"


def test_the_committed_tables_are_those_of_the_committed_completions(tmp_path, monkeypatch):
    """Every table of the default experiment and of the study, byte for byte."""
    monkeypatch.chdir(ROOT)
    for name in ("runs", "chosen.yaml", "tuning.csv"):
        (tmp_path / name).symlink_to(ROOT / "results" / name)
    tables.write_default(tmp_path)
    tables.write_study(tmp_path)
    made = [path.relative_to(tmp_path) for path in (*tmp_path.glob("*.csv"), *tmp_path.glob("study/*.csv"))]
    assert len(made) == 4 + 1 + 9  # results/tuning.csv among them
    for path in (*made, Path("metrics/gkd.json")):
        assert (tmp_path / path).read_bytes() == (ROOT / "results" / path).read_bytes(), path


def test_an_experiment_of_the_start_alone_has_its_tables(default):
    tables.write_default(default)
    summary = pd.read_csv(default / "summary.csv").set_index("measure")
    assert "greedy_accuracy" not in summary.index  # no completion was decoded greedily
    expected = completions().query("run == 'cmdp' and seed == 0 and split == 'test'")["correct"].mean()
    assert summary.loc["accuracy", "mean"] == pytest.approx(expected, rel=1e-5)
    assert pd.read_csv(default / "curves.csv").empty  # nothing was trained
    assert pd.read_csv(default / "timing.csv").empty
    assert [path.stem for path in (default / "metrics").iterdir()] == ["sft"]


def test_a_missing_run_is_said_in_one_line(default):
    (default / "runs" / "default" / "sft" / "completions.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no .*sft/completions.csv: run `dvc repro run@sft` first"):
        tables.write_default(default)


def test_runs_of_one_name_are_pooled_and_greedy_completions_left_out(tmp_path, monkeypatch):
    own = completions().query("run == 'cmdp'").drop(columns="run")
    for key, part, seeds in (("cmdp", "default", (0, 1)), ("cmdp-more", "study", (2, 3))):
        table = own[own["seed"].isin(seeds)]
        if part == "default":
            table = table.assign(decoding="sampled")
            table = pd.concat([table, table.head(3).assign(decoding="greedy")])
        write_table(table, tmp_path / "runs" / part / key / "completions.csv")
    content = {
        "cmdp": {"part": "default", "method": "cmdp", "seeds": [0, 1]},
        "cmdp-more": {"name": "cmdp", "method": "cmdp", "seeds": [2, 3]},
    }
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump({"runs": content}))
    monkeypatch.chdir(tmp_path)
    found, key = tables.read_completions(tmp_path), ["split", "seed", "prompt", "cost"]
    found, own = (table[COLUMNS].sort_values(key, ignore_index=True) for table in (found, own))
    pd.testing.assert_frame_equal(found, own, check_dtype=False, check_column_type=False)
    assert tables.by_name(rows()) == {"cmdp": rows()["cmdp"]}


def test_summary_has_each_mean_and_measures_satisfaction_at_the_budget_that_was_asked_for():
    table = completions()
    about = ROWS | {"cmdp": row("cmdp", family="budget", settings={"budget": 0.5})}
    found = tables.summary(table, about, 2.0).set_index(["run", "measure"])
    test = table[(table["run"] == "cmdp") & (table["split"] == "test")]
    assert found.loc[("cmdp", "accuracy"), "mean"] == pytest.approx(test["correct"].mean())
    assert found.loc[("cmdp", "csr"), "mean"] == pytest.approx((test["cost"] <= 0.5).mean())
    assert found.loc[("cmdp", "csr"), "budget"] == 0.5
    grpo = table[(table["run"] == "grpo") & (table["split"] == "test")]
    assert found.loc[("grpo", "csr"), "mean"] == pytest.approx((grpo["cost"] <= 2.0).mean())
    assert found.loc[("grpo", "lucky"), "mean"] == pytest.approx((grpo["correct"] * (1 - grpo["valid"])).mean())
    longer = table[(table["run"] == "grpo") & (table["split"] == "longer")]
    assert found.loc[("grpo", "longer_accuracy"), "mean"] == pytest.approx(longer["correct"].mean())
    assert ((found["low"] <= found["mean"] + 1e-12) & (found["mean"] <= found["high"] + 1e-12)).mean() > 0.95


def test_methods_that_know_no_budget_stand_at_every_budget_and_others_at_their_own():
    about = ROWS | {"cmdp-adaptive": row("cmdp-adaptive", family="budget", settings={"budget": 1.0})}
    found = tables.frontier(completions(), about, 2.0)
    for method in ("grpo", "gkd-grpo-weak"):
        assert set(found[found["method"] == method]["budget"]) == {1.0, 2.0}
        assert found[found["method"] == method]["trained_at"].isna().all()
    assert list(found[found["method"] == "cmdp"]["trained_at"]) == [2.0]
    assert list(found[found["method"] == "cmdp-adaptive"]["trained_at"]) == [1.0]
    assert list(found[found["method"] == "dual"]["trained_at"]) == [2.0]
    grpo = found[found["method"] == "grpo"].set_index("budget")
    assert grpo.loc[1.0, "csr"] < grpo.loc[2.0, "csr"]
    assert (grpo["within"] <= grpo[["accuracy", "csr"]].min(axis=1)).all()


def test_every_method_either_knows_the_budget_or_does_not():
    from cmdp.methods import METHODS, TRL

    assert {*METHODS, *TRL, "sft"} - tables.BUDGET_FREE == {
        *("dual", "saute-constant", "cmdp", "cmdp-overshoot", "cmdp-hinge", "cmdp-adaptive", "cmdp-chance")
    }
    assert {*METHODS, *TRL, "sft"} >= tables.BUDGET_FREE


def test_a_method_is_what_its_row_says_whatever_its_name():
    """A name that begins like a method's is no sign of one."""
    table = completions().query("run == 'grpo'").assign(run="grpo-with-budget")
    about = {"grpo-with-budget": row("grpo-with-budget", method="cmdp")}
    assert list(tables.frontier(table, about, 2.0)["trained_at"]) == [2.0]
    summary = tables.summary(table, about, 2.0)
    assert set(tables.strength(summary, about, {"grpo-with-budget": {"lam": 0.5}}, 0.05)["method"]) == {"cmdp"}


def test_differences_are_paired_over_the_seeds_that_both_have():
    table = completions()
    ours = table[(table["run"] == "cmdp") & (table["split"] == "test")]
    mean, low, high, seeds = tables.difference(ours[ours["seed"] < 3], ours[ours["seed"] > 0], "correct")
    assert (mean, low, high, seeds) == (0.0, 0.0, 0.0, 2)  # the same completions: no difference, and none in any draw
    shifted = ours.assign(correct=ours["correct"] - 0.25)
    assert tables.difference(ours, shifted, "correct")[:3] == pytest.approx((0.25, 0.25, 0.25))


def test_an_ablation_is_compared_with_the_run_that_it_changes():
    table = pd.concat([completions(), completions().query("run == 'gkd'").assign(run="gkd-more-prompts")])
    about = ROWS | {"gkd-more-prompts": row("gkd-more-prompts", family="ablation", method="gkd", tuned="gkd")}
    found = tables.ablations(table, about, 2.0)
    assert set(zip(found["run"], found["baseline"], strict=True)) == {("gkd-more-prompts", "gkd")}
    assert (found[["difference", "low", "high"]] == 0).all(axis=None)


def test_a_valid_derivation_wins_and_two_alike_tie():
    table = completions(cmdp={"valid": 1.0}, grpo={"valid": 0.0}, gkd={"valid": 1.0})
    found = tables.wins(table, ["grpo", "gkd"], ["cmdp"]).set_index("baseline")
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
    means = {"low": 0.90, "cmdp": 0.97, "high": 1.0, "gkd-grpo-weak": 0.5, "kdrl": 0.9}
    summary = pd.DataFrame(
        [(run, "accuracy_within", mean, mean, mean, 1) for run, mean in means.items()],
        columns=["run", "measure", "mean", "low", "high", "seeds"],
    )
    about = ROWS | {
        name: row(name, family="strength", method="cmdp", tuned="cmdp", settings={"lam": lam})
        for name, lam in (("low", 0.1), ("high", 3))
    }
    tuned = {"cmdp": {"lam": 1.0}, "gkd-grpo-weak": {"lam": 0.01}, "kdrl": {"lam": 0.1}}
    found = tables.strength(summary, about, tuned, near=0.05)
    assert dict(zip(found["lam"], found["near_best"], strict=True)) == {0.1: 0, 1.0: 1, 3.0: 1, 0.01: 1}


def test_ranges_say_which_trials_of_a_method_are_near_its_best():
    trials = [
        ("gkd-grpo", 0.01, 1e-4, 0.5),
        ("gkd-grpo", 0.1, 1e-3, 0.77),
        ("gkd-grpo", 1.0, 2e-3, 0.8),
        ("gkd", None, 1e-3, 0.9),
        ("gkd", None, 2e-3, 0.7),
    ]
    columns = ["method", "lam", "learning_rate", "accuracy_within"]
    found = tables.ranges(pd.DataFrame(trials, columns=columns), near=0.05)
    assert found.drop(columns="parameter").to_dict("split")["data"] == [
        ["gkd-grpo", 2e-3, 1e-3, 2e-3, 1e-4, 2e-3, 2, 3],
        ["gkd-grpo", 1.0, 0.1, 1.0, 0.01, 1.0, 2, 3],
        ["gkd", 1e-3, 1e-3, 1e-3, 1e-3, 2e-3, 1, 2],
    ]
    assert list(found["parameter"]) == ["learning_rate", "lam", "learning_rate"]


def test_trials_know_the_method_of_their_run():
    tuned = read_yaml(ROOT / "experiments.yaml")["tuning"]["trials"]
    methods = tables.read_trials(ROOT / "results", tuned).groupby("run")["method"].unique()
    assert {run: list(of) for run, of in methods.items()} == {run: [about["method"]] for run, about in tuned.items()}


def test_every_completion_is_in_one_bin_of_the_budget():
    table = completions()
    found = tables.violation(table, ["cmdp", "grpo"], 2.0)
    assert found.groupby("run")["count"].sum().tolist() == [960, 960]
    within = found[(found["run"] == "cmdp") & (found["high"] <= 1)]["count"].sum()
    test = table[(table["run"] == "cmdp") & (table["split"] == "test")]
    assert within == (test["cost"] <= 2.0).sum()


def test_step_times_are_set_against_the_soft_lagrangians():
    found = tables.timing(times(), ROWS).set_index("run")
    assert list(found.index) == list(NAMES)
    assert found.loc["cmdp", ["seconds", "low", "high", "ratio_to_gkd_grpo"]].tolist() == [0.535, 0.53, 0.54, 1.0]
    resumed = times().assign(**{"time/generation": 0.2, "time/update": 0.1})  # phases say it also of an interrupted run
    resumed.loc[resumed["run"] == "cmdp", "seconds"] = 0.5
    resumed.loc[resumed["run"] == "grpo", ["time/generation", "time/update"]] = np.nan  # as of TRL's own trainers
    found = tables.timing(resumed, ROWS).set_index("run")["seconds"]
    assert (found["cmdp"], found["grpo"]) == pytest.approx((0.3, 0.535))


def test_tables_of_another_part_are_refused():
    with pytest.raises(ValueError, match="There are tables of default and study, not of 'studdy'"):
        tables.write("studdy")
