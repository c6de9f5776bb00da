"""The pipeline's training stages, on tiny models: what they write, and from which settings."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from cmdp.models import build_model, build_tokenizer, load_pair
from cmdp.tasks import arithmetic
from replication import cli, run
from replication.experiments import COLUMNS

PARAMS = {
    "task": {
        "name": "arithmetic",
        "seed": 0,
        "steps": [2, 3],
        "sizes": {"test": 4, "validation": 4, "train": 8},
    },
    "start": {"student": {"layers": 1, "hidden": 16, "heads": 2, "max_steps": 2, "learning_rate": 0.01}},
    "supervised": {
        "sizes": {"test": 4, "supervised": 8},
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
        "seed": 0,
    },
    "budget": {"budget": 1.5, "budget_form": "total"},
    "train": {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "learning_rate": 0.001,
        "logging_steps": 1,
        "use_cpu": True,
    },
    "evaluate": {
        "split": "test",
        "prompts": 3,
        "samples": 2,
        "batch_size": 8,
        "greedy": True,
    },
}
EXPERIMENTS = {
    "runs": {
        "cmdp": {"part": "default", "method": "cmdp", "tuned": "cmdp", "seeds": [0, 1]},
        "sft": {"part": "default", "method": "sft", "tuned": "sft", "seeds": [0]},
        "dual-at-1": {"method": "dual", "tuned": "dual", "settings": {"budget": 1.0}, "seeds": [3, 4]},
        "untuned": {"method": "gkd", "tuned": "gkd", "seeds": [0]},
    },
    "tuning": {
        **{"seeds": [100, 101], "samples": 2, "trials": 4, "further": 1, "ladder": 2.0, "csr": 0.5},
        "start": {"learning_rate": 1e-3},
        "entries": {
            "grpo": {"method": "grpo", "by": "accuracy", "fixed": {}},
            "cmdp": {"method": "cmdp", "by": "constrained", "fixed": {"penalty": 0.5}, "start": {"lam": 1.0}},
        },
    },
}
CHOSEN = {"runs": {"sft": {}, "cmdp": {"lam": 0.3}, "dual": {"dual_rate": 0.1, "lam": 0.5}}}


@pytest.fixture(autouse=True)
def _in_a_small_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMDP_TRACEBACK", "")
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS))
    Path("experiments.yaml").write_text(yaml.safe_dump(EXPERIMENTS, sort_keys=False))
    Path("results").mkdir()
    Path("results/chosen.yaml").write_text(yaml.safe_dump(CHOSEN))
    tokenizer = build_tokenizer(arithmetic.vocabulary())
    for seed, role in enumerate(("student", "teacher")):
        build_model(tokenizer, layers=1, hidden=16, heads=2, seed=seed).save_pretrained(f"results/start/{role}")
        tokenizer.save_pretrained(f"results/start/{role}")


def test_a_default_run_keeps_every_table_of_all_its_seeds():
    run.run("cmdp")
    folder = Path("results/runs/default/cmdp")
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    assert set(tables) == {"completions", "exact", "positions", "training", "times"}
    counts = tables["completions"].groupby(["seed", "decoding"]).size().to_dict()
    assert counts == {(seed, decoding): n for seed in (0, 1) for decoding, n in (("sampled", 6), ("greedy", 3))}
    assert tables["training"]["seed"].tolist() == [0, 1]
    assert len(tables["positions"]) == 2 * 8
    exact = tables["exact"]
    assert list(exact.columns) == ["seed", "prompt", "right", "step_1", "step_2", "step_3"]
    assert len(exact) == 2 * 4
    assert (exact["right"] < exact.filter(like="step_").prod(axis=1)).all()  # it has to end, too
    assert (tables["times"][["steps", "parameters"]] > 0).all(axis=None)
    assert (tables["times"]["seconds"] > 0).all()
    record = json.loads(Path("models/default/cmdp/1/cmdp.json").read_text())
    assert (record["seed"], record["settings"]["lam"], record["settings"]["budget"]) == (1, 0.3, 1.5)
    assert not list(Path("checkpoints").rglob("checkpoint-*"))


def test_a_run_of_the_study_keeps_compact_completions_and_takes_its_own_settings():
    run.run("dual-at-1")
    folder = Path("results/runs/study/dual-at-1")
    assert {path.name for path in folder.iterdir()} == {"completions.csv", "exact.csv", "times.csv"}
    table = pd.read_csv(folder / "completions.csv", keep_default_na=False)
    assert list(table.columns) == COLUMNS
    assert table.groupby("seed").size().to_dict() == {3: 9, 4: 9}
    assert table["cost"].round(4).equals(table["cost"])
    settings = json.loads(Path("models/study/dual-at-1/3/cmdp.json").read_text())["settings"]
    assert (settings["budget"], settings["lam"], settings["dual_rate"]) == (1.0, 0.5, 0.1)


def test_the_start_itself_is_measured_and_not_trained():
    run.run("sft")
    start, end = (Path(folder) / "model.safetensors" for folder in ("results/start/student", "models/default/sft/0"))
    assert start.read_bytes() == end.read_bytes()
    assert pd.read_csv("results/runs/default/sft/training.csv").empty


def test_the_chances_of_a_right_completion_are_those_of_its_tokens(monkeypatch):
    """Against one forward pass per problem, without padding."""
    student, _, tokenizer = load_pair("results/start/student", "results/start/teacher", use_cpu=True)
    problems = arithmetic.problems({"test": 6}, [2, 3], 1)["test"]
    table = run.chances(student, tokenizer, problems)
    for (_, row), problem in zip(table.iterrows(), problems, strict=True):
        prompt, solution = (
            tokenizer(problem[key], add_special_tokens=False).input_ids for key in ("prompt", "solution")
        )
        ids = torch.tensor([[*prompt, *solution, tokenizer.eos_token_id]])
        with torch.no_grad():
            probabilities = (
                student(ids).logits[0].softmax(-1)[range(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]]
            )
        assert row.filter(like="step_").dropna().tolist() == pytest.approx(probabilities[:-1].tolist(), rel=1e-4)
        assert row["right"] == pytest.approx(float(probabilities.prod()), rel=1e-4)


def test_trials_walk_the_ladders_from_the_best_so_far(monkeypatch):
    """The score prefers learning rates near 4e-3: the last of the trials goes on from the edge of the first three, and
    one more beyond its own."""
    monkeypatch.setattr(run, "train", lambda *_, **__: None)
    monkeypatch.setattr(run, "load_trained", lambda *_: None)
    planned = []

    def measure(experiment, *_, **__):
        (settings,) = experiment.runs.values()
        planned.append(settings)
        right = 1 - abs(settings["learning_rate"] - 4e-3) * 100
        return pd.DataFrame({"correct": [right], "cost": [0.1], "tokens": [3]}), None

    monkeypatch.setattr(run, "measure", measure)
    run.trial("grpo")
    table = pd.read_csv("results/tuning/grpo.csv")
    assert list(table.columns) == ["trial", "seed", "learning_rate", "accuracy", "csr", "cost", "score"]
    assert table["learning_rate"].tolist() == [1e-3, 1e-3, 5e-4, 5e-4, 2e-3, 2e-3, 4e-3, 4e-3, 8e-3, 8e-3]
    assert table["seed"].tolist() == [100, 101] * 5
    assert table["score"].is_unique is False
    assert table["score"].idxmax() == 6
    planned.clear()
    run.trial("cmdp")
    rates = [(settings["learning_rate"], settings["lam"]) for settings in planned[::2]]
    assert rates == [(1e-3, 1.0), (5e-4, 1.0), (1e-3, 0.5), (2e-3, 1.0), (4e-3, 1.0)]
    assert all(settings["penalty"] == 0.5 for settings in planned)


def test_trials_are_trained_and_measured_on_validation_prompts():
    experiments = EXPERIMENTS | {"tuning": EXPERIMENTS["tuning"] | {"trials": 1, "further": 0, "seeds": [100]}}
    Path("experiments.yaml").write_text(yaml.safe_dump(experiments, sort_keys=False))
    run.trial("cmdp")
    row = pd.read_csv("results/tuning/cmdp.csv").iloc[0]
    assert row["score"] == (row["accuracy"] if row["csr"] >= 0.5 else row["csr"] - 1)
    assert Path("models/tuning/cmdp-0/100/model.safetensors").is_file()


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_start_model_is_trained_on_solutions(logging_steps):
    supervised = PARAMS["supervised"] | {"logging_steps": logging_steps}
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS | {"supervised": supervised}))
    before = Path("results/start/student/model.safetensors").read_bytes()
    run.pretrain("student")
    assert Path("results/start/student/model.safetensors").read_bytes() != before
    assert not list(Path("checkpoints").rglob("checkpoint-*"))


def test_a_cut_table_of_tuning_is_said_in_one_line():
    tuning = {name: value for name, value in EXPERIMENTS["tuning"].items() if name != "start"}
    Path("experiments.yaml").write_text(yaml.safe_dump({"tuning": tuning}))
    with pytest.raises(ValueError, match=r"experiments\.yaml: tuning has no start"):
        run.trial("cmdp")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "cmdp-adptive"), r"experiments\.yaml has no run 'cmdp-adptive'. It has: cmdp, sft"),
        (("run", "untuned"), r"results/chosen\.yaml has no settings of 'gkd'"),
        (("trial", "ppo"), r"experiments\.yaml tunes no 'ppo', but grpo, cmdp"),
        (("pretrain", "giant"), r"params\.yaml has no start model 'giant'. It has: student"),
        (("tables", "default"), r"There is no results/runs/default/cmdp/.*csv: run `dvc repro run@cmdp` first"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["replication", *words])
    with pytest.raises(SystemExit, match=message) as raised:
        cli.main()
    assert "\n" not in str(raised.value)
