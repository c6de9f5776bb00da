"""notebooks/colab.ipynb, executed on a CPU: a small Qwen2 pair with a chat template, on data in GSM8K's format."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM, Qwen2Config

from cmdp import train
from cmdp.methods import METHODS
from cmdp.models import build_tokenizer
from cmdp.tasks import arithmetic

ROOT = Path(__file__).parents[1]
NOTEBOOK = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PARAMETERS, CHECKOUT, DRIVE, MEMORY, TRAIN, TABLE, EXAMPLE, WRITTEN, PUSH = CODE
CHAT = "{% for m in messages %}<user> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def write_pair(folder: Path) -> None:
    """A student and a teacher of Qwen2's architecture, of random weights."""
    tokenizer = build_tokenizer([*arithmetic.vocabulary(), "####", "<user>", "<assistant>"])
    tokenizer.chat_template = CHAT
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, tie_word_embeddings=True, **shape, **ids)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of the repository in a folder of its own, which the process works in, and overrides for a tiny run."""
    folder = tmp_path / "clone"
    (folder / "notebooks").mkdir(parents=True)
    for name in ("cmdp", "profiles"):
        (folder / name).symlink_to(ROOT / name)
    write_pair(tmp_path)
    (tmp_path / "gsm").mkdir()
    for split, rows in arithmetic.problems({"test": 6, "train": 30}, (2, 3), 0).items():
        lines = [{"question": row["prompt"], "answer": f"{row['solution']} #### {row['answer']}"} for row in rows]
        (tmp_path / "gsm" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(folder)
    overrides = [f"{role}.model={tmp_path / role}" for role in ("student", "teacher")]
    overrides += [f"task.source={tmp_path / 'gsm'}", "task.sizes={train: 20, validation: 4, test: 4}"]
    train = {"use_cpu": True, "max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 4}
    train |= {"num_generations": 2, "gradient_accumulation_steps": 1, "max_completion_length": 6}
    overrides += [f"train.{name}={value}" for name, value in train.items()]
    return [*overrides, "student.lora.r=2", "evaluate.prompts=3"]


def execute(*cells: str, **parameters) -> list[str]:
    """What each of `cells` writes in one new kernel, after the parameter cell, and the two of the set-up."""
    given = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    cells = [f"{PARAMETERS}\n{given}", CHECKOUT, DRIVE, *cells]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": "notebooks"}}
    ).execute()
    said = [[output.get("text") or output["data"]["text/plain"] for output in cell.outputs] for cell in notebook.cells]
    return ["".join(texts) for texts in said[3:]]


def run_cell(source: str, **parameters) -> None:
    """Run one cell in this process, after the parameter cell."""
    names = {}
    exec(PARAMETERS, names)
    exec(source, names | parameters)


# ---- the whole way ----


def test_a_run_that_was_cut_off_resumes_and_a_finished_one_is_left_alone(clone, monkeypatch):
    from cmdp.trainer import CMDPTrainer

    step, steps = CMDPTrainer.training_step, []

    def cut(trainer, *arguments, **options):
        steps.append(trainer.state.global_step)
        if len(steps) == 3:
            raise OSError("the machine is taken away")
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(CMDPTrainer, "training_step", cut)
        with pytest.raises(OSError, match="taken away"):
            train.run_all(train.read(Path("profiles/colab.yaml"), *clone), ["sft", "cmdp-chance"], [0])

    # a new kernel resumes it; then every cell again, in the reverse order, and the set-up once more
    cells = (MEMORY, TRAIN, TABLE, EXAMPLE, WRITTEN, PUSH)
    said = execute(*cells, CHECKOUT, DRIVE, *reversed(cells), overrides=clone)
    memory, trained, table, example, written = said[:5]
    assert "4 steps of 40.0 s (an estimate for profiles/colab.yaml on a T4, not measured), 2.7 minutes" in memory
    assert "in all (generation, scoring and update take turns)" in memory
    assert re.search(r"training: .*\| 4/4 \[\d\d:\d\d<\d\d:\d\d", trained)  # the bar, with the time left
    assert "| 2/4 [" in trained
    assert "| 0/4 [" not in trained
    log = pd.read_csv("results/colab/training/cmdp-chance/0.csv")
    assert log["step"].tolist() == [1, 2, 3, 4]
    assert all(word in table for word in ("before", "after cmdp-chance", "accuracy", "CSR", "cost (nats)"))
    assert example.count("<user>") == 1
    assert example.index("---- sft ----") < example.index("---- cmdp-chance ----")
    assert str(Path("models/colab/cmdp-chance/0").resolve()) in written
    again = said[8:]
    assert "models/colab/cmdp-chance/0 is finished" in again[4]
    assert "measured here" in again[5]
    assert again[3] == table

    # a restarted kernel needs no other cell
    (restarted,) = execute(TRAIN, overrides=clone)
    assert "models/colab/cmdp-chance/0 is finished" in restarted
    assert execute(TABLE, overrides=clone) == [table]


def test_the_student_is_uploaded_only_if_asked_for_and_merged(clone, monkeypatch):
    done = []

    def upload_folder(repo_id, folder_path):
        done.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    def create_repo(name, private, exist_ok):
        done.append((name, private))

    api = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr("huggingface_hub.login", lambda: done.append("login"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    run_cell(PUSH)
    assert done == []
    train.train(train.read(Path("profiles/colab.yaml"), *clone), "sft", 0)
    for _ in range(2):
        run_cell(PUSH, push_to="me/mine", method="sft")
    assert done[:2] == ["login", ("me/mine", True)]
    assert done[:3] == done[3:]
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= set(done[2][1])
    assert "adapter_model.safetensors" not in done[2][1]
    assert "# mine" in Path("models/exported/me/mine/README.md").read_text()


def test_an_unknown_run_is_refused_by_its_name(clone):
    with pytest.raises(ValueError, match=r"has no run 'ppo'\. It has: sft, .*cmdp-chance"):
        run_cell(MEMORY, method="ppo", overrides=clone)


# ---- the set-up on a fresh machine ----


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A fresh machine's packages, and the commands that the set-up runs on it; `git clone` makes a clone."""

    def run(command, check):
        assert check
        commands.append([str(word) for word in command])
        if command[0] == "git":
            (command[-1] / "profiles").mkdir(parents=True)
            (command[-1] / "profiles" / "colab.yaml").write_text("")

    packages, commands = {"torch": "2.9.0+cu126"}, []
    listed = lambda: [SimpleNamespace(name=name, version=version) for name, version in packages.items()]  # noqa: E731
    monkeypatch.setattr(importlib.metadata, "distributions", listed)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(packages=packages, commands=commands)


def test_opened_by_its_badge_it_clones_once_and_keeps_the_torch_that_is_there(machine, tmp_path, monkeypatch):
    run_cell(CHECKOUT, repository="me/cmdp")
    clone, install = machine.commands
    assert clone[:2] == ["git", "clone"]
    assert clone[-2:] == ["https://github.com/me/cmdp", str(tmp_path / "cmdp")]
    assert install[0] == sys.executable
    assert install[-3:] == ["install", str(tmp_path / "cmdp"), "torch==2.9.0+cu126"]
    assert Path.cwd() == tmp_path / "cmdp"
    machine.packages["cmdp"] = "0.1.0"
    run_cell(CHECKOUT, repository="me/cmdp")  # again
    monkeypatch.chdir(tmp_path)
    run_cell(CHECKOUT, repository="me/cmdp")  # in a restarted kernel, which starts where the first did
    assert Path.cwd() == tmp_path / "cmdp"
    assert sys.path.count(str(tmp_path / "cmdp")) == 1
    assert len(machine.commands) == 2


def test_without_a_clone_or_an_address_it_says_what_to_set(machine):
    with pytest.raises(ValueError, match="Set `repository`"):
        run_cell(CHECKOUT)
    assert machine.commands == []


@pytest.mark.parametrize(("version", "removed"), [("0.10.0", True), ("0.15.0+git1", True), ("0.16.0", False)])
def test_a_torchao_that_peft_refuses_is_removed(machine, version, removed):
    from peft import import_utils

    machine.packages |= {"cmdp": "0.1.0", "torchao": version}
    run_cell(CHECKOUT, repository="me/cmdp")
    assert machine.commands[1:] == [[*machine.commands[-1][:-3], "uninstall", "--yes", "torchao"]] * removed
    # as peft judges it
    import_utils.is_torchao_available.cache_clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(import_utils.importlib.util, "find_spec", lambda name: name == "torchao")
        patched.setattr(import_utils.importlib_metadata, "version", lambda name: version)
        if removed:
            with pytest.raises(ImportError, match="incompatible version of torchao"):
                import_utils.is_torchao_available()
        else:
            assert import_utils.is_torchao_available()
    import_utils.is_torchao_available.cache_clear()


def test_outputs_and_downloads_move_to_drive_by_a_flag_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", "here")
    mounted, kept = [], tmp_path / "content" / "drive" / "MyDrive" / "cmdp"
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=SimpleNamespace(mount=mounted.append)))
    cell = DRIVE.replace("/content/drive", f"{tmp_path}/content/drive")
    run_cell(cell)
    assert mounted == []
    assert not kept.exists()
    Path("models/colab").mkdir(parents=True)
    Path("models/colab/student").write_text("made before")
    for _ in range(2):
        run_cell(cell, drive=True)
        for name in ("models", "checkpoints", "results/colab"):
            assert Path(name).resolve() == kept / name
        assert Path("models/colab/student").read_text() == "made before"
    assert os.environ["HF_HOME"] == "here"
    run_cell(cell, drive_cache=True)
    assert os.environ["HF_HOME"] == str(kept / "huggingface")
    assert mounted == [f"{tmp_path}/content/drive"] * 3


# ---- what it says ----


def test_its_method_is_a_run_of_its_profile_and_all_switches_are_off():
    names = {}
    exec(PARAMETERS, names)
    runs = yaml.safe_load((ROOT / names["profile"]).read_text())["runs"]
    assert runs[names["method"]]["method"] in METHODS
    assert not any(names[flag] for flag in ("overrides", "drive", "drive_cache", "push_to"))


def test_one_replacement_sets_its_address_everywhere():
    text = (ROOT / "notebooks" / "colab.ipynb").read_text()
    assert text.count("OWNER/cmdp") == 2
    named = text.replace("OWNER/cmdp", "me/cmdp")
    assert "colab.research.google.com/github/me/cmdp/blob/main/notebooks/colab.ipynb" in named
    assert 'repository = \\"me/cmdp\\"' in named
    assert "s#OWNER/cmdp#your-name/cmdp#" in (ROOT / "docs" / "models.md").read_text()
