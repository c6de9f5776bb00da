"""A tiny student, teacher and tokenizer, and fixed completions, for every test that trains a language model."""

import copy
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads only wait for each other

import pytest
import torch

WORDS = [*"abcdefghijklmnopqrstuvwx"]
PROMPTS = ["a b c", "d e f g h"]
EOS = 1
# Two groups of four: of many lengths, one of them EOS alone, two cut at the limit.
COMPLETIONS = [
    [5, 9, 14, EOS],
    [EOS],
    [7, 7, 21, 3, 18, 6, 11, 25],
    [24, 16, EOS],
    [13, 4, 8, 20, 22, EOS],
    [10, 19, EOS],
    [12, 17, 5, 5, 9, 23, 15, 8],
    [6, 22, 11, 4, EOS],
]
MAX_LENGTH = 8


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than 15 seconds")


def make_tokenizer():
    from cmdp.models import build_tokenizer

    return build_tokenizer(WORDS)


def make_model(tokenizer, seed: int, hidden: int = 16, spread: float = 10.0, layers: int = 2):
    """A Llama. `spread` scales its initial weights: the distributions are then far from uniform."""
    from cmdp.models import build_model

    model = build_model(tokenizer, layers=layers, hidden=hidden, heads=2, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 0.2 * spread  # of 0.02, not of build_model's 0.1
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    return model


def make_gpt2(tokenizer, seed: int, hidden: int = 16):
    """A GPT-2, whose learned absolute positions matter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    ids = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": tokenizer.pad_token_id}
    shape = {"n_positions": 32, "n_embd": hidden, "n_layer": 1, "n_head": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=len(tokenizer), **shape, **dropout, **ids)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wpe.weight *= 100
        model.transformer.wte.weight *= 20
    return model


def score(completion_ids: list[list[int]], **_) -> list[float]:
    """A task reward in [0, 1] that is a function of the tokens alone."""
    return [sum(ids) % 7 / 6 for ids in completion_ids]


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def original_pair(tokenizer):
    return make_model(tokenizer, seed=0), make_model(tokenizer, seed=1, hidden=24)


@pytest.fixture
def student(original_pair):
    return copy.deepcopy(original_pair[0])


@pytest.fixture
def teacher(original_pair):
    return copy.deepcopy(original_pair[1])
