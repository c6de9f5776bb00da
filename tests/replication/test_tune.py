"""Settings are chosen by code, from trials of equal effort."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from cmdp.storage import read_yaml, write_table
from replication import tune

ROOT = Path(__file__).parents[2]


def write_trials(folder: Path, accuracy_within: dict[str, list[float]], seeds: tuple[int, ...] = (1, 2)) -> None:
    """Trials of each run, by how they did; accuracy is the other way round."""
    for run, found in accuracy_within.items():
        rows = [
            {"index": index, "seed": seed, "lam": None, "learning_rate": 10.0**-index}
            | {"accuracy": 1 - value, "csr": 0.9, "accuracy_within": value + 0.1 * (seed - 1.5), "cost": 1.0}
            for index, value in enumerate(found)
            for seed in seeds
        ]
        write_table(pd.DataFrame(rows), folder / f"{run}.csv")


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    methods = {"grpo": "grpo", "gkd-grpo-weak": "gkd-grpo", "gkd-grpo-strong": "gkd-grpo", "cmdp-hinge": "cmdp-hinge"}
    tuning = {
        "best": {"soft": ["gkd-grpo"], "ours": ["cmdp-hinge"]},
        "derived": {"trl-grpo": {"from": "grpo"}, "by-accuracy": {"from": "grpo", "by": "accuracy"}},
        "trials": {run: {"method": method, "grid": []} for run, method in methods.items()},
    }
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump({"tuning": tuning}))
    values = {"grpo": [0.4, 0.6], "gkd-grpo-weak": [0.5, 0.5], "gkd-grpo-strong": [0.7, 0.6], "cmdp-hinge": [0.1, 0.2]}
    write_trials(tmp_path / "results" / "tuning", values)
    return tmp_path / "results"


def test_the_best_trial_by_the_criterion_is_chosen_and_of_equal_ones_the_first(results):
    tune.write_choice(results)
    assert read_yaml(results / "chosen.yaml") == {
        "best": {"soft": "gkd-grpo-strong", "ours": "cmdp-hinge"},
        "runs": {
            "sft": {},
            "cmdp-hinge": {"learning_rate": 0.1},
            "gkd-grpo-strong": {"learning_rate": 1.0},
            "gkd-grpo-weak": {"learning_rate": 1.0},
            "grpo": {"learning_rate": 0.1},
            "trl-grpo": {"learning_rate": 0.1},
            "by-accuracy": {"learning_rate": 1.0},
        },
    }
    table = pd.read_csv(results / "tuning.csv")
    assert table.query("chosen == 1").set_index("run")["index"].to_dict() == {
        "cmdp-hinge": 1,
        "gkd-grpo-strong": 0,
        "gkd-grpo-weak": 0,
        "grpo": 1,
    }
    assert set(table["seeds"]) == {2}
    assert table.query("run == 'grpo'")["accuracy_within"].tolist() == pytest.approx([0.4, 0.6])  # mean over seeds


def test_trials_of_other_seeds_are_not_compared(results):
    write_trials(results / "tuning", {"grpo": [0.4, 0.6]}, seeds=(1, 3))
    with pytest.raises(ValueError, match="were not all run with the same seeds: finish `make tune`"):
        tune.write_choice(results)


def test_no_trials_are_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There are no trials in .*: run `make tune` first"):
        tune.trials(tmp_path)


def test_the_committed_choice_is_that_of_the_committed_trials(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "tuning").symlink_to(ROOT / "results" / "tuning")
    tune.write_choice(tmp_path)
    for name in ("chosen.yaml", "tuning.csv"):
        assert (tmp_path / name).read_bytes() == (ROOT / "results" / name).read_bytes(), name


def test_every_run_is_tuned_with_as_many_trials_and_has_settings():
    trials = tune.trials(ROOT / "results" / "tuning")
    assert trials.groupby("run").size().nunique() == 1
    tuning = read_yaml(ROOT / "experiments.yaml")["tuning"]
    assert set(trials["run"]) == set(tuning["trials"])
    chosen = read_yaml(ROOT / "results" / "chosen.yaml")["runs"]
    assert set(chosen) == {"sft", *tuning["trials"], *tuning["derived"]}
    for run, about in tuning["trials"].items():
        assert chosen[run] in [{name: float(value) for name, value in trial.items()} for trial in about["grid"]], run
