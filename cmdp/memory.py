"""Memory of a training run, summed from the models' configurations before any weights are read.

Weights, gradients and optimiser states are counted; so are activations, by a forward pass on PyTorch's meta device
(shapes without content). Generation, scoring and update take turns: the largest of the three counts.
"""

import contextlib
import copy
import ctypes
import re
import sys
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from cmdp import divergence
from cmdp.models import ModelSpec, load, lora_config
from cmdp.storage import processor

GIB = 2**30
# nf4: half a byte per weight, an 8-bit scale per 64 weights, a float32 per 256 scales
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
OVERHEAD = {"cuda": 1.2 * GIB, "cpu": 0.7 * GIB}  # CUDA context, workspaces, fragmentation; or Python's libraries
TILE = (4096, 32768)  # tokens by vocabulary of TRL's kernels, in float32
# Tiles at a time, TRL's and our own, and activations by what autograd saves; fitted to peaks: a CPU seldom uses freed
# memory again
TILES, OWN_TILES = {"cuda": 3, "cpu": 6}, 32
KEPT = {"cuda": 1.0, "cpu": 1.75}
PHASES = ("generation", "scoring", "update")


def memory_sum(
    student: ModelSpec, teacher: ModelSpec, settings: dict, prompt_length: int, device: str, dtype, available: float
) -> dict[str, float]:
    """Bytes by item. An item named after one of `PHASES` ("update: activations") exists in that phase only.

    `settings` are fields of `CMDPConfig`, `prompt_length` the tokens of the longest prompt; `device` is "cuda" or "cpu"
    and has `available` bytes, and `dtype` is what it computes in.
    """
    get, size = settings.get, dtype.itemsize
    length, batch = get("max_completion_length", 256), get("per_device_train_batch_size", 8)
    tokens = prompt_length + length
    rollouts = batch * get("steps_per_generation", get("gradient_accumulation_steps", 1))
    config, teacher_config = (load(spec, AutoConfig) for spec in (student, teacher))
    text, model, teacher_model = config.get_text_config(), _skeleton(config), _skeleton(teacher_config)
    lora, vocabulary, layers = student.trains_adapter, text.vocab_size, text.num_hidden_layers
    trained = _skeleton(config, student).get_nb_trainable_parameters()[0] if lora else model.num_parameters()
    # TRL holds a 4-bit student's adapter in bfloat16, where the device has it
    state = 2 if student.four_bit and dtype != torch.float16 else 4
    optimiser = get("optim", "adamw_torch")
    moments = 0 if "sgd" in optimiser else 2 if "8bit" in optimiser else 2 * state

    items = {"student: weights": _weights(model, student.four_bit, size if lora and not student.four_bit else 4)}
    if lora:
        items["student: adapter"] = trained * state
    items |= {"student: gradients": trained * state, "student: optimiser states": trained * moments}
    if not (lora and student.base == teacher.base):  # else the teacher uses the student's weights
        items["teacher: weights"] = _weights(teacher_model, teacher.four_bit, size)
    if teacher.adapter:
        items["teacher: adapter"] = 4 * _skeleton(teacher_config, teacher).get_nb_trainable_parameters()[0]
    if not get("use_vllm"):
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        items["generation: keys and values"] = rollouts * tokens * layers * 2 * heads * width * size
        items["generation: logits and what is drawn from"] = 3 * rollouts * vocabulary * 4
    elif get("vllm_mode", "colocate") == "colocate":
        items["vLLM's share of the device"] = get("vllm_gpu_memory_utilization", 0.3) * available
    items["rollouts: teacher's hidden states"] = rollouts * length * teacher_config.get_text_config().hidden_size * size

    passed = torch.float32 if student.four_bit else dtype  # between layers: a 4-bit model's norms are in float32
    one, two = (_activations(config, student, count, batch, tokens, passed) for count in (1, 2))
    layer, other = two - one, max(2 * one - two, 0)
    kept = layer * (layers + 1)  # and the gradients of the layer that is being differentiated
    if get("gradient_checkpointing"):
        kept = layers * batch * tokens * text.hidden_size * passed.itemsize + 2 * layer
    if device == "cpu" and get("divergence", "reverse_kl") in divergence.EXACT:
        tiles = OWN_TILES * min(batch * length * vocabulary, divergence.TILE)
    else:  # TRL's run over the prompt too on a CPU
        rows = batch * (length if device == "cuda" else tokens)
        tiles = TILES[device] * min(rows, TILE[0]) * min(vocabulary, TILE[1])
    packed = _packed(model) * student.four_bit + _packed(teacher_model) * teacher.four_bit
    for phase, amount in (("scoring", layer), ("update", kept + other)):
        items[f"{phase}: activations"] = amount * KEPT[device]
        items[f"{phase}: logits of both models, in tiles"] = 4 * tiles
        if packed:
            items[f"{phase}: a 4-bit layer, unpacked"] = max(packed) * size
        if student.four_bit:
            items[f"{phase}: the head in the computing dtype"] = vocabulary * text.hidden_size * size
    if not lora and size < 4:
        items["update: weights in the computing dtype"] = trained * size
    return items | {"process": OVERHEAD[device]}


def peak(items: dict[str, float]) -> float:
    """Bytes of the items of `memory_sum` in the phase that takes most."""
    others = [{*PHASES} - {phase} for phase in PHASES]
    return max(sum(items[name] for name in items if name.partition(":")[0] not in absent) for absent in others)


def check_memory(items: dict[str, float], available: float) -> None:
    """Print the items and their sum. Raises `ValueError` if it exceeds the `available` bytes."""
    need, has = peak(items) / GIB, available / GIB
    for name, amount in items.items():
        print(f"{amount / GIB:8.2f} GiB  {name}")
    print(f"{need:8.2f} GiB  in all (generation, scoring and update take turns); the device has {has:.1f} GiB")
    if need > has:
        largest = ", ".join(f"{name} {items[name] / GIB:.1f}" for name in sorted(items, key=items.get)[:-4:-1])
        hint = "a smaller train.per_device_train_batch_size, train.gradient_checkpointing=true, lora or four_bit"
        said = f"Training would take {need:.1f} GiB of memory and this device has {has:.1f}: {largest}"
        raise ValueError(f"{said}. Take {hint}.")


def device_memory(device: torch.device) -> int:
    """Total bytes of the GPU or, for a CPU, of main memory."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def reset_peak(device: torch.device) -> None:
    """Let `taken` count from now on, where the system can: on a GPU and under Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def taken(device: torch.device) -> int:
    """Peak bytes of this process, on the GPU or in main memory, since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")  # what `resource` says cannot be reset
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return 1024 * int(found[1])
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release() -> None:
    """Give back what no name holds any more: to a GPU, and to the system what glibc keeps of it for later."""
    from accelerate.utils import release_memory

    release_memory()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _skeleton(config, spec: ModelSpec | None = None, layers: int | None = None) -> nn.Module:
    """The model of a configuration without weights, of so many `layers`, under the adapter of `spec`, if given."""
    config = copy.deepcopy(config)
    if layers:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):  # one per layer
            text.layer_types = (layers * text.layer_types)[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="counted")
        model.tie_weights()
        if spec is None or not spec.trains_adapter:
            return model
        from peft import PeftConfig, get_peft_model

        adapter = PeftConfig.from_pretrained(spec.adapter) if spec.adapter else lora_config(spec)
        adapter.inference_mode = False
        return get_peft_model(model, adapter)


def _weights(model: nn.Module, four_bit: bool, size: int) -> float:
    """Bytes of the weights, `size` each but for those that 4-bit loading packs."""
    packed = sum(_packed(model)) * four_bit
    return packed * FOUR_BIT + (model.num_parameters() - packed) * size


def _packed(model: nn.Module) -> list[int]:
    """Sizes of the weights that 4-bit loading packs: all linear layers but the head."""
    head = model.get_output_embeddings()
    return [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def _activations(config, spec: ModelSpec, layers: int, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass of the student with so many layers saves for its backward."""
    model = _skeleton(config, spec, layers).to(dtype)
    model = model.get_base_model() if spec.trains_adapter else model
    saved = {}  # by storage, which is kept alive so that no other takes its place

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros((batch, tokens), dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)


def _attention(module, query, key, value, *_, **__) -> tuple[Tensor, None]:
    """Saves what fused attention does: queries, keys, values and its output, not the scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0].transpose(1, 2), None


AttentionInterface.register("counted", _attention)
