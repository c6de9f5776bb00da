"""Experiments from a parameter file: what it may say, and a whole one on small models from the command line."""

import json
import os
import shutil
import signal
import sys
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import make_model
from test_models import write_model

from cmdp import cli, train
from cmdp.methods import METHODS
from cmdp.models import build_model, build_tokenizer, load_tokenizer
from cmdp.storage import read_runs
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
        model = make_model(tokenizer, seed, spread=8.0, layers=1)
        model.save_pretrained(role)
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
        "runs": {"sft": {"method": "sft"}, "cmdp": {"method": "cmdp", "lam": 1.0}},
        "seeds": [0, 1],
        "evaluate": {"split": "test", "prompts": 3, "samples": 2, "batch_size": 4},
    }
    Path("small.yaml").write_text(yaml.safe_dump(settings))
    return Path("small.yaml")


def command(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cmdp", *words])
    cli.main()


def test_a_whole_experiment_runs_from_the_command_line(small, monkeypatch, capsys):
    command(monkeypatch, "memory", "--config", str(small))
    command(monkeypatch, "train", "--config", str(small))
    for run in ("sft", "cmdp"):
        for seed in (0, 1):
            files = {path.name for path in Path(f"models/small/{run}/{seed}").iterdir()}
            assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "cmdp.json"} <= files
            assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
            assert len(pd.read_csv(f"results/small/completions/{run}/{seed}.csv")) == 3 * (2 + 1)
    assert len(read_runs(Path("results/small/training")).query("run == 'cmdp'")) == 2 * 4
    memory = json.loads(Path("results/small/memory/cmdp/0.json").read_text())
    assert 0 < memory["summed_gib"] < 2
    assert memory["taken_gib"] > 0
    assert memory["device"]
    assert memory["threads"] == torch.get_num_threads()
    summary = pd.read_csv("results/small/summary.csv").set_index(["run", "measure"])
    assert summary.loc[("cmdp", "csr"), "seeds"] == 2
    assert not list(Path("checkpoints").rglob("checkpoint-*"))
    # the record beside the weights says what they were trained with, and what was measured
    record = json.loads(Path("models/small/cmdp/1/cmdp.json").read_text())
    assert (record["method"], record["seed"], record["student"], record["teacher"]) == ("cmdp", 1, "student", "teacher")
    assert (record["settings"]["lam"], record["settings"]["budget"], record["settings"]["max_steps"]) == (1.0, 1.5, 4)
    one = pd.read_csv("results/small/completions/cmdp/1.csv").query("decoding == 'sampled'")
    assert record["measured"]["csr"]["mean"] == pytest.approx((one["cost"] <= 1.5).mean())
    assert record["measured"]["prompts"] == 3
    # finished runs are not trained again, unless what they were made from changes
    capsys.readouterr()
    command(monkeypatch, "train", "--config", str(small), "--run", "cmdp", "--seed", "1")
    assert "models/small/cmdp/1 is finished" in capsys.readouterr().out
    before = Path("results/small/training/cmdp/1.csv").read_text()
    changes = ("train.learning_rate=0.5", "train.max_steps=2")
    command(monkeypatch, "train", "--config", str(small), *changes, "--run", "cmdp", "--seed", "1")
    assert len(pd.read_csv("results/small/training/cmdp/1.csv")) == 2
    assert Path("results/small/training/cmdp/1.csv").read_text() != before
    record = json.loads(Path("models/small/cmdp/1/cmdp.json").read_text())
    assert (record["settings"]["learning_rate"], record["settings"]["max_steps"]) == (0.5, 2)


def test_a_cpu_trains_and_measures_in_bfloat16_where_settings_ask_for_it(small, monkeypatch):
    for name in ("float32", "bfloat16"):
        found, bf16 = train.read(small, f"train.bf16={name == 'bfloat16'}"), name == "bfloat16"
        train.train(found, "cmdp", 0)
        pair = train.load_trained(found, "cmdp", 0)
        held = {
            key: {str(x.dtype) for n, x in pair[0].named_parameters() if ("lora" in n) == key} for key in (True, False)
        }
        assert held == {True: {"torch.float32"}, False: {f"torch.{name}"}}
        assert {str(x.dtype) for x in pair[1].parameters()} == {f"torch.{name}"}
        completions, _ = train.measure(found, pair, 0, found.evaluated(pair[-1]))
        assert completions["cost"].between(0, 100).all()
        log = pd.read_csv(found.folder("cmdp", 0) / train.TRAINING)
        assert log["grad_norm"].dropna().gt(0).all()
        assert train.storage.read_record(found.folder("cmdp", 0))["settings"]["bf16"] == bf16


def test_an_interrupted_run_resumes_from_its_checkpoint(small, monkeypatch):
    from cmdp.trainer import CMDPTrainer

    step, steps = CMDPTrainer.training_step, []

    def cut(trainer, *arguments, **options):
        steps.append(trainer.state.global_step)
        if len(steps) == 3:
            raise ValueError("the power is gone")
        return step(trainer, *arguments, **options)

    monkeypatch.setattr(CMDPTrainer, "training_step", cut)
    one = ("train", "--config", str(small), "--run", "cmdp", "--seed", "0")
    with pytest.raises(SystemExit, match="the power is gone"):
        command(monkeypatch, *one)
    assert not Path("models/small/cmdp/0").exists()
    command(monkeypatch, *one)
    assert steps == [0, 1, 2, 2, 3]
    assert pd.read_csv("results/small/training/cmdp/0.csv")["step"].dropna().tolist()[:4] == [1, 2, 3, 4]


def test_a_run_cut_off_after_its_last_checkpoint_takes_no_further_step(small, monkeypatch):
    """Its weights are those of the checkpoint, and equal to those of a run that was not cut off."""
    from cmdp.trainer import CMDPTrainer

    experiment = train.read(small)
    whole = (train.train(experiment, "cmdp", 0) / "adapter_model.safetensors").read_bytes()
    shutil.rmtree("models")
    with monkeypatch.context() as patched:
        patched.setattr(train.storage, "whole", lambda folder: (_ for _ in ()).throw(OSError("the power is gone")))
        with pytest.raises(OSError, match="the power is gone"):
            train.train(experiment, "cmdp", 0)
    monkeypatch.setattr(CMDPTrainer, "training_step", lambda *_: pytest.fail("a step beyond the last"))
    assert (train.train(experiment, "cmdp", 0) / "adapter_model.safetensors").read_bytes() == whole


def test_a_signal_stops_training_after_the_step_with_a_checkpoint(small, monkeypatch, capsys):
    """The rerun goes on from there, and ends with the weights of a run that was not stopped."""
    from cmdp.trainer import CMDPTrainer

    whole = (train.train(train.read(small), "cmdp", 0) / "adapter_model.safetensors").read_bytes()
    shutil.rmtree("models")
    step = CMDPTrainer.training_step

    def signalled(trainer, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    one = ("train", "--config", str(small), "train.save_steps=100", "--run", "cmdp", "--seed", "0")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(CMDPTrainer, "training_step", signalled)
        with pytest.raises(SystemExit) as raised:
            command(monkeypatch, *one)
    assert raised.value.code == 130
    assert "stopped at step 1: the same command resumes there" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in Path("checkpoints/small/cmdp/0").glob("checkpoint-*")] == ["checkpoint-1"]
    command(monkeypatch, *one)
    assert Path("models/small/cmdp/0/adapter_model.safetensors").read_bytes() == whole


def test_training_all_weights_saves_a_model_that_evaluation_loads(small, monkeypatch):
    command(monkeypatch, "train", "--config", str(small), "--run", "cmdp", "--seed", "0", "student.lora=null")
    assert Path("models/small/cmdp/0/model.safetensors").is_file()
    assert Path("results/small/completions/cmdp/0.csv").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config", "none.yaml"), r"There is no none\.yaml"),
        (("--config", "small.yaml", "--run", "ppo"), r"small\.yaml has no run 'ppo'. It has: cmdp, sft"),
        (("--config", "small.yaml", "runs.cmdp.method=cmdp-adptive"), "There is no method 'cmdp-adptive'"),
        (("--config", "small.yaml", "train.steps=3"), "steps is no field of CMDPConfig"),
        (("--config", "small.yaml", "runs.cmdp.lambda=3"), "lambda is no field of CMDPConfig"),
        (("--config", "small.yaml", "runs.cmdp.lam=-1"), "lam"),
        (("--config", "small.yaml", "trian.max_steps=3"), "trian"),
        (("--config", "small.yaml", "student.fourbit=true"), "fourbit"),
        (("--config", "small.yaml", "student.lora.rank=4"), "student.lora has no rank"),
        (("--config", "small.yaml", "budget.budget=abc"), "budget.budget"),
        (("--config", "small.yaml", "budget.budget=-1"), "budget must be 0 nats or more"),
        (("--config", "small.yaml", "budget.budget_form=both"), "total"),
        (("--config", "small.yaml", "evaluate.foo=3"), "evaluate.foo|'foo'"),
        (("--config", "small.yaml", "seeds=abc"), "seeds"),
        (("--config", "small.yaml", "seeds=[0"), "seeds"),
        (("--config", "small.yaml", "train.max_steps=many"), "max_steps"),
        (("--config", "small.yaml", "task.name=chess"), "chess"),
        (("--config", "small.yaml", "task.size=3"), "size"),
        (("--config", "small.yaml", "task.prompt_length=null"), "task.prompt_length is missing"),
        (("--config", "small.yaml", "evaluate.samples=0"), "samples and batch_size of an evaluation are 1 or more"),
        (("--config", "small.yaml", "nonsense"), "'nonsense' is no override"),
        (("--config", "empty.yaml"), r"empty\.yaml is empty"),
        (("--config", "broken.yaml"), r"broken\.yaml"),
        (("--config", "small.yaml", "student.model=nowhere"), "There is no local folder nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_weights_load(small, monkeypatch, words, message):
    from cmdp import models

    monkeypatch.setattr(models, "load_base", lambda *_: pytest.fail("weights were loaded"))
    Path("empty.yaml").touch()
    Path("broken.yaml").write_text("task: [1")
    with pytest.raises(SystemExit, match=message) as raised:
        command(monkeypatch, "train", *words)
    assert "\n" not in str(raised.value)
    assert not Path("models").exists()


def test_a_process_beside_the_first_trains_and_leaves_the_measuring_to_it(small, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    train.run_all(train.read(small), ["sft"], [0])
    assert not Path("results").exists()
    assert not Path("models").exists()


def test_the_weights_of_a_parameter_file_are_not_trained_without_the_memory(small, monkeypatch):
    for role in ("student", "teacher"):
        (Path(role) / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"Training would take .* GiB of memory and this device has .* generation"):
        command(monkeypatch, "train", "--config", str(small), "train.per_device_train_batch_size=100000000")
    assert not Path("models").exists()


def test_the_models_of_a_measured_run_are_let_go_before_the_next_trains(small, monkeypatch):
    load, start, measured, held = train.load_trained, train.train, [], []

    def loaded(*arguments):
        pair = load(*arguments)
        measured.extend(map(weakref.ref, pair[:2]))
        return pair

    def begin(*arguments):
        held.extend(model() for model in measured if model() is not None)
        return start(*arguments)

    monkeypatch.setattr(train, "load_trained", loaded)
    monkeypatch.setattr(train, "train", begin)
    train.run_all(train.read(small), ["sft"], [0, 1])
    assert len(measured) == 4
    assert not held


def test_overrides_may_stand_on_both_sides_of_options(small, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "run_all", lambda experiment, *which: asked.append((experiment, *which)))
    command(
        monkeypatch, "train", "--config", str(small), "name=again", "--run", "cmdp", "train.max_steps=7", "seeds=[4]"
    )
    experiment, runs, seeds = asked[0]
    assert (experiment.name, experiment.train["max_steps"], runs, seeds) == ("again", 7, ["cmdp"], [4])
    with pytest.raises(SystemExit):
        command(monkeypatch, "train", "--config", str(small), "name=again", "--runs", "train.max_steps=7")


def test_another_vocabulary_is_refused_before_weights_load(small, monkeypatch):
    build_tokenizer(["other", "words"]).save_pretrained("teacher")
    with pytest.raises(SystemExit, match="different vocabularies"):
        command(monkeypatch, "train", "--config", str(small))
    assert not Path("models").exists()


@pytest.mark.parametrize("method", ["dual", "minillm", "kdrl", "worst-case", "cmdp-adaptive", "trl-grpo", "trl-gkd"])
def test_every_kind_of_method_trains(small, method):
    own = {"dual": ["dual_rate=0.1"], "worst-case": ["step_budget=0.1"]}.get(method, [])
    words = [f"runs.one.{word}" for word in [f"method={method}", *own]]
    folder = train.train(train.read(small, *words, "student.lora=null", "train.max_steps=1"), "one", 3)
    changed = (folder / "model.safetensors").read_bytes() != Path("student/model.safetensors").read_bytes()
    assert changed == (method != "trl-grpo")  # no completion is right: nothing to learn from the task reward alone
    assert json.loads((folder / "cmdp.json").read_text())["method"] == method


@pytest.mark.parametrize("asked", [[], ["train.bf16=true"]])
def test_the_device_says_in_which_dtype_a_trainer_computes(small, monkeypatch, asked):
    """A profile may ask for bf16, which a T4 has not."""
    given = []
    monkeypatch.setattr(train, "distil", lambda *arguments: given.append(arguments[-1]) or [])
    monkeypatch.setattr(train, "pick_dtype", lambda *_: torch.float16)
    train.train(train.read(small, *asked), "cmdp", 0)
    assert (given[0]["bf16"], given[0]["fp16"]) == (False, True)


def test_prompts_start_once_in_training_and_in_evaluation(small, tmp_path, monkeypatch):
    from tokenizers.processors import TemplateProcessing

    from cmdp.evaluation import generate

    folder = write_model(tmp_path / "base", "llama", 0)
    plain = load_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    assert tokenizer("a b").input_ids == [2, 3, 4]
    rows = [{"prompt": "a b", "answer": "c"}, {"prompt": "a b c d e f g", "answer": "d"}]
    monkeypatch.setattr(train, "load_problems", lambda task, tokenizer: {"train": rows})
    student = build_model(plain, layers=1, hidden=16, heads=2, seed=0)
    for limit, used, start in ((3, tokenizer, [2]), (2, plain, [])):  # BOS counts
        for prompt in ("a b", "<unk>a b") if start else ("a b",):  # a chat template writes it
            rows[0]["prompt"] = prompt
            problems = train.read(small, f"task.prompt_length={limit}").problems("train", used)
            assert [row["answer"] for row in problems] == ["c"]  # the other is too long
            ids, *_ = generate(student, used, [problems[0]["prompt"], "a"], False, 1)
            assert ids[0, :-1].tolist() == [*start, 3, 4]
            assert ids[1, :-1].tolist() == [used.pad_token_id, *start, 3]
    with pytest.raises(ValueError, match=r"raise task\.prompt_length"):
        train.read(small, "task.prompt_length=2").problems("train", tokenizer)


@pytest.mark.parametrize("method", ["cmdp", "trl-grpo", "trl-gkd"])
def test_every_trainer_tokenises_prompts_alike(small, tmp_path, monkeypatch, method):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer("student")
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    found = []
    monkeypatch.setattr(train, "run_trainer", lambda trainer, resume: found.append(trainer) or [])
    models = [build_model(tokenizer, layers=1, hidden=16, heads=2, seed=seed) for seed in (0, 1)]
    problems = train.read(small).problems("train", tokenizer)
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "use_cpu": True}
    train.distil(method, *models, tokenizer, problems, bool, tmp_path, False, settings)
    prompt = problems[0]["prompt"]
    (plain,) = tokenizer([prompt], add_special_tokens=False).input_ids
    assert found[0]._tokenize_prompts([prompt, "<unk>" + prompt])[0] == [[2, *plain]] * 2


def test_numbers_without_a_point_and_lists_are_read_as_such(small):
    experiment = train.read(small, "train.learning_rate=2e-5", "budget.budget=1e-1", "runs.cmdp.lam=3e-1", "seeds=[7]")
    settings = experiment.settings("cmdp", 7)
    assert (settings["learning_rate"], settings["budget"], settings["lam"]) == (2e-5, 0.1, 0.3)
    assert experiment.seeds == [7]


def test_a_student_is_measured_as_it_was_trained_not_as_its_makers_chat_with_it(small, monkeypatch):
    found = []
    for chat in ({}, {"do_sample": True, "top_p": 0.01, "repetition_penalty": 9.0}):
        Path("student/generation_config.json").write_text(json.dumps(chat))
        command(monkeypatch, "train", "--config", str(small), "--run", "sft", "--seed", "0")
        found.append(pd.read_csv("results/small/texts/sft/0.csv"))
    pd.testing.assert_frame_equal(*found)


# ---- the profiles of the repository ----


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_are_complete_and_name_known_methods(path):
    experiment = train.read(path)
    assert experiment.name == path.stem
    assert {row["method"] for row in experiment.runs.values()} <= {"sft", *METHODS}
    assert experiment.task["prompt_length"] > 0
