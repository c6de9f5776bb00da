"""The command for a GPU, on a small local model of the profiles' architecture, and its verdicts."""

import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from test_models import write_model

from cmdp.train import read
from replication import profile

ROOT = Path(__file__).parents[2]
COMMAND = re.search(r"PROFILE=\"(paper [^\"]*)", (ROOT / "docs" / "models.md").read_text())[1]
ON_ONE_GPU = [word for word in COMMAND.split()[1:] if word != "\\" and not word.startswith("train.max_steps")]
ROWS = [{"prompt": prompt, "answer": "#### 1"} for prompt in ("a b", "b c", "c d", "d a", "a c", "b d")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A profile of small Qwen2 models, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    models = {
        role: {"model": write_model(tmp_path / role, "qwen2", seed)} for seed, role in enumerate(("student", "teacher"))
    }
    pd.DataFrame(ROWS).to_json("rows.jsonl", orient="records", lines=True)
    settings = {
        "task": {
            "name": "gsm",
            "source": "rows.jsonl",
            "sizes": {"train": 4, "test": 2},
            "seed": 0,
            "prompt_length": 8,
        },
        **models,
        "budget": {"budget": 0.15, "budget_form": "per_token"},
        "train": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 4,
            "save_steps": 2,
            "use_cpu": True,
        },
        "runs": {"sft": {"method": "sft"}, "cmdp": {"method": "cmdp", "lam": 1.0}},
        "seeds": [0],
        "evaluate": {"split": "test", "prompts": 2, "samples": 2, "batch_size": 4},
    }
    Path("profiles").mkdir()
    Path("profiles/tiny.yaml").write_text(yaml.safe_dump(settings))


def test_one_command_trains_measures_and_judges_and_is_not_repeated(here, capsys):
    profile.run("tiny")
    table = pd.read_csv("results/tiny/claims.csv")
    assert list(table["id"]) == ["C4"]
    assert table["verdict"][0] in ("replicated", "not replicated", "inconclusive")
    said = capsys.readouterr()
    assert "in all (generation" in said.out  # the fit
    assert "for the rest of this run" in said.err  # from a measured step
    profile.run("tiny")
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides"), [("colab", []), ("gsm8k", []), ("paper", ON_ONE_GPU)])
def test_the_profiles_run_as_they_stand_on_small_models(here, name, overrides):
    """All methods, LoRA and 4 bits as the profile says; other models, fewer prompts, steps and tokens."""
    own = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text())
    tiny = yaml.safe_load(Path("profiles/tiny.yaml").read_text())
    for role in ("student", "teacher"):
        own[role] |= tiny[role]
    tiny["task"]["name"] = own["task"]["name"]
    for section in ("task", "train", "evaluate"):
        own[section] |= tiny[section]
    own["task"].pop("test", None)
    own["train"]["gradient_accumulation_steps"] = 2  # a batch of all four prompts
    Path(f"profiles/{name}.yaml").write_text(yaml.safe_dump(own | {"seeds": [0]}))
    profile.run(name, *overrides)
    name = read(Path(f"profiles/{name}.yaml"), *overrides).name
    assert set(pd.read_csv(f"results/{name}/summary.csv")["run"]) == set(own["runs"])
    table = pd.read_csv(f"results/{name}/claims.csv")
    assert list(table["id"]) == ["C5" if name == "math" else "C4"]
    assert table["verdict"][0] in ("replicated", "not replicated", "inconclusive")


def completions(costs: dict[str, float], right: dict[str, float], prompts: int = 200) -> pd.DataFrame:
    tables = [
        pd.DataFrame({"run": run, "seed": 0, "decoding": "sampled", "prompt": range(prompts), "tokens": 10})
        .assign(cost=[cost if i % 100 < 97 else 9.0 for i in range(prompts)])
        .assign(correct=[float(i % 10 < 10 * right[run]) for i in range(prompts)])
        for run, cost in costs.items()
    ]
    return pd.concat(tables, ignore_index=True)


def verdict(experiment, costs, right) -> str:
    return profile.judged(experiment, completions(costs, right))["verdict"][0]


def test_verdicts_follow_the_intervals(here):
    experiment = read(Path("profiles/tiny.yaml"))
    same = {"sft": 0.5, "cmdp": 0.5}
    assert verdict(experiment, {"sft": 1.0, "cmdp": 1.0}, same) == "inconclusive"  # 97 of 100 prompts: around 96.2 %
    assert verdict(experiment, {"sft": 1.0, "cmdp": 5.0}, same) == "not replicated"
    experiment.budget.budget = 1.0
    assert verdict(experiment, {"sft": 1.0, "cmdp": 1.0}, same) == "not tested at this scale"
    experiment.task["name"] = "competition_math"
    experiment.runs["minillm"] = {"method": "minillm"}
    alike = {"cmdp": 1.0, "minillm": 1.0}
    assert verdict(experiment, alike, {"cmdp": 0.7, "minillm": 0.5}) == "replicated"
    assert verdict(experiment, alike, {"cmdp": 0.5, "minillm": 0.7}) == "not replicated"
    assert verdict(experiment, alike | {"minillm": 90.0}, {"cmdp": 0.7, "minillm": 0.5}) == "inconclusive"
    experiment.task["name"] = "arithmetic"
    assert profile.judged(experiment, completions(alike, {"cmdp": 0.5, "minillm": 0.5})).empty
