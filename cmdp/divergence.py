"""Divergence of the student from the teacher at each token, in nats (method, section 1).

Three ways to the same quantity: from logits (small vocabularies, theory, tests); from hidden states and LM heads, in
tiles over tokens and vocabulary, so that neither model's (tokens x vocabulary) logits ever exist; and estimated from
the log-probabilities of the sampled tokens, for a teacher that scores nothing else.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

EXACT = ("reverse_kl", "forward_kl", "jsd")
SAMPLED = ("k1", "k2", "k3")

# On a CPU, where all of a model's logits are fewer than this, they are one small tile and are computed as such: a tenth
# of the time of the kernel, whose tiles are laid out for vocabularies of 32,768 columns.
ONE_TILE = 2**22


class Head(NamedTuple):
    """How a model turns hidden states into logits: softcap(scale * (h W^T + b))."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        logits = self.scale * nn.functional.linear(hidden, self.weight, self.bias).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def lm_head(model: nn.Module, vocab_size: int | None = None) -> Head:
    """The LM head of a transformers causal language model.

    Args:
        model: the unwrapped model (not DDP's or FSDP's wrapper).
        vocab_size: keep the first so many rows. Heads are often padded past the tokenizer's ids, and differently in
            student and teacher; a softmax over the kept rows is the distribution renormalised to them.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if hasattr(weight, "full_tensor"):  # FSDP2 shards the head; one gather, differentiable, serves all tiles
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    config = model.config.get_text_config()
    # the names under which model families scale their logits; absent or None means unscaled
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((value for name in names if (value := getattr(config, name, None)) is not None), 1.0)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight[:vocab_size], None if bias is None else bias[:vocab_size], scale, softcap)


def divergence_from_logits(
    student_logits: Tensor, teacher_logits: Tensor, kind: str = "reverse_kl", jsd_beta: float = 0.5
) -> Tensor:
    """D(student || teacher) over the last dimension: (..., V), (..., V) -> (...).

    Args:
        kind: `reverse_kl` is KL(student || teacher), `forward_kl` is KL(teacher || student), `jsd` the generalised
            Jensen-Shannon divergence beta KL(teacher || m) + (1 - beta) KL(student || m) with
            m = (1 - beta) student + beta teacher (GKD, arXiv 2306.13649).
        jsd_beta: beta, strictly between 0 and 1.
    """
    _check_exact(kind, jsd_beta)
    p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if kind == "reverse_kl":
        return _kl(p, q)
    if kind == "forward_kl":
        return _kl(q, p)
    floor = torch.finfo(p.dtype).min  # where both are -inf, the gradient of logaddexp is NaN
    m = torch.logaddexp(p.clamp(min=floor) + math.log(1 - jsd_beta), q.clamp(min=floor) + math.log(jsd_beta))
    return jsd_beta * _kl(q, m) + (1 - jsd_beta) * _kl(p, m)


def divergence_from_hidden(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    mask: Tensor,
    kind: str = "reverse_kl",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """D(student || teacher) at each token where `mask` is 1, and 0 elsewhere; differentiable in the student alone.

    The tiles and their gradient are TRL's `ChunkedDivergenceFunction`, except where one small tile holds everything.

    Args:
        student_hidden: (B, T, H_s), the last hidden states that predict each token.
        teacher_hidden: (B, T, H_t).
        mask: (B, T).
        temperature: divides both models' logits.

    Returns:
        (B, T) in float32.

    Raises:
        ValueError: the heads have different numbers of rows.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    _check_exact(kind, jsd_beta)
    if student_head.weight.shape[0] != teacher_head.weight.shape[0]:
        raise ValueError(
            f"The student's head has {student_head.weight.shape[0]} rows and the teacher's "
            f"{teacher_head.weight.shape[0]}: pass the tokenizer's size to `lm_head` for both."
        )
    on = mask != 0
    student_hidden, teacher_hidden = student_hidden[on], teacher_hidden[on]  # (N, H_s), (N, H_t)
    if student_hidden.device.type == "cpu" and len(student_hidden) * len(student_head.weight) <= ONE_TILE:
        with torch.no_grad():
            teacher_logits = teacher_head.logits(teacher_hidden) / temperature
        student_logits = student_head.logits(student_hidden) / temperature
        values = divergence_from_logits(student_logits, teacher_logits, kind, jsd_beta)
    else:
        values, _ = ChunkedDivergenceFunction.apply(
            student_hidden,
            student_head.weight,
            student_head.bias,
            teacher_hidden,
            teacher_head.weight,
            teacher_head.bias,
            {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": jsd_beta}[kind],
            temperature,
            student_head.scale,
            student_head.softcap,
            teacher_head.scale,
            teacher_head.softcap,
        )
    # masked_scatter keeps an all-masked batch connected to the student, with gradient zero
    return values.new_zeros(on.shape).masked_scatter(on, values)


def sampled_divergence(student_logps: Tensor, teacher_logps: Tensor, kind: str = "k3") -> Tensor:
    """Estimate of KL(student || teacher) from the sampled tokens' log-probabilities, elementwise.

    With u = pi_T / pi_theta at the sampled token: k1 = -log u (unbiased, may be negative), k2 = (log u)^2 / 2,
    k3 = (u - 1) - log u (unbiased and >= 0). See J. Schulman, "Approximating KL divergence" (2020).
    """
    if kind not in SAMPLED:
        raise ValueError(f"A sampled estimator is one of {SAMPLED}, not {kind!r}.")
    log_u = teacher_logps - student_logps
    if kind == "k1":
        return -log_u
    if kind == "k2":
        return log_u.square() / 2
    return log_u.expm1() - log_u


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, with 0 log 0 = 0: (..., V) -> (...)."""
    return (p.exp() * torch.where(p == -torch.inf, 0.0, p - q)).sum(-1)


def _check_exact(kind: str, jsd_beta: float) -> None:
    if kind not in EXACT:
        raise ValueError(f"An exact divergence is one of {EXACT}, not {kind!r}.")
    if kind == "jsd" and not 0 < jsd_beta < 1:
        raise ValueError(f"jsd needs 0 < jsd_beta < 1, not {jsd_beta}; its ends are forward_kl and reverse_kl.")
