"""Tables of the default experiment and of the study say what the completions say."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from made_up import LAMBDAS, NAMES, ROWS, completions, row, times

from cmdp.storage import write_table
from replication import tables
from replication.experiments import COLUMNS, rows

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, table: pd.DataFrame, default: bool = True) -> None:
    """The files of one run that was not trained."""
    write_table(table[COLUMNS], folder / "completions.csv")
    exact = table.groupby(["seed", "prompt"])["right"].first().reset_index()
    write_table(exact.assign(step_1=0.5, step_2=np.where(exact["prompt"] % 2, 0.5, np.nan)), folder / "exact.csv")
    phases = dict.fromkeys(["time/generation", "time/scoring", "time/update"])
    write_table(pd.DataFrame([{"seed": 0, "steps": 2, "seconds": 1.0, "parameters": 9} | phases]), folder / "times.csv")
    if default:
        positions = pd.DataFrame({"seed": [0], "position": [1], "count": [4], "mean": [0.1]})
        write_table(positions.assign(q10=0.0, q50=0.1, q90=0.2), folder / "positions.csv")
        write_table(pd.DataFrame(columns=["seed", "step", "csr"]), folder / "training.csv")


@pytest.fixture
def default(tmp_path, monkeypatch):
    """An experiment of which only the teacher and the start, `sft`, are measured, without greedy decoding."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    content = {name: {"part": "default", "method": "sft", "seeds": [0]} for name in ("teacher", "sft")}
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump({"runs": content}))
    for name in content:
        table = completions().query("run == @name and seed == 0")
        write_run(tmp_path / "results" / "runs" / "default" / name, table)
    return tmp_path / "results"


def test_the_committed_tables_are_those_of_the_committed_runs(tmp_path, monkeypatch):
    """Every number of the default experiment and of the study, byte for byte."""
    monkeypatch.chdir(ROOT)
    for name in ("runs", "chosen.yaml", "tuning.csv"):
        (tmp_path / name).symlink_to(ROOT / "results" / name)
    tables.write_default(tmp_path)
    tables.write_study(tmp_path)
    made = [path.relative_to(tmp_path) for path in (*tmp_path.glob("*.csv"), *tmp_path.glob("study/*.csv"))]
    assert len(made) == 7 + 1 + 9  # results/tuning.csv among them
    for path in (*made, Path("metrics/gkd.json")):
        assert (tmp_path / path).read_bytes() == (ROOT / "results" / path).read_bytes(), path


def test_an_experiment_of_the_start_alone_has_its_tables(default):
    tables.write_default(default)
    summary = pd.read_csv(default / "summary.csv")
    assert list(summary) == ["run", "measure", "mean", "low", "high", "seeds"]
    summary = summary.query("run == 'sft'").set_index("measure")
    assert "greedy_accuracy" not in summary.index  # no completion was decoded greedily
    expected = completions().query("run == 'sft' and seed == 0")["correct"].mean()
    assert summary.loc["accuracy", "mean"] == pytest.approx(expected, rel=1e-5)
    assert pd.read_csv(default / "curves.csv").empty  # nothing was trained
    assert pd.read_csv(default / "timing.csv").empty
    assert {path.stem for path in (default / "metrics").iterdir()} == {"sft", "teacher"}
    contest = pd.read_csv(default / "contest.csv")
    assert contest.query("experiment == 'measured'")["teacher"].to_numpy() == pytest.approx((0.5 + 0.25) / 2)
    assert (pd.read_csv(default / "prices.csv")["ceiling"] >= 0.375).all()


def test_what_a_budget_can_buy_needs_the_teacher(default):
    content = {"runs": {"sft": {"part": "default", "method": "sft", "seeds": [0]}}}
    Path("experiments.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="computed from the run 'teacher': keep it in"):
        tables.write_default(default)


def test_a_missing_run_is_said_in_one_line(default):
    (default / "runs" / "default" / "sft" / "completions.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no .*sft/completions.csv: run `dvc repro run@sft` first"):
        tables.write_default(default)


def test_runs_of_one_name_are_pooled_and_the_accuracy_is_exact_but_for_other_ways_to_the_answer(tmp_path, monkeypatch):
    own = completions().query("run == 'cmdp'")
    for key, part, seeds in (("cmdp", "default", (0, 1)), ("cmdp-more", "study", (2, 3))):
        write_run(tmp_path / "runs" / part / key, own[own["seed"].isin(seeds)], default=False)
    content = {
        "cmdp": {"part": "default", "method": "cmdp", "seeds": [0, 1]},
        "cmdp-more": {"name": "cmdp", "method": "cmdp", "seeds": [2, 3]},
    }
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump({"runs": content}))
    monkeypatch.chdir(tmp_path)
    found, key = tables.read_completions(tmp_path), ["seed", "prompt", "cost"]
    found, own = (table.sort_values(key, ignore_index=True) for table in (found, own))
    pd.testing.assert_frame_equal(found[list(own)], own, check_dtype=False, check_column_type=False, rtol=1e-4)
    assert found["accurate"].mean() == pytest.approx((found["right"] + found["correct"] - found["valid"]).mean())
    assert tables.by_name(rows()) == {"cmdp": rows()["cmdp"]}


def test_summary_has_each_mean_and_measures_satisfaction_at_the_budget_that_was_asked_for():
    table = pd.concat([completions(), completions().query("run == 'gkd'").head(9).assign(decoding="greedy", correct=1)])
    about = ROWS | {"cmdp": row("cmdp", family="budget", settings={"budget": 0.1})}
    found = tables.summary(table, about, 0.5).set_index(["run", "measure"])
    own = table[table["run"] == "cmdp"]
    assert found.loc[("cmdp", "accuracy"), "mean"] == pytest.approx(own["correct"].mean())
    assert found.loc[("cmdp", "validity"), "mean"] == pytest.approx(own["valid"].mean())
    assert found.loc[("cmdp", "csr"), "mean"] == pytest.approx((own["cost"] <= 0.1).mean())
    assert found.loc[("cmdp", "csr"), "budget"] == 0.1
    grpo = table[table["run"] == "grpo"]
    assert found.loc[("grpo", "csr"), "mean"] == pytest.approx((grpo["cost"] <= 0.5).mean())
    greedy = found.xs("greedy_accuracy", level="measure")
    assert greedy["mean"].to_dict() == {"gkd": 1.0}
    assert found.loc[("gkd", "accuracy"), "mean"] < 1  # of sampled completions alone
    assert ((found["low"] <= found["mean"] + 1e-12) & (found["mean"] <= found["high"] + 1e-12)).mean() > 0.95


def test_methods_that_know_no_budget_stand_at_every_budget_and_others_at_their_own():
    about = ROWS | {
        "cmdp-at-0.3": row("cmdp-at-0.3", family="budget", method="cmdp", tuned="cmdp", settings={"budget": 0.3})
    }
    table = completions()
    table = pd.concat([table, table.query("run == 'cmdp'").assign(run="cmdp-at-0.3")])
    found = tables.frontier(table, about, 0.5)
    for method in ("grpo", "soft-0.5"):
        assert set(found[found["method"] == method]["budget"]) == {0.3, 0.5}
        assert found[found["method"] == method]["trained_at"].isna().all()
    assert list(found[found["method"] == "cmdp"]["trained_at"]) == [0.5, 0.3]
    assert list(found[found["method"] == "dual"]["trained_at"]) == [0.5]
    assert "teacher" not in set(found["method"])
    grpo = found[found["method"] == "grpo"].set_index("budget")
    assert grpo.loc[0.3, "csr"] < grpo.loc[0.5, "csr"]
    assert (grpo["within"] <= grpo[["accuracy", "csr"]].min(axis=1)).all()


def test_a_run_at_another_budget_stands_for_the_one_it_equals_in_all_other_settings():
    margin, at = {"margin": 0.1}, {"budget": 0.3}
    about = {
        "cmdp": row("cmdp"),
        "close": row("close", method="cmdp", tuned="cmdp", settings=margin),
        "x": row("x", family="budget", method="cmdp", tuned="cmdp", settings=at | margin),
        "y": row("y", family="budget", method="cmdp", tuned="cmdp", settings=at),
        "z": row("z", family="ablation", method="cmdp", tuned="cmdp", settings={"penalty": 1.0}),
        "cmdp-equal": row("cmdp-equal", family="capacity", method="cmdp", tuned="cmdp", start="teacher"),
    }
    assert tables.points(about) == {"cmdp": "cmdp", "close": "close", "x": "close", "y": "cmdp"}


# ---- the soft Lagrangian at equal CSR ----


def test_the_curve_is_linear_between_points_and_ends_at_its_strictest():
    csr, accuracy = np.array([[0.5], [0.9], [0.98]]), np.array([[0.9], [0.7], [0.6]])
    at = {0.5: 0.9, 0.6: 0.85, 0.9: 0.7, 0.94: 0.65, 0.98: 0.6, 1.0: 0.6}
    for place, value in at.items():
        assert tables.on_curve(csr, accuracy, np.array([place])) == pytest.approx([value]), place
    assert np.isnan(tables.on_curve(csr, accuracy, np.array([0.49]))).all()  # looser than all


def test_where_noise_lets_the_curve_pass_a_csr_twice_the_best_counts():
    csr, accuracy = np.array([[0.90], [0.96], [0.94], [0.94]]), np.array([[0.8], [0.7], [0.72], [0.74]])
    assert tables.on_curve(csr, accuracy, np.array([0.95])) == pytest.approx([0.7 + 0.1 / 6])
    assert tables.on_curve(csr, accuracy, np.array([0.94])) == pytest.approx([0.74])
    assert tables.on_curve(csr, accuracy, np.array([0.99])) == pytest.approx([0.7])


def contested(**more) -> pd.DataFrame:
    """Soft Lagrangians from loose to strict, and `cmdp-chance`, by default on a point of theirs; cost by accuracy."""
    table, draw = completions(), np.random.default_rng(1)
    rates = {"soft-0.2": (0.9, 0.5), "soft-0.5": (0.7, 0.9), "soft-1.2": (0.5, 1.0), "cmdp-chance": (0.7, 0.9)} | more
    for run, (right, csr) in rates.items():
        own = table["run"] == run
        table.loc[own, ["right", "accurate"]] = right
        table.loc[own, "cost"] = np.where(draw.random(own.sum()) < csr, 0.1, 1.0)
    return table


def equal(table: pd.DataFrame, **given) -> pd.Series:
    return tables.equal_csr(table, ROWS, LAMBDAS, 0.5, 0.95, **given).set_index("run").loc["cmdp-chance"]


def test_a_run_on_the_curve_gains_nothing_and_one_above_it_its_height():
    found = equal(contested())
    assert found["low"] < 0 < found["high"]
    assert found["difference"] == pytest.approx(0, abs=0.02)
    above = equal(contested(**{"cmdp-chance": (0.8, 0.9)}))
    assert above["difference"] == pytest.approx(0.1, abs=0.02)
    assert 0 < above["low"] < above["difference"] < above["high"]
    assert (above["soft_lambda"], above["soft_at_target"]) == (1.2, pytest.approx(0.5))
    assert above["target_difference"] == pytest.approx(0.3)
    assert (above["method"], above["budget"], above["place"]) == ("cmdp-chance", 0.5, "within")


def test_the_curve_and_the_run_are_resampled_together():
    """A run that is a point of the curve differs from it in no draw, though its CSR is noisy; unpaired it would."""
    table = contested()
    own, soft = table["run"] == "cmdp-chance", table["run"] == "soft-0.5"
    table.loc[own, ["cost", "right", "accurate"]] = table.loc[soft, ["cost", "right", "accurate"]].to_numpy()
    found = equal(table)
    assert found["csr_high"] - found["csr_low"] > 0.02
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((0, 0, 0), abs=1e-12)


def test_beyond_the_ends_of_the_curve():
    looser = equal(contested(**{"cmdp-chance": (0.95, 0.3)}))
    assert looser["place"] == "looser"
    assert looser[["soft", "difference", "low", "high"]].isna().all()
    assert looser["target_difference"] == pytest.approx(0.45)
    stricter = equal(contested(**{"soft-1.2": (0.5, 0.95), "cmdp-chance": (0.7, 1.0)}))
    assert (stricter["place"], stricter["soft"]) == ("stricter", pytest.approx(0.5))
    none = equal(contested(**{"soft-1.2": (0.5, 0.94)}))
    assert none[["soft_lambda", "soft_at_target", "target_difference", "target_low"]].isna().all()


def test_the_runs_of_one_budget_share_the_level_and_each_is_measured_at_its_own():
    def width(found: pd.Series) -> float:
        return found["high"] - found["low"]

    table = contested()
    alone = table[~table["run"].isin(["cmdp", "dual"])]
    assert width(equal(table)) > width(equal(alone)) == pytest.approx(width(equal(alone, level=0.95)))
    about = ROWS | {"cmdp-chance": row("cmdp-chance", family="budget", settings={"budget": 2.0})}
    found = tables.equal_csr(table, about, LAMBDAS, 0.5, 0.95).set_index("run")
    assert found.loc["cmdp-chance", ["budget", "csr"]].tolist() == [2.0, 1.0]
    assert width(found.loc["cmdp"]) < width(
        tables.equal_csr(table, ROWS, LAMBDAS, 0.5, 0.95).set_index("run").loc["cmdp"]
    )


def test_validity_can_be_compared_and_other_seeds_are_left_out():
    table = contested()
    table.loc[table["run"] == "cmdp-chance", "right"] = 0.9
    assert equal(table, measure="validity")["validity"] == pytest.approx(0.9)
    assert equal(table[(table["run"] != "soft-0.2") | (table["seed"] < 2)])["seeds"] == 2


def test_the_curve_is_in_the_order_of_lambda():
    about = {name: ROWS[name] for name in ("soft-1.2", "soft-0.2", "cmdp")}
    chosen = {"soft-1.2": {"lam": 1.2}, "soft-0.2": {"lam": 0.2}, "cmdp": {"lam": 3.0}}
    assert list(tables.soft_lambdas(about, chosen).items()) == [("soft-0.2", 0.2), ("soft-1.2", 1.2)]


# ---- the other tables ----


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
    assert tables.soft_lambdas(about, {"grpo-with-budget": {"lam": 0.5}}) == {}


def test_differences_are_paired_over_the_seeds_that_both_have():
    table = completions()
    ours = table[table["run"] == "cmdp"]
    mean, low, high, seeds = tables.difference(ours[ours["seed"] < 3], ours[ours["seed"] > 0], "correct")
    assert (mean, low, high, seeds) == (0.0, 0.0, 0.0, 2)  # the same completions: no difference, and none in any draw
    shifted = ours.assign(correct=ours["correct"] - 0.25)
    assert tables.difference(ours, shifted, "correct")[:3] == pytest.approx((0.25, 0.25, 0.25))


def test_an_ablation_is_compared_with_the_run_that_it_changes():
    table = pd.concat([completions(), completions().query("run == 'gkd'").assign(run="gkd-more-prompts")])
    about = ROWS | {
        "gkd-more-prompts": row("gkd-more-prompts", family="ablation", tuned="gkd", settings={"more": 1}),
        "cmdp-at-0.3": row("cmdp-at-0.3", family="budget", tuned="cmdp", settings={"budget": 0.3, "margin": 0.1}),
    }
    found = tables.ablations(table, about, 0.5)
    assert set(zip(found["run"], found["baseline"], strict=True)) == {("gkd-more-prompts", "gkd")}
    assert (found[["difference", "low", "high"]] == 0).all(axis=None)


def test_a_valid_derivation_wins_and_two_alike_tie():
    table = completions(cmdp={"valid": 1.0}, grpo={"valid": 0.0}, gkd={"valid": 1.0})
    found = tables.wins(table, [("cmdp", "grpo"), ("cmdp", "gkd")]).set_index("baseline")
    assert tuple(found.loc["grpo", ["win_rate", "ties"]]) == (1.0, 0.0)
    assert tuple(found.loc["gkd", ["win_rate", "ties"]]) == (0.5, 1.0)


def test_ranges_say_which_trials_are_near_the_best_by_score():
    trials = [
        ("soft", 0.5, 1e-4, 0.5),
        ("soft", 0.5, 1e-3, 0.77),
        ("soft", 0.5, 2e-3, 0.8),
        ("cmdp", 1.0, 1e-3, -0.04),  # no trial keeps the constraint
        ("cmdp", 2.0, 1e-3, -0.05),
    ]
    table = pd.DataFrame(trials, columns=["run", "lam", "learning_rate", "score"])
    table = table.assign(trial=0, seeds=1, accuracy=0.5, csr=0.9, cost=0.1, chosen=0)
    found = tables.ranges(table, near=0.05)
    assert found.to_dict("split")["data"] == [
        ["soft", "learning_rate", 2e-3, 1e-3, 2e-3, 1e-4, 2e-3, 2, 3],
        ["cmdp", "lam", 1.0, 1.0, 1.0, 1.0, 2.0, 1, 2],
    ]


def test_every_completion_is_in_one_bin_of_the_budget():
    table = completions()
    found = tables.violation(table, ["cmdp", "grpo"], 0.5)
    assert found.groupby("run")["count"].sum().tolist() == [960, 960]
    within = found[(found["run"] == "cmdp") & (found["high"] <= 1)]["count"].sum()
    assert within == (table[table["run"] == "cmdp"]["cost"] <= 0.5).sum()


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
