"""A smaller student made of a model's own weights: the model with some of its layers left out."""

from pathlib import Path

import torch
from torch import nn

from cmdp.models import ModelSpec, load_base, load_tokenizer
from cmdp.storage import whole


def prune(source: str, without: list[int], target: Path) -> tuple[int, int]:
    """Write the model `source` less the layers `without` to the new folder `target`, in float32, with its tokenizer.

    Args:
        source: a Hub id, a local folder or a GGUF file.
        without: layers, counted from 0.

    Returns:
        parameters before and after.

    Raises:
        ValueError: `target` exists, or a layer does not.
    """
    if target.exists():
        raise ValueError(f"There is something at {target} already: name a folder that does not exist.")
    spec = ModelSpec(source)
    model = load_base(spec, torch.float32, torch.device("cpu"))
    before, config, layers = model.num_parameters(), model.config.get_text_config(), model.base_model.layers
    kept = [place for place in range(len(layers)) if place not in without]
    if not kept or len(kept) + len(set(without)) != len(layers):
        raise ValueError(f"{source} has layers 0 to {len(layers) - 1}: leave out some of these, and not all.")
    model.base_model.layers = nn.ModuleList(layers[place] for place in kept)
    if getattr(config, "layer_types", None):  # one entry a layer, where kinds of attention take turns
        config.layer_types = [config.layer_types[place] for place in kept]
    config.num_hidden_layers = len(kept)
    with whole(target) as folder:
        model.save_pretrained(folder)
        load_tokenizer(spec).save_pretrained(folder)
    return before, model.num_parameters()
