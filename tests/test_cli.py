"""The commands: what they write, and the one line that they say when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cmdp import cli
from cmdp.tasks import arithmetic
from replication.run import COLUMNS

ROOT = Path(__file__).parents[1]
PARAMS = {
    "threads": 1,
    "task": {"name": "arithmetic", "seed": 0, "steps": [2, 3], "sizes": {"test": 4, "train": 8, "supervised": 8}},
    "budget": {"budget": 1.5, "budget_form": "total"},
    "train": {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8},
    "runs": {"sft": {}, "cmdp": {"lam": 1.0}},
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "set_up", lambda params, offline: None)
    monkeypatch.setenv("CMDP_TRACEBACK", "")


def run(monkeypatch, *arguments: str, **changes) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS | changes))
    monkeypatch.setattr(sys, "argv", ["cmdp", *arguments])
    cli.main()


def pair(folder: str, words: list[str]) -> None:
    from cmdp.models import build_model, build_tokenizer

    tokenizer = build_tokenizer(words)
    build_model(tokenizer, layers=1, hidden=16, heads=2, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_data_writes_disjoint_splits_of_the_sizes_asked_for(monkeypatch):
    run(monkeypatch, "data")
    prompts = {
        path.stem: [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        for path in Path("data").iterdir()
    }
    assert {name: len(rows) for name, rows in prompts.items()} == PARAMS["task"]["sizes"]
    assert len({prompt for rows in prompts.values() for prompt in rows}) == 20


def test_training_saves_safetensors_and_no_pickle_and_drops_its_checkpoints(monkeypatch):
    run(monkeypatch, "data")
    pair("models/student", arithmetic.vocabulary())
    pair("models/teacher", arithmetic.vocabulary())
    run(monkeypatch, "train", "cmdp", "0")
    files = {path.name for path in Path("models/runs/cmdp/0").iterdir()}
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert not Path("checkpoints/cmdp/0").exists()
    assert len(Path("results/training/cmdp/0.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("supervised", "teacher"), "There are no problems at data/supervised.jsonl"),
        (("train", "cmdp", "0"), "There is no model at models/student"),
        (("train", "ppo", "0"), "A run is named for one of"),
        (("choose",), "There are no trials in results/tuning"),
    ],
)
def test_what_is_missing_is_said_in_one_line(monkeypatch, arguments, message):
    changes = {"teacher": {"layers": 1, "hidden": 16, "heads": 2, "max_steps": 1, "learning_rate": 0.1}}
    with pytest.raises(SystemExit, match=message) as raised:
        run(monkeypatch, *arguments, supervised={"seed": 0}, **changes)
    assert "\n" not in str(raised.value)


def test_another_vocabulary_and_a_wrong_budget_are_refused_before_anything_is_written(monkeypatch):
    run(monkeypatch, "data")
    pair("models/student", ["a", "b"])
    pair("models/teacher", ["a", "c"])
    with pytest.raises(SystemExit, match="different vocabularies"):
        run(monkeypatch, "train", "cmdp", "0")
    pair("models/teacher", ["a", "b"])
    with pytest.raises(SystemExit, match="The budget must be 0 nats or more"):
        run(monkeypatch, "train", "cmdp", "0", budget={"budget": -1.0, "budget_form": "total"})
    assert not Path("models/runs").exists()
    assert not Path("results").exists()


EVALUATE = {
    "split": "test",
    "prompts": 3,
    "samples": 2,
    "batch_size": 8,
    "greedy": True,
    "longer": {"steps": [4, 5], "prompts": 2, "samples": 1, "max_completion_length": 12},
}


@pytest.mark.parametrize("method", ["dual", "minillm", "kdrl", "worst-case", "cmdp-adaptive", "trl-grpo", "trl-gkd"])
def test_an_arm_of_the_study_trains_and_measures_every_seed(monkeypatch, method):
    run(monkeypatch, "data")
    pair("models/student", arithmetic.vocabulary())
    pair("models/teacher", arithmetic.vocabulary())
    own = {"dual": {"dual_rate": 0.1}, "worst-case": {"step_budget": 0.1}}.get(method, {})
    about = {"family": "method", "run": method, "start": "student", "set": own, "seeds": [3, 4]}
    Path("study").mkdir()
    Path("study/params.yaml").write_text(yaml.safe_dump({"arms": {"one": about}}))
    run(monkeypatch, "arm", "one", evaluate=EVALUATE, runs={method: {}})
    table = pd.read_csv("results/study/arms/one.csv", keep_default_na=False)
    assert list(table.columns) == COLUMNS
    assert table.groupby(["seed", "split"]).size().to_dict() == {
        (seed, split): count for seed in (3, 4) for split, count in (("test", 6), ("longer", 2))
    }
    times = pd.read_csv("models/arms/one.csv")
    assert times["seed"].tolist() == [3, 4]
    assert (times["seconds"] > 0).all()
    assert not list(Path("checkpoints").glob("study/*"))


def test_an_arm_of_a_run_that_was_not_tuned_is_refused(monkeypatch):
    Path("study").mkdir()
    about = {"family": "method", "run": "grpo", "start": "student", "seeds": [0]}
    Path("study/params.yaml").write_text(yaml.safe_dump({"arms": {"one": about}}))
    with pytest.raises(SystemExit, match=r"tuning/chosen.yaml has no settings of grpo: .* `make tune`"):
        run(monkeypatch, "arm", "one", evaluate=EVALUATE)


def test_trials_are_judged_by_the_mean_of_their_seeds(monkeypatch):
    sizes = {"test": 4, "validation": 4, "train": 8, "supervised": 8}
    task = PARAMS["task"] | {"sizes": sizes}
    pair("models/student", arithmetic.vocabulary())
    pair("models/teacher", arithmetic.vocabulary())
    run(monkeypatch, "data", task=task)
    grid = {name: [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}] for name in ("grpo", "gkd")}
    Path("tuning").mkdir()
    Path("tuning/params.yaml").write_text(yaml.safe_dump({"seeds": [100, 101], "samples": 2, "grid": grid}))
    for name in grid:
        for index in ("0", "1"):
            run(monkeypatch, "trial", name, index, task=task, evaluate=EVALUATE)
    row = pd.read_csv("results/tuning/gkd-1.csv")
    assert row[["run", "index", "seed", "learning_rate"]].to_numpy().tolist() == [
        ["gkd", 1, 100, 2e-3],
        ["gkd", 1, 101, 2e-3],
    ]
    assert not list(Path("checkpoints").glob("tuning/*"))
    for name in grid:  # the second trial of each is best by the mean of its seeds, though not with the first
        for index, shares in enumerate(((0.5, 0.1), (0.4, 0.4))):
            path = Path(f"results/tuning/{name}-{index}.csv")
            pd.read_csv(path).assign(accuracy_within=shares).to_csv(path, index=False)
    for name in ("gkd-grpo-weak", "cmdp-adaptive"):  # of each family whose best is named
        pd.read_csv("results/tuning/gkd-0.csv").assign(run=name).to_csv(f"results/tuning/{name}-0.csv", index=False)
    run(monkeypatch, "choose")
    chosen = yaml.safe_load(Path("tuning/chosen.yaml").read_text())
    assert chosen["runs"]["gkd"] == chosen["runs"]["trl-gkd"] == {"learning_rate": 2e-3}
    table = pd.read_csv("results/tuning.csv").query("run == 'grpo'")
    assert table[["accuracy_within", "seeds", "chosen"]].to_numpy().tolist() == [[0.3, 2, 0], [0.4, 2, 1]]
    pd.read_csv("results/tuning/grpo-0.csv").head(1).to_csv("results/tuning/grpo-0.csv", index=False)
    with pytest.raises(SystemExit, match="Not every trial in results/tuning was run with the same seeds"):
        run(monkeypatch, "choose")


def test_evaluation_writes_completions_positions_longer_problems_and_examples(monkeypatch):
    run(monkeypatch, "data")
    pair("models/student", arithmetic.vocabulary())
    pair("models/teacher", arithmetic.vocabulary())
    run(monkeypatch, "train", "sft", "0")
    run(monkeypatch, "evaluate", "sft", evaluate=EVALUATE, seeds=[0])
    sizes = {name: len(pd.read_csv(f"results/{name}/sft/0.csv")) for name in ("runs", "positions", "longer")}
    assert sizes == {"runs": 3 * (2 + 1), "positions": 8, "longer": 2}
    examples = pd.read_csv("results/examples/sft/0.csv")
    assert list(examples.columns) == ["run", "seed", "prompt", "completion", "problem"]


def test_a_stage_computes_with_the_threads_that_the_parameters_say():
    """OpenMP reads their number when torch is loaded, so that nothing may load it before `set_up`: two stages side by
    side would else wait for each other's threads."""
    code = (
        "from cmdp import cli; cli.set_up({'threads': 1}, offline=True); import torch; print(torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "1\n"
