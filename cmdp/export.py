"""Export a trained student: a folder that plain transformers loads, without teacher and without this package.

All that the export and its model card say was saved beside the weights: cmdp.json, by `cmdp.train`.
"""

import math
import os
import re
import shutil
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from cmdp.models import ModelSpec, load_base
from cmdp.storage import RECORD, named, read, read_record, whole, write_json

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
COPIED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # weights, configurations, tokenizers


def export(run: Path, target: Path, merge: bool = False) -> None:
    """Write the student saved in the folder `run` to the new folder `target`.

    With `merge`, a LoRA adapter is merged into its base model as that was published: unquantised where training held it
    in 4 bits, in float32 where it is a GGUF file. Raises `FileNotFoundError` if `run` has no cmdp.json or no
    safetensors, or the base model is not there; `ValueError` if `target` exists, the adapter does not fit its base, or
    one over a GGUF file is not merged.
    """
    run, target = Path(run), Path(target)
    if target.exists():
        raise ValueError(f"{target} exists already: name a new folder.")
    record, adapter = read_record(run), (run / ADAPTER[0]).is_file()
    if not any(run.glob(ADAPTER[1] if adapter else "model*.safetensors")):
        raise FileNotFoundError(f"There are no weights in safetensors in {run}.")
    base = ModelSpec(record["student"], gguf_file=record.get("gguf_file"), revision=record.get("revision"))
    alone, local = adapter and not merge, Path(base.model).exists()
    if alone and "gguf_file" in base.where():
        raise ValueError("An adapter over a GGUF file cannot be loaded by itself: export it merged (--merge).")
    if alone and not local and not hub_id(base.model) and "/" in base.model:
        raise FileNotFoundError(f"There is no base model at {base.model}: export where the student was trained.")
    model = merged(run, base) if adapter and merge else None
    with whole(target) as folder, named(target):
        for file in (file for pattern in COPIED for file in run.glob(pattern)):
            if file.name != RECORD and (alone or file.name not in ADAPTER):
                shutil.copyfile(file, folder / file.name)
        if alone:  # a local base is found from this working folder, and no path of this machine goes along
            path = os.path.relpath(base.model) if local else base.model
            config = read(run / ADAPTER[0])
            write_json(config | {"base_model_name_or_path": path, "revision": base.revision}, folder / ADAPTER[0])
        elif adapter:
            model.save_pretrained(folder)
        card(target.name, record, base.model, alone, (run / "chat_template.jinja").is_file()).save(folder / "README.md")


def merged(run: Path, base: ModelSpec):
    """The plain transformers model that the adapter in `run` and its base model make."""
    from peft import PeftModel

    dtype = torch.float32 if "gguf_file" in base.where() else "auto"
    try:
        model = PeftModel.from_pretrained(load_base(base, dtype, torch.device("cpu")), run)
    except RuntimeError as error:
        raise ValueError(f"The adapter in {run} was not trained over {base.model}: their shapes differ.") from error
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedding, head = (getattr(layer, "base_layer", layer) for layer in layers)
    if layers != [embedding, head] and head.weight is embedding.weight:  # tied, but each with an adapter of its own
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    return model.merge_and_unload(safe_merge=True)


def hub_id(model: str | None) -> str | None:
    """`model` if it names a model on the Hub and nothing on this machine, else None."""
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model or "") and not model.endswith(".gguf")
    return model if named and not Path(model).exists() else None


def card(name: str, record: dict, base: str | None, adapter: bool, chat: bool = False) -> ModelCard:
    """The model card of a student with the `record` of cmdp.json. `base` is the base model as the user named it, which
    the metadata name if it is a Hub id; `adapter` says whether the weights are an adapter alone, `chat` whether the
    tokenizer has a chat template."""

    def local(path: str) -> str:  # no path of this machine goes along
        return Path(path).name if os.path.isabs(path) else path

    settings, adapters = record["settings"], ("student_adapter", "teacher_adapter")
    roles = {"base": base or "unknown"} | {key: record[key] for key in ("teacher", *adapters) if record.get(key)}
    per = "token" if settings.get("budget_form") == "per_token" else "completion"
    tags = ["distillation", "constrained-mdp", "cmdp", record["method"]]
    library = "peft" if adapter else "transformers"
    metadata = ModelCardData(base_model=hub_id(base), library_name=library, pipeline_tag="text-generation", tags=tags)
    shown = {
        **record | {"name": name, "adapter": adapter, "chat": chat},
        **{key: hub_id(x) or f"{local(x)} (local)" for key, x in roles.items()},
        "task": {key: local(x) for key, x in record["task"].items() if isinstance(x, str)},
        "budget": f"{settings.get('budget', math.inf):g} nats per {per}",
        "enforced": settings.get("reward_form", "lagrangian") != "lagrangian" and not settings.get("step_budget"),
        "settings": yaml.safe_dump(settings, sort_keys=False).strip(),
        "length": settings.get("max_completion_length", 256),
    }
    return ModelCard.from_template(metadata, str(Path(__file__).with_name("model_card.md")), **shown)
