"""What a training run takes in memory, summed up from the models' configurations before any weights are read.

Weights, gradients and optimiser states are counted; activations are, too, by a forward pass of the architecture on
PyTorch's meta device, where tensors have shapes and no content. What generation, scoring and update need beyond that
does not add up, since it is freed in between: the largest counts.
"""

import copy
import sys
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from cmdp.models import LORA, ModelSpec, load_config
from cmdp.storage import processor

GIB = 2**30
# nf4: half a byte a weight, an 8-bit scale for 64 of them and, of those scales, a float32 for 256
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
# of the process: CUDA's context, its libraries' workspaces and what the allocator leaves unused; or Python's libraries
OVERHEAD = {"cuda": 1.0 * GIB, "cpu": 0.7 * GIB}
TILE = (4096, 32768)  # tokens by vocabulary of TRL's kernels, in float32
# Tiles at a time, and activations as a multiple of what autograd saves. A GPU's kernels work in place; on a CPU each
# step over a tile is a copy, and freed memory does not all return: these two were fitted to the peaks of two processes.
TILES = {"cuda": 3, "cpu": 8}
KEPT = {"cuda": 1.0, "cpu": 1.5}
PHASES = ("generation", "scoring", "update")


def memory_sum(
    student: ModelSpec,
    teacher: ModelSpec,
    settings: dict,
    prompt_length: int,
    device_type: str,
    dtype: torch.dtype,
    available: float,
) -> dict[str, float]:
    """Bytes by item. Items named for one of `PHASES` ("update: activations") are there in that phase only.

    Args:
        settings: fields of `CMDPConfig`: batch, completion length, checkpointing, optimiser.
        prompt_length: the longest prompt's, in tokens.
        device_type: "cuda" or "cpu".
        dtype: what the device computes in.
        available: bytes that it has.
    """
    size, tokens = dtype.itemsize, prompt_length + settings["max_completion_length"]
    batch = settings.get("per_device_train_batch_size", 8)
    rollouts = batch * settings.get("steps_per_generation", settings.get("gradient_accumulation_steps", 1))
    configs = load_config(student), load_config(teacher)
    shared = student.trains_adapter and student.base == teacher.base
    models = [_skeleton(config) for config in configs]

    items = {}
    held = size if student.trains_adapter else 4
    items["student: weights"] = _weights(models[0], student.four_bit, 4 if student.four_bit else held)
    trained = _adapter(models[0], student) if student.trains_adapter else models[0].num_parameters()
    # TRL holds a 4-bit student's adapter in bfloat16, where the device has it
    state = 2 if student.four_bit and dtype != torch.float16 else 4
    if student.trains_adapter:
        items["student: adapter"] = trained * state
    items["student: gradients"] = trained * state
    optimiser = settings.get("optim", "adamw_torch")
    moments = 0 if "sgd" in optimiser else 2 if "8bit" in optimiser else 2 * state
    items["student: optimiser states"] = trained * moments
    if not shared:
        items["teacher: weights"] = _weights(models[1], teacher.four_bit, size)
    if teacher.adapter:
        items["teacher: adapter"] = _adapter(models[1], teacher) * 4

    text = [config.get_text_config() for config in configs]
    heads = getattr(text[0], "num_key_value_heads", None) or text[0].num_attention_heads
    width = getattr(text[0], "head_dim", None) or text[0].hidden_size // text[0].num_attention_heads
    logits = rollouts * text[0].vocab_size * 4
    if settings.get("use_vllm") and settings.get("vllm_mode", "colocate") == "colocate":
        share = settings.get("vllm_gpu_memory_utilization", 0.3)
        items["vLLM's share of the device"] = share * available
    elif not settings.get("use_vllm"):
        items["generation: keys and values"] = rollouts * tokens * text[0].num_hidden_layers * 2 * heads * width * size
        items["generation: logits and what is drawn from"] = 3 * logits
    tile = min(batch * settings["max_completion_length"], TILE[0]) * min(text[0].vocab_size, TILE[1]) * 4  # float32
    items["rollouts: teacher's hidden states"] = (
        rollouts * settings["max_completion_length"] * text[1].hidden_size * size
    )
    layer, other = _activations(configs[0], student, batch, tokens, dtype)
    layers = text[0].num_hidden_layers
    if settings.get("gradient_checkpointing"):
        kept = layers * batch * tokens * text[0].hidden_size * size + 2 * layer
    else:
        kept = layers * layer + layer  # and the gradients of the layer that is being differentiated
    for phase, amount in (("scoring", layer), ("update", kept + other)):
        items[f"{phase}: activations"] = amount * KEPT[device_type]
        items[f"{phase}: logits of both models, in tiles"] = tile * TILES[device_type]
    if not student.trains_adapter and size < 4:
        items["update: weights in the computing dtype"] = trained * size
    packed = [max(map(torch.numel, _linear(m))) for m, s in zip(models, (student, teacher), strict=True) if s.four_bit]
    if packed:
        items["scoring: a 4-bit layer, unpacked"] = items["update: a 4-bit layer, unpacked"] = max(packed) * size
    items["process"] = OVERHEAD[device_type]
    return items


def peak(items: dict[str, float]) -> float:
    """Bytes that the items of `memory_sum` come to when they come to most."""
    phase_of = {name: name.partition(":")[0] for name in items}
    always = sum(amount for name, amount in items.items() if phase_of[name] not in PHASES)
    return always + max(sum(amount for name, amount in items.items() if phase_of[name] == phase) for phase in PHASES)


def check_memory(items: dict[str, float], available: float) -> None:
    """Print the sum, item by item. Raises `ValueError` if there are not so many bytes."""
    for name, amount in items.items():
        print(f"{amount / GIB:8.2f} GiB  {name}")
    need = peak(items)
    print(
        f"{need / GIB:8.2f} GiB  in all (generation, scoring and update take turns); "
        f"the device has {available / GIB:.1f} GiB"
    )
    if need > available:
        largest = ", ".join(f"{name} {items[name] / GIB:.1f}" for name in sorted(items, key=items.get)[:-4:-1])
        raise ValueError(
            f"Training would take {need / GIB:.1f} GiB of memory and this device has {available / GIB:.1f}: {largest}. "
            "Take a smaller train.per_device_train_batch_size, train.gradient_checkpointing=true, lora or four_bit."
        )


def device_memory(device: torch.device) -> int:
    """Bytes that the GPU, or for a CPU the machine, has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def taken(device: torch.device) -> int:
    """Bytes that this process has held at most: of the GPU, since its peak was last reset, or of the machine's memory,
    since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource  # which Windows lacks

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _skeleton(config, **changes) -> nn.Module:
    """The model of a configuration, with shapes and no weights."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="counted")
    model.tie_weights()
    return model


def _weights(model: nn.Module, four_bit: bool, size: int) -> float:
    """Bytes of the weights; in 4 bits those of linear layers but the head, as bitsandbytes has it, the rest `size`."""
    packed = sum(map(torch.numel, _linear(model))) if four_bit else 0
    return packed * FOUR_BIT + (model.num_parameters() - packed) * size


def _linear(model: nn.Module) -> list[Tensor]:
    """The weights that 4-bit loading packs."""
    head = model.get_output_embeddings()
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


def _with_adapter(model: nn.Module, spec: ModelSpec) -> nn.Module:
    from peft import LoraConfig, PeftConfig, get_peft_model

    if spec.adapter:
        config = PeftConfig.from_pretrained(spec.adapter)
        config.inference_mode = False
    else:
        lora = LORA | spec.lora
        config = LoraConfig(r=lora["r"], target_modules=lora["target_modules"], task_type="CAUSAL_LM")
    with torch.device("meta"):
        return get_peft_model(copy.deepcopy(model), config)


def _adapter(model: nn.Module, spec: ModelSpec) -> int:
    """Parameters of the adapter."""
    return sum(p.numel() for p in _with_adapter(model, spec).parameters() if p.requires_grad)


def _activations(config, spec: ModelSpec, batch: int, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a forward of the student saves for its backward: (in one layer, outside of the layers)."""
    saved = []
    for layers in (1, 2):
        model = _skeleton(config, num_hidden_layers=layers)
        model = (_with_adapter(model, spec).get_base_model() if spec.trains_adapter else model).to(dtype)
        ids = torch.zeros((batch, tokens), dtype=torch.long, device="meta")
        with _counting({p.untyped_storage()._cdata for p in model.parameters()}) as storages:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        saved.append(sum(storage.nbytes() for storage in storages.values()))
        del hidden
    return saved[1] - saved[0], max(2 * saved[0] - saved[1], 0)


@contextmanager
def _counting(but: set[int]):
    """Context in which what is saved for a backward is kept in the dict it yields, without the storages in `but`."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in but:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


class _Attention(torch.autograd.Function):
    """Saves what fused attention does: queries, keys, values and its output, not the scores."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output.transpose(1, 2)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError


def _attention(module, query, key, value, *_, **__):
    return _Attention.apply(query, key, value), None


AttentionInterface.register("counted", _attention)
