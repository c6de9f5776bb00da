"""What is exported loads without this package, computes what the student computed, and says what it is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import WORDS, make_model, make_tokenizer
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cmdp import cli
from cmdp.export import export
from cmdp.models import build_tokenizer

SETTINGS = {
    "run": "cmdp-hinge",
    "method": "cmdp-hinge",
    "seed": "0",
    "base_model": "models/student",
    "reward_form": "hinge",
    "lam": 0.3,
    "budget": 0.15,
    "budget_form": "per_token",
}
SUMMARY = pd.DataFrame(
    [
        ("cmdp-hinge", "accuracy", 0.744, 0.717, 0.77, 3),
        ("cmdp-hinge", "csr", 0.779, 0.738, 0.819, 3),
        ("cmdp-hinge", "accuracy_within", 0.628, 0.583, 0.671, 3),
        ("cmdp-hinge", "kl_per_token", 0.06123, 0.05, 0.07, 3),
        ("sft", "csr", 0.111, 0.1, 0.2, 3),
    ],
    columns=["run", "measure", "mean", "low", "high", "seeds"],
)
# Run by a Python that has the libraries but cannot import cmdp
DEPLOYMENT = """
import importlib.abc, sys, torch

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cmdp", "trl"):
            raise ImportError(f"{name} is not deployed")

sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs = tokenizer("a b c", return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    print(model(**inputs).logits[0, -1].tolist())
print(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist())
assert not [name for name in sys.modules if name.partition(".")[0] in ("cmdp", "trl")]
"""


@pytest.fixture
def run(tmp_path):
    """A base model, and a student over it as a LoRA adapter that is not the identity."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    student = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    student.save_pretrained(tmp_path / "cmdp-hinge-0")
    tokenizer.save_pretrained(tmp_path / "cmdp-hinge-0")
    return tmp_path / "cmdp-hinge-0"


def logits(model) -> torch.Tensor:
    ids = make_tokenizer()("a b c", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        return model.eval()(ids).logits[0, -1]


def deploy(folder: Path, cwd: Path) -> tuple[torch.Tensor, list[int]]:
    """Logits and a greedy completion by a process of its own, isolated from this one's paths."""
    process = subprocess.run(
        [sys.executable, "-I", "-c", DEPLOYMENT, str(folder)], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr[-2000:]
    scores, ids = (json.loads(line) for line in process.stdout.splitlines())
    return torch.tensor(scores), ids


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_an_exported_adapter_computes_the_students_logits_without_this_package(run, tmp_path, merge):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base)
    student = logits(PeftModel.from_pretrained(base, run))
    assert (student - before).abs().max() > 1e-2  # the adapter does something
    export(run, tmp_path / "out", SETTINGS, SUMMARY, "abc", merge)
    deployed, ids = deploy(tmp_path / "out", tmp_path)
    torch.testing.assert_close(deployed, student, rtol=1e-4, atol=1e-4)
    assert len(ids) > 3
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("model.safetensors" in names) == merge
    assert ("adapter_model.safetensors" in names) != merge
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".py"))]


def test_a_student_trained_whole_is_exported_as_it_is(tmp_path, monkeypatch):
    tokenizer = build_tokenizer(WORDS)
    student = make_model(tokenizer, seed=0)
    student.save_pretrained(tmp_path / "models/runs/cmdp-hinge/0")
    tokenizer.save_pretrained(tmp_path / "models/runs/cmdp-hinge/0")
    params = {"threads": 1, "budget": {"budget": 1.5, "budget_form": "total"}, "train": {"max_steps": 7}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params | {"runs": {"cmdp-hinge": {"lam": 0.25}}}))
    (tmp_path / "results").mkdir()
    SUMMARY.to_csv(tmp_path / "results/summary.csv", index=False)
    (tmp_path / "results/provenance.json").write_text('{"commit": "0123abc"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "set_up", lambda params, offline: None)
    monkeypatch.setattr(sys, "argv", ["cmdp", "export", "models/runs/cmdp-hinge/0", "out"])
    cli.main()
    torch.testing.assert_close(deploy(tmp_path / "out", tmp_path)[0], logits(student), rtol=1e-6, atol=1e-6)
    text = (tmp_path / "out/README.md").read_text()
    for fact in ("lam: 0.25", "max_steps: 7", "budget: 1.5 nats in total", "`0123abc`", "seed 0"):
        assert fact in text
    with pytest.raises(SystemExit, match="There is something at out already"):
        cli.main()


@pytest.mark.parametrize("place", ["results/tiny", "profiles"])
def test_the_card_of_a_profiles_student_has_the_profiles_settings_and_measures(run, tmp_path, monkeypatch, place):
    student = tmp_path / "models/tiny/cmdp-hinge/3"
    shutil.copytree(run, student)
    (tmp_path / "params.yaml").write_text("threads: 1\nbudget: {budget: 99.0}\ntrain: {max_steps: 99}\nruns: {}\n")
    profile = {
        "student": {"model": str(tmp_path / "base")},
        "budget": {"budget": 0.25, "budget_form": "per_token"},
        "train": {"max_steps": 7},
        "runs": {"cmdp-hinge": None},
    }
    for folder in (place, "results/tiny"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / ("tiny.yaml" if place == "profiles" else "profile.yaml")).write_text(yaml.safe_dump(profile))
    SUMMARY.to_csv(tmp_path / "results/tiny/summary.csv", index=False)
    (tmp_path / "results/tiny/provenance.json").write_text('{"commit": "0123abc"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "set_up", lambda params, offline: None)
    monkeypatch.setattr(sys, "argv", ["cmdp", "export", str(student), "out"])
    cli.main()
    text = (tmp_path / "out/README.md").read_text()
    for fact in ("max_steps: 7", "budget: 0.25 nats a token", "`0123abc`", "seed 3", "| 77.9 | [73.8, 81.9] |"):
        assert fact in text
    assert "99" not in text


def test_the_card_says_what_was_measured_of_this_run_alone(run, tmp_path):
    export(run, tmp_path / "out", SETTINGS, SUMMARY, "abc", False)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "peft"
    assert {"cmdp", "distillation", "cmdp-hinge"} <= set(card.data.tags)
    for fact in (
        "| 77.9 | [73.8, 81.9] |",
        "| 0.0612 | [0.0500, 0.0700] |",
        "| 74.4 |",
        "3 seed(s)",
        "0.15 nats a token",
    ):
        assert fact in card.text
    assert "11.1" not in card.text


def test_the_card_of_an_adapter_on_a_hub_model_names_it_and_an_unmeasured_run_says_so(run, tmp_path):
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/some-model"}))
    export(run, tmp_path / "out", SETTINGS, None, "abc", False)  # copies the adapter: the base is not loaded
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == "someone/some-model"
    assert "Nothing: no results of this run" in card.text


def test_weights_that_are_no_safetensors_are_refused(run, tmp_path):
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="with safetensors, is needed"):
        export(run, tmp_path / "out", SETTINGS, SUMMARY, "abc", True)
    assert not (tmp_path / "out").exists()
