"""Settings are chosen by code, from trials of equal effort."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from cmdp.methods import METHODS
from cmdp.storage import read_yaml, write_table
from replication import tune
from replication.experiments import rows

ROOT = Path(__file__).parents[2]
ENTRIES = {
    "grpo": {"method": "grpo", "fixed": {}},
    "soft-0.3": {"method": "gkd-grpo", "fixed": {"lam": 0.3}},
    "soft-0.6": {"method": "gkd-grpo", "fixed": {"lam": 0.6}},
    "cmdp": {"method": "cmdp", "fixed": {}, "start": {"lam": 1.0}},
    "cmdp-by-token": {"method": "cmdp", "fixed": {"credit": "return_to_go"}, "start": {"lam": 1.0}},
    "cmdp-chance": {"method": "cmdp-chance", "fixed": {}},
}
TUNING = {"seeds": [1, 2], "samples": 1, "trials": 3, "further": 1, "ladder": 10.0, "csr": 0.95}
TUNING |= {"start": {"learning_rate": 0.1}}
TUNING |= {"derived": {"trl-grpo": "grpo"}}
FOUND = {  # accuracy and CSR of each trial; the score is the accuracy, but for cmdp's
    "grpo": [(0.4, 0.1), (0.9, 0.1), (0.8, 0.1)],
    "soft-0.3": [(0.7, 0.90), (0.8, 0.90), (0.6, 0.90)],
    "soft-0.6": [(0.5, 0.97), (0.6, 0.97), (0.6, 0.97)],
    "cmdp": [(0.8, 0.90), (0.5, 0.96), (0.9, 0.1)],
    "cmdp-by-token": [(0.5, 0.91), (0.4, 0.92), (0.3, 0.93)],
    "cmdp-chance": [(0.7, 0.96), (0.6, 0.96), (0.5, 0.96)],
}


def write_trials(folder: Path, seeds: tuple[int, ...] = (1, 2)) -> None:
    for name, found in FOUND.items():
        by_constraint = name.startswith("cmdp")
        rows = [
            {"trial": trial, "seed": seed, **ENTRIES[name]["fixed"], **ENTRIES[name].get("start", {})}
            | {"learning_rate": 10.0**-trial, "accuracy": accuracy + 0.1 * (seed - 1.5), "csr": csr, "cost": 1.0}
            | {"score": accuracy if not by_constraint or csr >= 0.95 else csr - 1}
            for trial, (accuracy, csr) in enumerate(found)
            for seed in seeds
        ]
        write_table(pd.DataFrame(rows), folder / f"{name}.csv")


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump({"tuning": TUNING | {"entries": ENTRIES}}))
    write_trials(tmp_path / "results" / "tuning")
    return tmp_path / "results"


def test_each_entry_takes_its_best_trial_and_of_equal_ones_the_first(results):
    tune.write_choice(results)
    chosen = read_yaml(results / "chosen.yaml")
    assert chosen["runs"] == {
        "sft": {},
        "grpo": {"learning_rate": 0.1},
        "soft-0.3": {"lam": 0.3, "learning_rate": 0.1},
        "soft-0.6": {"lam": 0.6, "learning_rate": 0.1},
        "cmdp": {"learning_rate": 0.1, "lam": 1.0},
        "cmdp-by-token": {"credit": "return_to_go", "learning_rate": 0.01, "lam": 1.0},
        "cmdp-chance": {"learning_rate": 1.0},
        "trl-grpo": {"learning_rate": 0.1},
    }
    table = pd.read_csv(results / "tuning.csv")
    assert list(table)[:3] == ["run", "trial", "seeds"]
    assert list(table)[-5:] == ["accuracy", "csr", "cost", "score", "chosen"]
    best = table.query("chosen == 1").set_index("run")["trial"].to_dict()
    assert best == {"grpo": 1, "soft-0.3": 1, "soft-0.6": 1, "cmdp": 1, "cmdp-by-token": 2, "cmdp-chance": 0}
    assert set(table["seeds"]) == {2}
    assert table.query("run == 'grpo'")["accuracy"].tolist() == pytest.approx([0.4, 0.9, 0.8])  # mean over seeds


def test_the_best_of_a_role_keeps_the_constraint_where_any_does(results):
    tune.write_choice(results)
    # soft-0.3 is more accurate and violates more; of the two readings of cmdp one keeps the constraint
    assert read_yaml(results / "chosen.yaml")["best"] == {"soft": "soft-0.6", "subject": "cmdp", "ours": "cmdp-chance"}


def test_below_the_target_the_higher_csr_is_better():
    trials = pd.DataFrame({"accuracy": [0.9, 0.2, 0.1], "csr": [0.5, 0.94, 0.95]})
    assert tune.under_constraint(trials, 0.95).tolist() == pytest.approx([-0.5, -0.06, 0.1])


@pytest.mark.parametrize("change", [{"seeds": [1, 3]}, {"seeds": [1]}, {"trials": 4}, {"trials": 1}])
def test_trials_of_unequal_effort_are_not_compared(results, change):
    with pytest.raises(ValueError, match=r"grpo.csv has not the .* trials with seeds .*: finish `make tune`"):
        tune.trials(results / "tuning", TUNING | change | {"entries": ENTRIES})


def test_an_entry_without_trials_is_one_clear_line(results):
    (results / "tuning" / "soft-0.6.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"There are no trials in .*soft-0.6.csv: run `make tune` first"):
        tune.write_choice(results)


def test_every_role_has_entries_and_every_entry_a_method():
    entries = read_yaml(ROOT / "experiments.yaml")["tuning"]["entries"]
    assert {entry["method"] for entry in entries.values()} <= set(METHODS)
    assert set(tune.ROLES.values()) <= {entry["method"] for entry in entries.values()}


def test_the_committed_choice_is_that_of_the_committed_trials(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "tuning").symlink_to(ROOT / "results" / "tuning")
    tune.write_choice(tmp_path)
    for name in ("chosen.yaml", "tuning.csv"):
        assert (tmp_path / name).read_bytes() == (ROOT / "results" / name).read_bytes(), name


def test_every_run_has_settings():
    chosen = read_yaml(ROOT / "results" / "chosen.yaml")["runs"]
    assert {row.tuned for row in rows(ROOT / "experiments.yaml").values()} <= set(chosen)
