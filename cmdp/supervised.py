"""Supervised learning of teacher and student on the task's solutions, by TRL's SFTTrainer."""

from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer


def train_supervised(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[dict[str, str]],
    checkpoints: Path,
    resume: bool,
    settings: dict,
) -> list[dict]:
    """Train `model` in place on the solutions of `problems`; the prompt carries no loss.

    Args:
        checkpoints: where the trainer keeps its checkpoints.
        resume: go on from the last of them.
        settings: fields of `SFTConfig` (steps, batch, learning rate, seed).

    Returns:
        The log: a dict a logged step, with the loss in nats a token.
    """
    encoded = [_encode(tokenizer, row) for row in problems]
    args = SFTConfig(
        output_dir=str(checkpoints),
        packing=False,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_only_model=False,
        **settings,
    )
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(encoded), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.log_history


def _encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> dict[str, list[int]]:
    """Token ids of prompt, solution and end, and a mask that is 1 on the latter two."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
    solution = [*tokenizer(row["solution"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt + solution, "completion_mask": [0] * len(prompt) + [1] * len(solution)}
