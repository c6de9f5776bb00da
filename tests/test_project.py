"""The repository agrees with itself: environments, chosen settings, generated tables, names of files."""

import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cmdp import cli
from cmdp.methods import METHODS, method_of
from cmdp.statistics import with_budget
from cmdp.storage import write_json
from replication import readme as report
from replication import tune as tuning
from replication.tables import difference
from replication.theory.tables import sampled_learners

ROOT = Path(__file__).parents[1]


def declared() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(need for group in project["optional-dependencies"].values() for need in group)]


def test_environment_yml_asks_for_the_packages_and_ranges_of_pyproject():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert sorted(need for need in pip if not need.startswith("-")) == sorted(declared())


def test_requirements_lock_pins_every_declared_package_within_its_range():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines) if pin}
    for need in map(Requirement, declared()):
        assert need.specifier.contains(pins[canonicalize_name(need.name)]), need
    assert not [name for name in pins if name.startswith("nvidia") and name != "nvidia-ml-py"]


def test_chosen_settings_are_those_of_the_best_trial_on_validation_prompts():
    trials = tuning.read_trials(ROOT / "results" / "tuning")
    assert trials.groupby("run").size().nunique() == 1, "every run has the same number of trials"
    best = {row["run"]: tuning.settings_of(row) for _, row in tuning.choose(trials).iterrows()}
    by_accuracy = tuning.choose(trials[trials["run"] == "grpo"], "accuracy").iloc[0]
    unconstrained = {"grpo-by-accuracy": tuning.settings_of(by_accuracy)}
    chosen = yaml.safe_load((ROOT / "tuning" / "chosen.yaml").read_text())["runs"]
    assert chosen == best | {"sft": {}, "trl-grpo": best["grpo"], "trl-gkd": best["gkd"]} | unconstrained


def test_neither_experiment_nor_study_uses_a_seed_of_tuning():
    tuned = set(yaml.safe_load((ROOT / "tuning" / "params.yaml").read_text())["seeds"])
    arms = yaml.safe_load((ROOT / "study" / "params.yaml").read_text())["arms"].values()
    assert not tuned & set(yaml.safe_load((ROOT / "params.yaml").read_text())["seeds"])
    assert not tuned & {seed for arm in arms for seed in arm["seeds"]}


def test_readme_tables_are_those_of_the_results_files():
    text = (ROOT / "README.md").read_text()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert report.readme(text, ROOT / "results", params) == text, "run `cmdp report`"


def test_what_readme_says_of_the_default_experiment_is_so():
    """The prose below the tables, which no command writes."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    soft = yaml.safe_load((ROOT / "tuning" / "chosen.yaml").read_text())["best"]["soft"]
    completions = pd.concat([pd.read_csv(path) for path in (ROOT / "results" / "runs").glob("*/*.csv")])
    sampled = with_budget(completions[completions["decoding"] == "sampled"], **params["budget"])
    by_run = dict(list(sampled.groupby("run")))

    def minus(run: str, column: str) -> tuple:
        return difference(by_run[run], by_run[soft], column)[1:3]

    for column in ("correct", "satisfied", "correct_within"):
        assert minus("cmdp", column)[1] < 0  # stays below on every column
        low, high = minus("cmdp-adaptive", column)
        assert low < 0 < high  # is not told apart on any
    assert minus("cmdp-overshoot", "correct_within")[1] < 0


def test_what_readme_says_of_the_study_is_so():
    """The points below its table, which no command writes."""
    folder = ROOT / "results" / "study"
    summary = pd.read_csv(folder / "summary.csv").set_index(["arm", "measure"])["mean"]
    for arm in ("cmdp-adaptive", "cmdp-adaptive-at-4", "cmdp-adaptive-half"):
        assert summary[arm, "csr"] > 0.95
    assert 0.94 < summary["cmdp-adaptive-at-1", "csr"] < 0.95
    assert summary["cmdp-adaptive-equal", "csr"] == pytest.approx(0.93, abs=0.005)
    frontier = pd.read_csv(folder / "frontier.csv")
    assert frontier.loc[frontier["budget"] == 0.5, "csr"].max() < 0.95  # out of reach for every method, ...
    assert max(summary[arm, "csr"] for arm, _ in summary.index if arm.endswith("-tenth")) < 0.95
    logs = [pd.read_csv(path) for path in (ROOT / "results" / "training" / "cmdp-adaptive").glob("*.csv")]
    assert (pd.concat(logs)["csr"] < METHODS["cmdp-adaptive"]["csr_target"]).mean() > 0.9
    sweep = pd.read_csv(folder / "strength.csv").query("method == 'gkd-grpo' and measure == 'accuracy_within'")
    assert sweep.sort_values("lam")["mean"].is_monotonic_increasing
    differences = pd.read_csv(folder / "ablations.csv").query("measure == 'accuracy_within'").set_index("arm")
    assert differences.loc["gkd-few-prompts", "difference"] == pytest.approx(-0.18, abs=0.01)  # points
    for arm in ("grpo-few-prompts", "cmdp-few-prompts"):
        assert differences.loc[arm, "low"] < 0 < differences.loc[arm, "high"]
    rows = pd.read_csv(folder / "summary.csv").query("family == 'method' and measure == 'accuracy_within'")
    ours = rows[rows["start"] == "student"].set_index("arm")["mean"]
    assert ours.idxmax() == "trl-gkd"
    assert abs(ours["cmdp"] - ours["sft"]) < 0.02  # about where it began
    trials = pd.read_csv(ROOT / "results" / "tuning.csv").query("run == 'cmdp' and lam == 0.3")
    assert trials.sort_values("learning_rate")["csr"].is_monotonic_decreasing
    assert differences.loc["cmdp-single-step", "difference"] > 0
    assert differences.loc["gkd-grpo-both-parts", "high"] < 0


def test_what_readme_says_of_the_learners_on_trees_is_so():
    """The prose beside the table, which no command writes."""
    table = sampled_learners(ROOT / "results" / "theory")
    section_3, ours = table.loc["cmdp"], table.loc["cmdp-hinge-margin"]
    assert section_3["of_optimum_gain_low"] < 0  # does not beat the soft Lagrangian
    assert ours["of_optimum_gain_low"] > 0
    assert ours["of_optimum"] > 0.98
    assert ours["csr"] > 0.99


def test_before_the_study_has_run_its_tables_stay_as_they_are(tmp_path):
    for part in ("runs", "theory", "summary.csv", "tuning.csv"):
        (tmp_path / part).symlink_to(ROOT / "results" / part)
    text = (ROOT / "README.md").read_text()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert report.readme(text.replace("| run |", "| RUN |", 1), tmp_path, params) == text


def test_the_laptop_table_says_what_was_measured_and_on_what(tmp_path):
    profile = yaml.safe_load((ROOT / "profiles" / "laptop.yaml").read_text()) | {"methods": ["sft", "gkd"]}
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    measures = {"accuracy": 0.25, "csr": 0.5, "kl_per_token": 0.1234, "cost": 12.0}
    columns = ["run", "measure", "mean", "low", "high"]
    rows = [(run, name, value, value / 2, value * 2) for run in ("sft", "gkd") for name, value in measures.items()]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "summary.csv", index=False)
    times = {
        "run": ["sft", "gkd"],
        "time/generation": [None, 9.6],
        "time/scoring": [None, 5.2],
        "time/update": [None, 20],
    }
    pd.DataFrame(times).to_csv(tmp_path / "timing.csv", index=False)
    for run, taken in (("sft", 1.0), ("gkd", 4.7)):
        memory = {"device": "a processor", "threads": 1, "summed_gib": 6.4, "taken_gib": taken}
        write_json(memory, tmp_path / "memory" / run / "0.json")
    text = report.laptop_table(tmp_path)
    assert "| sft | 25.0 [12.5, 50.0] | 50.0 [25.0, 100.0] | 0.123 [0.062, 0.247] | 12.0 [6.0, 24.0] | - |" in text
    assert "| 10, 5, 20 |" in text
    batch = profile["train"]["per_device_train_batch_size"] * profile["train"]["gradient_accumulation_steps"]
    assert f"{profile['train']['max_steps']} steps of {batch} completions" in text
    assert "On a processor, 1 thread(s) a run; memory 4.7 GiB, 6.4 by the sum" in text


def test_a_missing_marker_is_an_error():
    with pytest.raises(ValueError, match="lacks the markers of 'results'"):
        report.fill("nothing here", "results", "table")


def test_every_run_of_every_profile_names_a_method():
    for path in [ROOT / "params.yaml", *(ROOT / "profiles").glob("*.yaml")]:
        for run in yaml.safe_load(path.read_text()).get("methods", []):
            assert method_of(run) in {"sft", *METHODS}
    with pytest.raises(ValueError, match="A run is named for one of"):
        method_of("ppo")


def test_an_overlay_replaces_what_it_names_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("a: {b: 1, c: 2}\nd: [1, 2]\n")
    (tmp_path / "top.yaml").write_text("a: {b: 3}\nd: [4]\n")
    assert cli.read_params(Path("base.yaml"), Path("top.yaml")) == {"a": {"b": 3, "c": 2}, "d": [4]}
