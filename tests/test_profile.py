"""Profiles: what a parameter file of real models may say, and an experiment on small ones from the command line."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from test_models import write_model

from cmdp import cli, profile
from cmdp.methods import METHODS, method_of
from cmdp.models import build_model, build_tokenizer, load_tokenizer
from cmdp.tasks import arithmetic

ROOT = Path(__file__).parents[1]
PROFILES = [path for path in sorted((ROOT / "profiles").glob("*.yaml")) if path.stem != "smoke"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The path of a profile of small models, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMDP_TRACEBACK", "")
    tokenizer = build_tokenizer(arithmetic.vocabulary())
    for seed, role in enumerate(("student", "teacher")):
        build_model(tokenizer, layers=1, hidden=16, heads=2, seed=seed).save_pretrained(role)
        tokenizer.save_pretrained(role)
    settings = {
        "task": {
            "name": "arithmetic",
            "sizes": {"test": 4, "train": 8},
            "steps": [2, 3],
            "seed": 0,
            "prompt_length": 40,
        },
        "student": {"model": "student", "lora": {"r": 2}},
        "teacher": {"model": "teacher"},
        "budget": {"budget": 1.5, "budget_form": "total"},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 6,
            "save_steps": 1,
            "logging_steps": 1,
            "use_cpu": True,
        },
        "methods": ["sft", "cmdp"],
        "runs": {"sft": {}, "cmdp": {"lam": 1.0}},
        "seeds": [0, 1],
        "evaluate": {"split": "test", "prompts": 3, "samples": 2, "batch_size": 4},
    }
    Path("small.yaml").write_text(yaml.safe_dump(settings))
    return Path("small.yaml")


def command(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cmdp", *words])
    cli.main()


def test_a_whole_experiment_runs_from_the_command_line(small, monkeypatch, capsys):
    for stage in ("memory", "data", "train", "evaluate", "collect"):
        command(monkeypatch, stage, "--config", str(small))
    for run in ("sft", "cmdp"):
        for seed in (0, 1):
            files = {path.name for path in Path(f"models/small/{run}/{seed}").iterdir()}
            assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files
            assert not [name for name in files if name.endswith((".bin", ".pt"))]
            assert len(pd.read_csv(f"results/small/runs/{run}/{seed}.csv")) == 3 * (2 + 1)
    assert len(pd.read_csv("results/small/curves.csv")) == 2 * 4
    assert yaml.safe_load(Path("results/small/profile.yaml").read_text()) == profile.read(small, [])
    memory = json.loads(Path("results/small/memory/cmdp/0.json").read_text())
    assert 0 < memory["summed_gib"] < 2
    assert memory["taken_gib"] > 0
    assert memory["device"]
    assert memory["threads"] == torch.get_num_threads()
    summary = pd.read_csv("results/small/summary.csv").set_index(["run", "measure"])
    assert summary.loc[("cmdp", "csr"), "seeds"] == 2
    assert set(json.loads(Path("results/small/metrics.json").read_text())) == {"sft", "cmdp"}
    assert not list(Path("checkpoints").rglob("checkpoint-*"))
    # done is done, until something that it was made from changes
    capsys.readouterr()
    command(monkeypatch, "train", "--config", str(small), "cmdp", "1")
    command(monkeypatch, "evaluate", "--config", str(small), "cmdp", "1")
    assert capsys.readouterr().out.count("is finished") == 2
    before = Path("results/small/training/cmdp/1.csv").read_text()
    command(monkeypatch, "train", "--config", str(small), "cmdp", "1", "train.learning_rate=0.5", "train.max_steps=2")
    assert len(pd.read_csv("results/small/training/cmdp/1.csv")) == 2
    assert Path("results/small/training/cmdp/1.csv").read_text() != before


def test_an_interrupted_run_goes_on_from_its_checkpoint(small, monkeypatch, capsys):
    from cmdp import methods
    from cmdp.trainer import CMDPTrainer

    command(monkeypatch, "data", "--config", str(small))
    step = CMDPTrainer.training_step
    steps = []

    def cut(trainer, *arguments, **options):
        steps.append(trainer.state.global_step)
        if len(steps) == 3:
            raise ValueError("the power is gone")
        return step(trainer, *arguments, **options)

    monkeypatch.setattr(CMDPTrainer, "training_step", cut)
    with pytest.raises(SystemExit, match="the power is gone"):
        command(monkeypatch, "train", "--config", str(small), "cmdp", "0")
    assert not Path("models/small/cmdp/0").exists()
    command(monkeypatch, "train", "--config", str(small), "cmdp", "0")
    assert steps == [0, 1, 2, 2, 3]
    assert pd.read_csv("results/small/training/cmdp/0.csv")["step"].tolist() == [1, 2, 3, 4]
    assert methods


def test_training_all_weights_saves_a_model_that_evaluation_loads(small, monkeypatch):
    for stage in ("data", "train", "evaluate"):
        words = () if stage == "data" else ("cmdp", "0")
        command(monkeypatch, stage, "--config", str(small), *words, "student.lora=null")
    assert Path("models/small/cmdp/0/model.safetensors").is_file()
    assert Path("results/small/runs/cmdp/0.csv").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--config", "none.yaml"), r"There is no profile at none\.yaml"),
        (("train", "--config", "small.yaml", "ppo", "0"), "A run is named for one of"),
        (("train", "--config", "small.yaml", "cmdp", "zero"), "After the profile come a run and a seed"),
        (("train", "--config", "small.yaml", "train.steps=3"), r"train\.steps is no field of CMDPConfig"),
        (("train", "--config", "small.yaml", "runs.cmdp.lambda=3"), r"cmdp\.lambda is no field of CMDPConfig"),
        (("train", "--config", "small.yaml", "trian.max_steps=3"), "names no field"),
        (("train", "--config", "small.yaml", "extra=3"), "'extra' is wrong or missing"),
        (("train", "--config", "small.yaml", "student.fourbit=true"), "student knows no fourbit"),
        (("train", "--config", "small.yaml", "cmdp", "0"), r"There are no problems at problems/small/train\.jsonl"),
        (("evaluate", "--config", "small.yaml", "cmdp", "0"), "There is no trained student at models/small/cmdp/0"),
        (("data", "--config", "small.yaml", "cmdp"), "takes no 'cmdp'"),
        (("train", "cmdp"), "name a RUN and a SEED"),
        (("data", "train.max_steps=1"), "goes with --config only"),
        (("memory",), "name a profile"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(small, monkeypatch, words, message):
    Path("params.yaml").write_text("threads: 1")
    monkeypatch.setattr(cli, "set_up", lambda params, offline: None)
    with pytest.raises(SystemExit, match=message) as raised:
        command(monkeypatch, *words)
    assert "\n" not in str(raised.value)


def test_a_run_that_cannot_fit_says_so_with_its_sum_and_loads_nothing(small, monkeypatch):
    command(monkeypatch, "data", "--config", str(small))
    for role in ("student", "teacher"):
        (Path(role) / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"Training would take .* GiB of memory and this device has .* generation"):
        command(
            monkeypatch, "train", "--config", str(small), "cmdp", "0", "train.per_device_train_batch_size=100000000"
        )
    assert not Path("models").exists()


def test_prompts_carry_their_own_special_tokens_and_are_tokenised_without_more(tmp_path):
    from tokenizers.processors import TemplateProcessing

    folder = write_model(tmp_path / "base", "llama", 0)
    plain = load_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    assert tokenizer("a b").input_ids == [2, 3, 4]
    rows = [{"prompt": "a b", "answer": "c"}, {"prompt": "a b c d e f g", "answer": "d"}]
    problems = profile.within(rows, tokenizer, longest=4)
    assert [row["answer"] for row in problems] == ["c"]  # the other is too long
    assert problems[0]["prompt"] == "<unk>a b"
    assert profile._plain(tokenizer)(problems[0]["prompt"]).input_ids == [2, 3, 4]
    assert tokenizer("a b").input_ids == [2, 3, 4]  # what is saved with the student
    assert profile.within(rows[:1], plain, longest=4)[0]["prompt"] == "a b"
    with pytest.raises(ValueError, match=r"raise task\.prompt_length"):
        profile.within(rows, tokenizer, longest=1)


def test_the_colab_notebook_runs_on_a_cpu_with_small_models(small):
    """Executed as CI has it: by papermill, with parameters of its own."""
    import papermill

    parameters = {
        "profile": str(small.resolve()),
        "overrides": ["methods=[sft,cmdp]", "seeds=[0]", "train.max_steps=2"],
    }
    papermill.execute_notebook(
        str(ROOT / "notebooks" / "colab.ipynb"),
        "executed.ipynb",
        parameters=parameters,
        progress_bar=False,
        kernel_name="python3",
    )
    assert {path.name for path in Path("results/small/runs").iterdir()} == {"sft", "cmdp"}
    assert "right answers" in Path("executed.ipynb").read_text()


@pytest.mark.parametrize("word", ["train.learning_rate=2e-5", "budget.budget=1e-1", "runs.cmdp.lam=3e-1"])
def test_a_number_without_a_point_is_one(small, word):
    name, _, value = word.partition("=")
    settings = profile.read(small, [word])
    for key in name.split("."):
        settings = settings[key]
    assert settings == float(value)


def test_a_student_is_measured_as_it_was_trained_not_as_its_makers_chat_with_it(small, monkeypatch):
    found = []
    for chat in ({}, {"do_sample": True, "top_p": 0.01, "repetition_penalty": 9.0}):
        Path("student/generation_config.json").write_text(json.dumps(chat))
        for stage in ("data", "train", "evaluate"):
            command(monkeypatch, stage, "--config", str(small), *(["sft", "0"] if stage != "data" else []))
        found.append(pd.read_csv("results/small/texts/sft/0.csv"))
    pd.testing.assert_frame_equal(*found)


# ---- the profiles of the repository ----


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_are_complete_and_name_known_settings(path):
    settings = profile.read(path, [])
    assert settings["name"] == path.stem
    assert list(settings["runs"]) == settings["methods"]
    assert {method_of(run) for run in settings["methods"]} <= {"sft", *METHODS}


def test_every_profile_has_the_same_pipeline():
    texts = {path.stem: (path.with_suffix("") / "dvc.yaml").read_text().replace(path.stem, "NAME") for path in PROFILES}
    assert len(texts) == 4
    assert len(set(texts.values())) == 1
