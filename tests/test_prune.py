"""A student made by leaving out layers computes what the model without them does."""

import sys
from pathlib import Path

import pytest
import torch
from test_models import write_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmdp import cli
from cmdp.prune import prune


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_what_is_written_is_the_model_without_the_layers(tmp_path, family):
    folder = write_model(tmp_path / "whole", family, seed=0, num_hidden_layers=4)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    before, after = prune(str(folder), [1], tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert (before, after) == (whole.num_parameters(), pruned.num_parameters())
    assert after < before
    ids = torch.tensor([[3, 4, 5, 6]])
    layers = whole.base_model.layers
    whole.base_model.layers = nn.ModuleList(layers[place] for place in (0, 2, 3))
    whole.config.num_hidden_layers = 3
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = [whole.config.layer_types[place] for place in (0, 2, 3)]
    torch.testing.assert_close(pruned(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
    continued = pruned.generate(ids, max_new_tokens=4, do_sample=False)  # with its cache
    torch.testing.assert_close(pruned(continued).logits[0, 3:-1].argmax(-1), continued[0, 4:])
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned")("a b").input_ids == [3, 4]
    assert not list((tmp_path / "pruned").glob("*.bin"))


@pytest.mark.parametrize("without", [["2"], ["0", "1"], ["-1"]])
def test_layers_that_there_are_not_or_all_of_them_are_refused(tmp_path, monkeypatch, without):
    write_model(tmp_path / "whole", "llama", seed=0)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("threads: 1")
    monkeypatch.setattr(cli, "set_up", lambda params, offline: None)
    monkeypatch.setattr(sys, "argv", ["cmdp", "prune", "whole", "pruned", "--without", *without])
    with pytest.raises(SystemExit, match="whole has layers 0 to 1: leave out some of these, and not all"):
        cli.main()
    assert not Path("pruned").exists()


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(ValueError, match=r"There is something at .* already"):
        prune("whole", [0], tmp_path)
