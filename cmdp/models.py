"""Students, teachers and their tokenizer: made small for the default experiment, or loaded from the Hub, a local folder
or a GGUF file; with LoRA, in 4 bits, or with one copy of the base weights for both.

Weights are read and written as safetensors (or read as GGUF) only, and no code that a model brings along is ever run.
What the Hub is asked for follows HF_HUB_OFFLINE.
"""

import contextlib
import copy
import inspect
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from cmdp.storage import named, one_line, whole

_LEARNED = weakref.WeakKeyDictionary()  # whether a model learned absolute positions
LORA = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are `words`, split at white space, after <pad>, <eos> and <unk>."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {word: index for index, word in enumerate([*special.values(), *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)


def build_model(tokenizer: PreTrainedTokenizerBase, layers: int, hidden: int, heads: int, seed: int) -> PreTrainedModel:
    """A Llama of random weights over the tokenizer's ids: `layers` blocks of width `hidden`."""
    torch.manual_seed(seed)
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    fixed = {"max_position_embeddings": 256, "initializer_range": 0.1, "num_attention_heads": heads}
    return transformers.LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **fixed, **ids))


@dataclass
class ModelSpec:
    """Where a role's model comes from and how it is loaded."""

    model: str  # a Hub id, a local folder, or a GGUF file
    gguf_file: str | None = None  # its name, where `model` is the Hub id or folder that holds it
    adapter: str | None = None  # a PEFT adapter, by Hub id or folder: the teacher's, or where the student's starts
    revision: str | None = None  # the commit, branch or tag of a Hub id
    four_bit: bool = False  # hold the weights as 4-bit nf4 with double quantisation
    lora: dict[str, Any] | None = None  # train a new LoRA adapter with `LORA`'s keys, whose values are the defaults

    @property
    def base(self) -> tuple:
        """What two specs share if they are the same weights, held in the same way."""
        return self.model, self.gguf_file, self.revision, self.four_bit

    @property
    def trains_adapter(self) -> bool:
        """Whether training moves an adapter, and no weight of the model."""
        return self.lora is not None or self.adapter is not None

    def where(self) -> dict:
        """The arguments of `from_pretrained` that say which files."""
        folder, gguf_file = str(self.model), self.gguf_file
        if gguf_file is None and folder.endswith(".gguf"):
            folder, gguf_file = str(Path(folder).parent), Path(folder).name
        named = {"gguf_file": gguf_file} if gguf_file else {}
        named |= {} if Path(folder).is_dir() else {"revision": self.revision}  # of a Hub id
        return {"pretrained_model_name_or_path": folder, "local_files_only": offline(), **named}

    def files(self) -> list[Path]:
        """The local files of the model and its adapter."""
        found = [Path(source) for source in (self.model, self.adapter) if source and Path(source).exists()]
        return [file for path in found for file in ([path] if path.is_file() else path.iterdir()) if file.is_file()]


def check_specs(student: ModelSpec, teacher: ModelSpec) -> None:
    """Raise `ValueError` where settings of a student and a teacher do not go together."""
    for role, spec in (("student", student), ("teacher", teacher)):
        if unknown := sorted(set(spec.lora or {}) - set(LORA)):
            raise ValueError(f"{role}.lora has no {', '.join(unknown)}: its keys are {', '.join(LORA)}.")
        if spec.four_bit and "gguf_file" in spec.where():
            raise ValueError(f"{role}: a GGUF file cannot be held in 4 bits: name unquantised weights.")
    if teacher.lora is not None or (student.lora is not None and student.adapter):
        raise ValueError("lora makes a new adapter to train: it goes with the student, and without `adapter`.")
    if student.four_bit and not student.trains_adapter:
        raise ValueError("student.four_bit needs student.lora: 4-bit weights cannot themselves be trained.")


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def pick_device(use_cpu: bool = False) -> torch.device:
    """This process's GPU, if there is one and `use_cpu` does not forbid it."""
    gpu = torch.cuda.is_available() and not use_cpu
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")


def pick_dtype(device: torch.device, bf16: bool = False) -> torch.dtype:
    """The dtype that `device` computes in: bfloat16 where its hardware has it, else float16 (a T4); on a CPU float32,
    or bfloat16 if `bf16` asks for it."""
    if device.type != "cuda":
        return torch.bfloat16 if bf16 else torch.float32
    # `is_bf16_supported` says yes for a T4, which emulates it, slowly
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def keep_packing(model: torch.nn.Module) -> None:
    """Leave 4-bit weights as they are packed. On a CPU with bfloat16 bitsandbytes would repack them in place, though
    two models may share them, and fails at widths that are no multiple of 64."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load(spec: ModelSpec, kind, **options):
    """What `kind.from_pretrained` loads of a spec's model. Raises `FileNotFoundError` if there is no such model and
    `ValueError` if it cannot be read, in one line."""
    try:
        return kind.from_pretrained(**spec.where(), trust_remote_code=False, **options)
    except Exception as error:
        if Path(spec.model).exists() or not isinstance(error, OSError):
            raise ValueError(f"{spec.model} cannot be read: {one_line(error)}") from error
        hint = "HF_HUB_OFFLINE is set: unset it to download it" if offline() else str(error).partition("\n")[0]
        raise FileNotFoundError(f"There is no local folder {spec.model}, nor a model of this name: {hint}.") from error


def load_base(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The weights that `spec` names, in `dtype` or 4 bits, without its adapter. Raises `FileNotFoundError` if there is
    no such model, `ValueError` if its weight files are damaged or lack tensors."""
    options, unpacked = {"dtype": dtype, "use_safetensors": True}, "gguf_file" in spec.where()
    if unpacked and hasattr(transformers, "GgufConfig"):  # earlier releases unpack the weights without being told to
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if spec.four_bit:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True, **nf4)
    # several processes without 4 bits may be FSDP's or DeepSpeed's, which place the weights themselves
    if spec.four_bit or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        options["device_map"] = {"": device}
    model, info = load(spec, AutoModelForCausalLM, output_loading_info=True, **options)
    if unpacked and hasattr(model, "hf_quantizer"):  # as if it had never been packed
        model.hf_quantizer.remove_quantization_config(model)
    keep_packing(model)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"The weights of {spec.model} lack {missing[0]} and {len(missing) - 1} more: get them again.")
    return model


def load_tokenizer(source: str | Path | ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left as generation needs."""
    tokenizer = load(_spec(source), transformers.AutoTokenizer, padding_side="left")
    if tokenizer.pad_token is None:  # Llama's
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {_spec(source).model} names no token that ends a text (eos_token).")
    return tokenizer


def shared_tokenizer(student: str | Path | ModelSpec, teacher: str | Path | ModelSpec) -> PreTrainedTokenizerBase:
    """The student's tokenizer. Raises `ValueError` unless the teacher's has the same ids; no weights are read."""
    both = [load_tokenizer(student), load_tokenizer(teacher)]
    check_vocabulary(*both, f"The student {_spec(student).model} and the teacher {_spec(teacher).model}")
    return both[0]


def check_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, models: str) -> None:
    """Raise `ValueError`, which names the `models`, unless two tokenizers have the same ids. One may have a padding
    token of its own, and llama.cpp's fillers of a GGUF up to the rows of the head."""
    both = student, teacher
    one, other = ({(x, i) for x, i in kind.get_vocab().items() if x != f"[PAD{i}]"} for kind in both)
    if (one ^ other) - {(kind.pad_token, kind.pad_token_id) for kind in both}:
        hint = "no divergence between them is defined. Choose a teacher from the student's family."
        raise ValueError(f"{models} have different vocabularies: {hint}")


def find_tokenizer(model: PreTrainedModel | str, revision: str | None = None, trust_remote_code: bool = False):
    """The tokenizer beside a model, named or loaded, or beside the base model of a PEFT adapter; None where there is
    none. That of a loaded model is not downloaded."""
    from peft import PeftConfig

    named = isinstance(model, str)
    name, options = model if named else model.config._name_or_path, {"local_files_only": offline() or not named}
    try:
        if named and find_adapter_config_file(name, revision=revision, **options):
            name, revision = PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path, None
        options |= {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):
        return None
    # beside weights alone transformers finds an empty one, of special tokens
    return tokenizer if len(tokenizer) > len(tokenizer.added_tokens_encoder) else None


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of texts, each after what the tokenizer starts a text with (BOS), once, whether or not the text brings it
    along; without what it ends one with. Raises `ValueError` for a text without ids."""
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    whole, own = tokenizer(texts[0]).input_ids, ids[0]
    start = next((whole[:at] for at in range(len(whole)) if own and whole[at : at + len(own)] == own), [])
    ids = [row if row[: len(start)] == start else start + row for row in ids]
    if not all(ids):
        raise ValueError("A prompt is empty: leave it out, or give it a token.")
    return ids


def load_teacher(teacher: PreTrainedModel | str, student, config) -> tuple[PreTrainedModel, bool]:
    """The teacher of a trainer with the `CMDPConfig`, loaded as TRL loads models if it is a name (Hub id or folder of a
    model or PEFT adapter), and whether its tokenizer was found and compared with that of `student` (a model, name,
    tokenizer or processor). Raises, before weights are read, `FileNotFoundError` if there is no such teacher and
    `ValueError` if it has other ids."""
    from trl.trainer.utils import create_model_from_path

    named, trust = isinstance(teacher, str), config.trust_remote_code
    options = {"revision": config.teacher_model_revision, "trust_remote_code": trust, "use_safetensors": True}
    options |= {"dtype": "auto"} | (config.teacher_model_init_kwargs or {})
    if config.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    if isinstance(student, str | torch.nn.Module):
        student = find_tokenizer(student, (config.model_init_kwargs or {}).get("revision"), trust)
    other = find_tokenizer(teacher, options["revision"], trust)
    if compared := bool(student and other):
        check_vocabulary(getattr(student, "tokenizer", student), other, "Student and teacher")
    if not named and config.teacher_model_init_kwargs:
        raise ValueError("teacher_model_init_kwargs load a teacher named by a string, but teacher_model is a model.")
    if getattr(getattr(teacher, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("The teacher has a learned prompt, which is not read: give one without, or with LoRA.")
    try:
        model = create_model_from_path(teacher, AutoModelForCausalLM, **options) if named else without_peft(teacher)
    except OSError as error:
        raise FileNotFoundError(f"There is no teacher {teacher}: {str(error).splitlines()[0]}") from error
    keep_packing(model)
    return model, compared


def load_pair(
    student: str | Path | ModelSpec, teacher: str | Path | ModelSpec, use_cpu: bool = False, bf16: bool = False
) -> tuple:
    """(student, teacher, tokenizer), ready to train; a path stands for the spec of a whole model, and `use_cpu` and
    `bf16` are as in training (`pick_device`, `pick_dtype`).

    A student that trains an adapter is a `PeftModel`; one that does not is loaded in float32, as its optimiser needs.
    A teacher of the same base as an adapter's, with an adapter of its own or without (an anchor: the student before
    training), uses the student's copy of the base weights. The teacher is always an ordinary transformers model.
    Raises `FileNotFoundError` as `load_base` does, and `ValueError` for different tokenizers, before reading weights.
    """
    student, teacher = _spec(student), _spec(teacher)
    tokenizer, device = shared_tokenizer(student, teacher), pick_device(use_cpu)
    dtype = pick_dtype(device, bf16)
    model = load_base(student, dtype if student.trains_adapter else torch.float32, device)
    if student.four_bit:  # freezes the base and holds norms and head in float32
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    shared = student.trains_adapter and student.base == teacher.base
    other = same_weights(model) if shared else load_base(teacher, dtype, device)
    if teacher.adapter:
        other = _with_adapter(other, teacher.adapter).get_base_model()
    if student.adapter:
        model = _with_adapter(model, student.adapter, is_trainable=True)
    elif student.lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(student))
    return model, other.requires_grad_(False).eval(), tokenizer


def without_peft(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model that a `PeftModel` wraps, with its adapters; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def whole_states(model: torch.nn.Module):
    """While a model generates, its head reads contiguous states. Of a slice, such as each prompt's last position, a CPU
    would copy a frozen head once per row."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


def positions(model: PreTrainedModel, attention: torch.Tensor) -> dict[str, torch.Tensor]:
    """`position_ids` of rows padded on the left, (B, T), where the model learned absolute positions (GPT-2): without
    them it would count the padding. Empty for rotary positions, to which only differences matter."""
    if model not in _LEARNED:  # looked for once: a model has a thousand modules
        rotary = any("rotary" in name for name, _ in model.base_model.named_modules())
        _LEARNED[model] = not rotary and "position_ids" in inspect.signature(model.base_model.forward).parameters
    return {"position_ids": (attention.cumsum(dim=1) - 1).clamp(min=0)} if _LEARNED[model] else {}


def check_heads(student, teacher, ids: int, compared: bool, sampled: bool) -> None:
    """Raise `ValueError` for an LM head from which no divergence over the tokenizer's `ids` is read: one with too few
    rows, or with an adapter that TRL's fused head (the student's; the teacher's where the divergence is `sampled`)
    ignores. Unless the teacher's vocabulary was `compared`, its rows beyond the ids must be padding: as many rows as
    the student's, or no more than 128 or 1/64 of the ids beyond them."""
    rows = []
    for role, model, fused in (("student", student, True), ("teacher", teacher, sampled)):
        head = model.get_output_embeddings()
        rows.append(getattr(head.weight, "ds_shape", head.weight.shape)[0])  # ZeRO-3 leaves an empty weight
        padded = rows[-1] == rows[0] or rows[-1] - ids <= max(128, ids // 64)
        if rows[-1] < ids or not (padded or compared):
            sizes = f"{rows[-1]} rows but the tokenizer {ids} ids"
            raise ValueError(f"The {role}'s head has {sizes}: use one model family.")
        if fused and hasattr(head, "base_layer"):  # of which the fused head reads the weight
            raise ValueError(f"The adapter on the {role}'s LM head would be ignored: merge it (merge_and_unload).")


def lora_config(spec: ModelSpec):
    """The `LoraConfig` of a spec that trains a new adapter."""
    from peft import LoraConfig

    names = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    return LoraConfig(**{names.get(key, key): x for key, x in (LORA | spec.lora).items()}, task_type="CAUSAL_LM")


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model on the very weights of `model`. Its modules are its own, so that an adapter, a patched forward or
    a mode put on one does not touch the other; its parameters and buffers are not copied."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    states = [vars(module)["quant_state"] for module in model.modules() if "quant_state" in vars(module)]
    return copy.deepcopy(model, memo | {id(state): state for state in states})  # of 4-bit layers


def prune(source: str, without: list[int], target: Path) -> tuple[int, int]:
    """Write the model `source` (a Hub id, folder or GGUF file) less the layers `without`, counted from 0, to the new
    folder `target`, in float32, with its tokenizer. Returns the numbers of parameters before and after. Raises
    `ValueError` if `target` exists, or a layer does not."""
    if target.exists():
        raise ValueError(f"There is something at {target} already: name a folder that does not exist.")
    spec = ModelSpec(source)
    model = load_base(spec, torch.float32, torch.device("cpu"))
    before, config, layers = model.num_parameters(), model.config.get_text_config(), model.base_model.layers
    kept = [place for place in range(len(layers)) if place not in without]
    if not kept or len(kept) + len(set(without)) != len(layers):
        raise ValueError(f"{source} has layers 0 to {len(layers) - 1}: leave out some of these, and not all.")
    model.base_model.layers = torch.nn.ModuleList(layers[place] for place in kept)
    if getattr(config, "layer_types", None):  # one entry a layer, where kinds of attention take turns
        config.layer_types = [config.layer_types[place] for place in kept]
    config.num_hidden_layers = len(kept)
    with whole(target) as folder, named(target):
        model.save_pretrained(folder)
        load_tokenizer(spec).save_pretrained(folder)
    return before, model.num_parameters()


def _with_adapter(model: PreTrainedModel, source: str, **options):
    """`model` under the adapter at `source`, a Hub id or folder. Raises unless a folder holds it as safetensors."""
    from peft import PeftModel

    if Path(source).is_dir() and not (Path(source) / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"There is no adapter_model.safetensors in {source}: name a PEFT adapter's folder.")
    with named(source, "cannot be read", ValueError):
        return PeftModel.from_pretrained(model, source, local_files_only=offline(), **options)


def _spec(source: str | Path | ModelSpec) -> ModelSpec:
    return source if isinstance(source, ModelSpec) else ModelSpec(str(source))
