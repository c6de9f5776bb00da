"""Students, teachers and their tokenizer: made small for the default experiment, or loaded from a local directory.

Weights are read and written as safetensors only, and no code that a model brings along is ever run.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are `words`, split at white space, after <pad>, <eos> and <unk>."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def build_model(tokenizer: PreTrainedTokenizerBase, layers: int, hidden: int, heads: int, seed: int) -> PreTrainedModel:
    """A Llama of random weights over the tokenizer's ids: `layers` blocks of width `hidden`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def load_model(path: str | Path) -> PreTrainedModel:
    """The causal language model saved at `path`. Raises `FileNotFoundError` where there is none."""
    _check(path)
    return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, local_files_only=True)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved at `path`, padding on the left as generation needs."""
    _check(path)
    return AutoTokenizer.from_pretrained(path, padding_side="left", local_files_only=True)


def load_pair(student: str | Path, teacher: str | Path) -> tuple:
    """(student, teacher, tokenizer). Raises `ValueError` unless both have the same tokenizer."""
    tokenizer, other = load_tokenizer(student), load_tokenizer(teacher)
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            f"The student at {student} and the teacher at {teacher} have different vocabularies, so no divergence "
            "between them is defined: choose a teacher from the student's family."
        )
    return load_model(student), load_model(teacher), tokenizer


def _check(path: str | Path) -> None:
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"There is no model at {path}: run the pipeline up to it (`dvc repro`), or correct it.")
