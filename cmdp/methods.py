"""Every method as a named setting of one trainer (method, section 7), so that they differ in nothing else; and GRPO and
GKD once more as TRL's own trainers."""

from dataclasses import fields
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What each method sets in `CMDPConfig`; what it leaves open (lam, penalty, learning_rate, ...) is tuned. Where
# long_term is off, the divergence is charged by its own gradient alone, not through the sampling of what follows: so do
# GKD (arXiv 2306.13649, section 3), with or without a reward, and KDRL (2506.02208).
METHODS = {
    "grpo": {"reward_form": "lagrangian", "lam": 0.0},
    "gkd": {"reward_form": "lagrangian", "lam": 1.0, "task_weight": 0.0, "long_term": False},
    "gkd-grpo": {"reward_form": "lagrangian", "long_term": False},
    "dual": {"reward_form": "lagrangian", "long_term": False},
    "minillm": {"reward_form": "lagrangian", "lam": 1.0, "task_weight": 0.0, "credit": "length_normalised"},
    "kdrl": {"reward_form": "lagrangian", "divergence": "k2", "long_term": False},
    "saute-constant": {"reward_form": "exhausted", "lam": 0.0},
    "cmdp": {"reward_form": "exhausted"},
    "cmdp-overshoot": {"reward_form": "overshoot"},
    "cmdp-hinge": {"reward_form": "hinge", "long_term": False},
    "cmdp-adaptive": {"reward_form": "hinge", "long_term": False, "csr_target": 0.98, "lam": 1.0},
    "worst-case": {"reward_form": "overshoot"},
}
TRL = ("trl-grpo", "trl-gkd")  # the library's own trainers, as they are


def method_of(run: str) -> str:
    """The method of a run, which may name a variant of it: "gkd-grpo-weak" is "gkd-grpo".

    Raises:
        ValueError: the run is not "sft" and names no method.
    """
    names = ("sft", *METHODS, *TRL)
    known = [name for name in names if run == name or run.startswith(f"{name}-")]
    if not known:
        raise ValueError(f"A run is named for one of {names}, not {run!r}.")
    return max(known, key=len)


def train(
    method: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[dict[str, str]],
    is_correct,
    checkpoints: Path,
    resume: bool,
    settings: dict,
) -> list[dict]:
    """Distil `teacher` into `student`, in place, by `method`.

    Args:
        method: a key of `METHODS`, or one of `TRL`.
        problems: the training prompts, with their answers.
        is_correct: the task reward, `(completion, answer) -> bool`.
        checkpoints: where the trainer keeps its checkpoints.
        resume: go on from the last of them.
        settings: fields of `CMDPConfig`; they take precedence over the method's own.

    Returns:
        The log: a dict a step.
    """
    if method not in (*METHODS, *TRL):
        raise ValueError(f"The method is one of {(*METHODS, *TRL)}, not {method!r}.")

    def task_reward(completions: list[str], answer: list[str], **_) -> list[float]:
        return [float(is_correct(completion, right)) for completion, right in zip(completions, answer, strict=True)]

    defaults = {"gradient_checkpointing": False, "bf16": False, "report_to": [], "disable_tqdm": True}
    settings = {"output_dir": str(checkpoints), **defaults, **METHODS.get(method, {}), **settings}
    data = {"train_dataset": Dataset.from_list(problems), "processing_class": tokenizer}
    if method in TRL:
        trainer = _of_trl(method, student, teacher, task_reward, settings, data)
    else:
        from cmdp.trainer import CMDPConfig, CMDPTrainer

        trainer = CMDPTrainer(student, teacher, task_reward, CMDPConfig(**settings), **data)
    if trainer.args.fp16:  # its gradient scaler takes no bfloat16, in which TRL holds the adapter of a 4-bit student
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.log_history


def _of_trl(method: str, student, teacher, task_reward, settings: dict, data: dict):
    """TRL's GRPOTrainer or DistillationTrainer, given what of `settings` it knows."""
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    config = GRPOConfig if method == "trl-grpo" else DistillationConfig
    known = {field.name for field in fields(config)} - {"beta"}  # reverse KL; no KL to a reference
    args = config(**{name: value for name, value in settings.items() if name in known})
    if method == "trl-grpo":
        return GRPOTrainer(student, task_reward, args, **data)
    return DistillationTrainer(student, teacher, args=args, **data)
