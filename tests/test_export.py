"""What is exported loads without this package, computes what the student computed, and says what it is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS, make_model, make_tokenizer
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from test_models import write_gguf, write_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from cmdp.export import card, export, hub_id
from cmdp.models import ModelSpec, build_tokenizer, load_pair

RECORD = {
    "run": "hinge-a",
    "method": "cmdp-hinge",
    "seed": 3,
    "settings": {"reward_form": "hinge", "lam": 0.25, "budget": 0.15, "budget_form": "per_token", "max_steps": 7},
    "task": {"name": "/home/someone/rewards.py:ends", "source": "/home/someone/rows.jsonl", "seed": 0},
    "student": "org/student",
    "teacher": "/models/some/teacher.gguf",
    "provenance": {"commit": "0123abc", "python": "3.11.9", "libraries": {"torch": "2.13.0", "trl": "1.16.0"}},
    "measured": {
        "accuracy": {"mean": 0.744, "low": 0.717, "high": 0.77},
        "csr": {"mean": 0.779, "low": 0.738, "high": 0.819},
        "kl_per_token": {"mean": 0.061234, "low": 0.05, "high": 0.07},
        "greedy_accuracy": {"mean": float("nan"), "low": float("nan"), "high": float("nan")},
        "seeds": 3,
        "prompts": 200,
    },
}
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


def save(folder: Path, model, tokenizer, **changes) -> Path:
    """As training saves a student."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "cmdp.json").write_text(json.dumps(RECORD | changes))
    (folder / "training.csv").write_text("step\n1\n")
    return folder


def move(student, std: float = 0.3) -> None:
    """Take a new adapter, which changes nothing, away from its start."""
    torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=std)


@pytest.fixture
def run(tmp_path):
    """A base model, and a student over it as a LoRA adapter that is not the identity."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    student = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    move(student)
    return save(tmp_path / "run", student, tokenizer, student=str(tmp_path / "base"))


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
def test_an_exported_adapter_computes_the_students_logits_without_this_package(run, tmp_path, monkeypatch, merge):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base)
    student = logits(PeftModel.from_pretrained(base, run))
    assert (student - before).abs().max() > 1e-2  # the adapter does something
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    export(run, tmp_path / "out", merge)
    for path in (tmp_path / "out").rglob("*"):  # no path of this machine goes along
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
    # an adapter's base is found from where it was exported, and weights load anywhere
    deployed, ids = deploy(tmp_path / "out", tmp_path / "elsewhere" if merge else tmp_path)
    torch.testing.assert_close(deployed, student, rtol=1e-4, atol=1e-4)
    assert len(ids) > 3
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("model.safetensors" in names) == merge
    assert ("adapter_model.safetensors" in names) != merge
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".py", ".csv"))]
    assert "cmdp.json" not in names


def test_a_student_trained_whole_is_exported_as_it_is(tmp_path):
    student = make_model(tokenizer := build_tokenizer(WORDS), seed=0)
    (run := save(tmp_path / "run", student, tokenizer)).joinpath("optimizer.pt").write_bytes(b"")
    export(run, tmp_path / "out", merge=True)
    torch.testing.assert_close(deploy(tmp_path / "out", tmp_path)[0], logits(student), rtol=0, atol=1e-6)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run / name).read_bytes()
    assert not (tmp_path / "out/optimizer.pt").exists()
    with pytest.raises(ValueError, match="out exists already"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "adapted",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_on_embeddings_or_head_is_merged_as_it_was_trained(tmp_path, adapted, tied):
    base = make_model(tokenizer := make_tokenizer(), seed=0)
    if not tied:
        base.config.tie_word_embeddings = False
        base.lm_head.weight = torch.nn.Parameter(torch.randn_like(base.lm_head.weight))
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    student = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **adapted))
    move(student)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "modules_to_save" in name:
                parameter += torch.randn_like(parameter)
    expected = logits(student)
    run = save(tmp_path / "run", student, tokenizer, student=str(tmp_path / "base"))
    for merge in (True, False):
        export(run, tmp_path / f"out-{merge}", merge)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{merge}")
        torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("named", ["by its path", "in its folder"])
def test_an_adapter_over_a_gguf_file_is_exported_merged(tmp_path, named):
    folder = write_model(tmp_path / "base", "llama", 0, rope_theta=10000.0, tie_word_embeddings=False)
    write_gguf(tmp_path / "base.gguf", folder)
    where = {"model": str(tmp_path / "base.gguf")}
    if named == "in its folder":
        where = {"model": str(tmp_path), "gguf_file": "base.gguf"}
    student, _, tokenizer = load_pair(ModelSpec(**where, lora={"r": 2}), ModelSpec(folder), use_cpu=True)
    move(student)
    run = save(tmp_path / "run", student, tokenizer, student=where.pop("model"), **where)
    export(run, tmp_path / "out", merge=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported), logits(student), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="GGUF file cannot be loaded by itself: export it merged"):
        export(run, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_the_card_says_what_was_recorded_at_training(run, tmp_path):
    export(run, tmp_path / "out")
    loaded = ModelCard.load(tmp_path / "out/README.md")
    assert loaded.data.library_name == "peft"
    assert {"cmdp", "distillation", "cmdp-hinge"} <= set(loaded.data.tags)
    for fact in (
        "base model: base (local)",
        "teacher: teacher.gguf (local)",
        "method: cmdp-hinge (run hinge-a, seed 3)",
        "data: rows.jsonl; reward: rewards.py:ends\n",
        "budget: 0.15 nats per token\n",
        "commit 0123abc",
        "torch 2.13.0, trl 1.16.0",
        "lam: 0.25\n",
        "max_steps: 7\n",
        "| csr | 0.779 | [0.738, 0.819] |",
        "| kl_per_token | 0.06123 | [0.05, 0.07] |",
        "200 held-out prompts, 3 training seed(s)",
        '"out"',
    ):
        assert fact in loaded.text
    assert "nan" not in loaded.text


@pytest.mark.parametrize("template", ["<s> {{ messages[0].content }}", None], ids=["chat", "plain"])
def test_the_cards_code_runs_and_starts_a_prompt_as_training_does(tmp_path, monkeypatch, template):
    tokenizer = build_tokenizer(["<s>", *WORDS])
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    tokenizer.chat_template = template
    export(save(tmp_path / "run", make_model(tokenizer, seed=0), tokenizer), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", Path("out/README.md").read_text(), re.S)
    names = {}
    exec(code.replace('"..."', '"a b"'), names)
    assert names["tokenizer"].decode(names["inputs"]["input_ids"][0]).split() == ["<s>", "a", "b"]
    assert names["ids"].shape[1] > 3


def test_the_card_names_the_adapters_of_student_and_teacher():
    adapters = {"teacher_adapter": "models/tuned/gkd/0", "student_adapter": "/home/someone/adapter"}
    text = card("out", RECORD | adapters, "org/student", False).text
    assert "base model: org/student, from the adapter adapter (local) on\n" in text
    assert "teacher: teacher.gguf (local) with the adapter models/tuned/gkd/0 (local)\n" in text
    assert "/home/someone" not in text
    assert "adapter" not in card("out", RECORD, "org/student", False).text


def test_the_card_of_an_unmeasured_run_and_of_a_method_without_constraint_say_so():
    text = card("out", RECORD | {"measured": None}, "org/student", False).text
    assert "Nothing yet." in text
    assert "does not enforce" not in text
    settings = {"budget": 2.0, "budget_form": "total", "reward_form": "lagrangian"}
    assert (
        "2 nats per completion, which the method does not enforce"
        in card("out", RECORD | {"settings": settings}, "", False).text
    )


def test_the_metadata_name_a_base_model_on_the_hub_alone(run, tmp_path, monkeypatch):
    (run / "cmdp.json").write_text(json.dumps(RECORD))
    export(run, tmp_path / "out")  # copies the adapter: the base is not loaded
    assert ModelCard.load(tmp_path / "out/README.md").data.base_model == "org/student"
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "org/student"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/local").mkdir(parents=True)
    for name in (
        "org/local",
        "/models/m",
        "./models/m",
        "../m",
        "./m",
        "~/m",
        "a/b/c",
        "org/m.gguf",
        "m",
        "",
        "C:\\m\\n",
        None,
    ):
        assert hub_id(name) is None, name
        assert card("out", RECORD, name, False).data.base_model is None


def test_a_folder_without_record_weights_or_base_is_refused_in_one_line(run, tmp_path):
    (run / "cmdp.json").write_text(json.dumps(RECORD | {"student": "no/such/student"}))
    for merge in (True, False):
        with pytest.raises(FileNotFoundError, match=r"There is no .*no/such/student") as raised:
            export(run, tmp_path / "out", merge)
        assert "\n" not in str(raised.value)
    make_model(make_tokenizer(), seed=0, hidden=24).save_pretrained(tmp_path / "other")
    (run / "cmdp.json").write_text(json.dumps(RECORD | {"student": str(tmp_path / "other")}))
    with pytest.raises(ValueError, match=r"was not trained over .*other: their shapes differ"):
        export(run, tmp_path / "out", True)
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="no weights in safetensors"):
        export(run, tmp_path / "out")
    (run / "cmdp.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no cmdp\.json in .*: name the folder of a student"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
