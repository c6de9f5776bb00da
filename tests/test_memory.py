"""The memory sum: of the profiles' models as their headers state it, and next to what a process was seen to take."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from test_models import LORA, write_adapter, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from cmdp.memory import FOUR_BIT, GIB, KEPT, check_memory, memory_sum, peak, release, reset_peak, taken
from cmdp.methods import METHODS
from cmdp.models import ModelSpec, load_base

ROOT = Path(__file__).parents[1]
TRAIN = {"per_device_train_batch_size": 4, "max_completion_length": 32}


def shape(family, hidden, intermediate, layers, heads, kv_heads, rows, tied, **more):
    return AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=rows,
        tie_word_embeddings=tied,
        **more,
    )


# The published configurations, as far as size goes, with the published number of parameters
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (("llama", 576, 1536, 30, 9, 3, 49152, True), 134_515_008),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (("llama", 960, 2560, 32, 15, 5, 49152, True), 361_821_120),
    "Qwen/Qwen2.5-0.5B-Instruct": (("qwen2", 896, 4864, 24, 14, 2, 151936, True), 494_032_768),
    "Qwen/Qwen2.5-1.5B-Instruct": (("qwen2", 1536, 8960, 28, 12, 2, 151936, True), 1_543_714_304),
    "Qwen/Qwen2.5-Math-1.5B": (("qwen2", 1536, 8960, 28, 12, 2, 151936, True), 1_543_714_304),
    "Qwen/Qwen2.5-Math-7B": (("qwen2", 3584, 18944, 28, 28, 4, 152064, False), 7_615_616_512),
    "meta-llama/Llama-3.2-3B-Instruct": (("llama", 3072, 8192, 28, 24, 8, 128256, True), 3_212_749_824),
    "meta-llama/Llama-3.1-8B-Instruct": (("llama", 4096, 14336, 32, 32, 8, 128256, False), 8_030_261_248),
}
PUBLISHED |= {f"{name}-Instruct": entry for name, entry in PUBLISHED.items() if "Math" in name}
PUBLISHED["models/smollm2/base"] = PUBLISHED["HuggingFaceTB/SmolLM2-135M-Instruct"]  # from a GGUF file
HARDWARE = {  # what each profile is for
    "laptop": ("cpu", torch.bfloat16, 16 * GIB),
    "colab": ("cuda", torch.float16, 14.7 * GIB),
    "gsm8k": ("cuda", torch.float16, 14.7 * GIB),
    "consumer-gpu": ("cuda", torch.bfloat16, 23.5 * GIB),
    "paper": ("cuda", torch.bfloat16, 79 * GIB),
}


@pytest.mark.parametrize("name", HARDWARE)
def test_the_header_of_a_profile_states_its_sum_and_fits_its_hardware(tmp_path, name, capsys):
    path = ROOT / "profiles" / f"{name}.yaml"
    text = path.read_text()
    profile = yaml.safe_load(text)
    specs = []
    for role in ("student", "teacher"):
        arguments, parameters = PUBLISHED[profile[role]["model"]]
        config, folder = shape(*arguments), tmp_path / Path(profile[role]["model"]).name  # one where both are the same
        config.save_pretrained(folder)
        with torch.device("meta"):
            assert AutoModelForCausalLM.from_config(config).num_parameters() == parameters
        specs.append(ModelSpec(**profile[role] | {"model": str(folder)}))
    device, dtype, available = HARDWARE[name]
    settings = {**profile["train"], **profile["budget"]}
    items = memory_sum(*specs, settings, profile["task"]["prompt_length"], device, dtype, available)
    check_memory(items, available)
    stated = float(re.search(r"^# Memory: ([0-9.]+) GiB", text, re.MULTILINE)[1])
    assert stated == pytest.approx(peak(items) / GIB, abs=0.06), capsys.readouterr().out


def test_weights_are_those_that_loading_takes(tmp_path):
    base = write_model(tmp_path / "base", "qwen2", 0, hidden_size=128, rows=512)
    teacher = write_model(tmp_path / "teacher", "qwen2", 1)

    def summed(**spec) -> dict[str, float]:
        return memory_sum(ModelSpec(base, **spec), ModelSpec(teacher), TRAIN, 16, "cpu", torch.float32, available=0)

    for four_bit in (False, True):
        model = load_base(ModelSpec(base, four_bit=four_bit), torch.float32, torch.device("cpu"))
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        expected = summed(four_bit=four_bit, lora=LORA)["student: weights"]
        scales = (FOUR_BIT - 0.5) / FOUR_BIT if four_bit else 0
        assert held == pytest.approx(expected, rel=scales + 1e-6)
    trained = summed()
    assert trained["student: gradients"] == trained["student: weights"]
    assert trained["student: optimiser states"] == 2 * trained["student: weights"]
    lora = summed(lora=LORA)
    r, layers, kv = LORA["r"], 2, 64  # of q_proj, v_proj and down_proj, all of rank r
    parameters = layers * r * ((128 + 128) + (128 + kv) + (128 + 128))
    assert lora["student: adapter"] == 4 * parameters


def test_a_shared_base_is_counted_once(tmp_path):
    base = write_model(tmp_path / "base", "llama", 0)
    adapter = write_adapter(tmp_path / "adapter", base, 0)

    def summed(teacher: ModelSpec) -> dict[str, float]:
        return memory_sum(ModelSpec(base, lora=LORA), teacher, TRAIN, 16, "cpu", torch.float32, available=0)

    shared = summed(ModelSpec(base, adapter=adapter))
    assert "teacher: weights" not in shared
    assert shared["teacher: adapter"] > 0
    alone = summed(ModelSpec(write_model(tmp_path / "other", "llama", 1)))
    assert alone["teacher: weights"] == alone["student: weights"]


def test_checkpointing_and_smaller_batches_take_less(tmp_path):
    base = ModelSpec(write_model(tmp_path / "base", "llama", 0, num_hidden_layers=8), lora=LORA)

    def activations(**changes) -> float:
        items = memory_sum(base, base, TRAIN | changes, 256, "cpu", torch.float32, available=0)
        return items["update: activations"]

    assert activations(gradient_checkpointing=True) < activations() / 2
    assert activations(per_device_train_batch_size=2) == pytest.approx(activations() / 2, rel=0.01)


def test_activations_are_those_that_autograd_saves(tmp_path):
    """On real tensors, with attention that saves no scores."""
    folder = write_model(tmp_path / "base", "llama", 0, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    storages, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(torch.zeros((4, 48), dtype=torch.long), use_cache=False).last_hidden_state
    measured = sum(storage.nbytes() for storage in storages.values())
    assert hidden.requires_grad
    spec = ModelSpec(folder)
    items = memory_sum(spec, spec, TRAIN, 16, "cpu", torch.float32, available=0)
    layer = measured / 3  # the sum adds one, for the gradients
    assert items["update: activations"] == pytest.approx(KEPT["cpu"] * (measured + layer), rel=0.15)


def test_what_cannot_fit_is_refused_with_the_sum():
    items = {"student: weights": 3 * GIB, "generation: logits": 2 * GIB, "update: activations": 4 * GIB}
    assert peak(items) == 7 * GIB
    check_memory(items, 8 * GIB)
    with pytest.raises(ValueError, match=r"take 7\.0 GiB of memory and this device has 6\.0: update: activations 4\.0"):
        check_memory(items, 6 * GIB)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep less")
def test_freed_memory_goes_back_to_the_system():
    torch.ones(2**20)  # freed: from now on glibc takes such sizes from its heap
    held = [torch.ones(2**20) for _ in range(100)]  # 4 MiB each
    last, before = held[-1], psutil.Process().memory_info().rss
    del held
    release()
    assert psutil.Process().memory_info().rss < before - 100 * 2**20
    assert last.sum() == 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts anew")
def test_what_a_run_takes_is_counted_from_its_beginning():
    device, large = torch.device("cpu"), torch.ones(2**27)  # 512 MiB
    del large
    before = taken(device)
    reset_peak(device)
    assert taken(device) < before - 400 * 2**20


MEASURE = """
import resource, sys, torch
from pathlib import Path
from cmdp.models import ModelSpec, load_pair
from cmdp.train import distil
import datasets, peft, trl, bitsandbytes  # what a run imports
method, student, teacher, out = sys.argv[1:]
pair = load_pair(ModelSpec(student, lora={}), ModelSpec(teacher), True)
settings = dict(max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=96,
                use_cpu=True, save_strategy="no", budget=0.001, optim="adamw_torch")
problems = [{"prompt": " ".join("abcdefgh" * 4), "answer": "a"}] * 4
distil(method, *pair, problems, lambda completions, **_: [0.0] * len(completions), Path(out), False, settings)
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cmdp-overshoot", "grpo", "kdrl"])
def test_the_sum_is_near_the_peak_of_a_process_that_trains(tmp_path, method):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 6}
    student = write_model(tmp_path / "student", "llama", 0, rows=32768, **sizes)
    teacher = write_model(tmp_path / "teacher", "llama", 1, rows=32768, **sizes | {"num_hidden_layers": 12})
    command = [sys.executable, "-c", MEASURE, method, student, teacher, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = float(done.stdout.rpartition("PEAK")[2])
    items = memory_sum(
        ModelSpec(student, lora={}),
        ModelSpec(teacher),
        {"per_device_train_batch_size": 8, "max_completion_length": 96, **METHODS[method]},
        32,
        "cpu",
        torch.float32,
        available=0,
    )
    print({name: round(amount / GIB, 3) for name, amount in items.items()}, measured / GIB, peak(items) / GIB)
    assert measured == pytest.approx(peak(items), rel=0.2)
