"""Every method as a named setting of one trainer (method, section 7), so that they differ in nothing else."""

from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What each method sets in `CMDPConfig`; what it leaves open (lam, penalty, learning_rate) is tuned.
METHODS = {
    "grpo": {"reward_form": "lagrangian", "lam": 0.0},
    "gkd": {"reward_form": "lagrangian", "lam": 1.0, "task_weight": 0.0, "long_term": False},
    "gkd-grpo": {"reward_form": "lagrangian"},
    "cmdp": {"reward_form": "exhausted"},
    "cmdp-overshoot": {"reward_form": "overshoot"},
    "cmdp-hinge": {"reward_form": "hinge"},
}


def method_of(run: str) -> str:
    """The method of a run, which may name a variant of it: "gkd-grpo-weak" is "gkd-grpo".

    Raises:
        ValueError: the run is not "sft" and names no method.
    """
    known = [name for name in ("sft", *METHODS) if run == name or run.startswith(f"{name}-")]
    if not known:
        raise ValueError(f"A run is named for one of {('sft', *METHODS)}, not {run!r}.")
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
        method: a key of `METHODS`.
        problems: the training prompts, with their answers.
        is_correct: the task reward, `(completion, answer) -> bool`.
        checkpoints: where the trainer keeps its checkpoints.
        resume: go on from the last of them.
        settings: fields of `CMDPConfig`, over the defaults below; the method's own take precedence.

    Returns:
        The log: a dict a step.
    """
    from cmdp.trainer import CMDPConfig, CMDPTrainer

    if method not in METHODS:
        raise ValueError(f"The method is one of {tuple(METHODS)}, not {method!r}.")

    def task_reward(completions: list[str], answer: list[str], **_) -> list[float]:
        return [float(is_correct(completion, right)) for completion, right in zip(completions, answer, strict=True)]

    defaults = {"gradient_checkpointing": False, "bf16": False, "report_to": [], "disable_tqdm": True}
    args = CMDPConfig(output_dir=str(checkpoints), **{**defaults, **settings, **METHODS[method]})
    trainer = CMDPTrainer(
        student, teacher, task_reward, args, train_dataset=Dataset.from_list(problems), processing_class=tokenizer
    )
    if args.fp16:  # its gradient scaler takes no bfloat16, in which TRL holds the adapter of a 4-bit student
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.log_history
