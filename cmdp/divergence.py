"""Divergence of the student from the teacher at each token, in nats (method, section 1).

Three ways to one quantity: from logits (theory, tests); from hidden states and LM heads, in tiles, so that no model's
(tokens x vocabulary) logits exist at once; and estimated from the log-probabilities of the sampled tokens. On an
accelerator the tiles are TRL's kernels; on a CPU they are our own, which fit the cache.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EXACT = ("reverse_kl", "forward_kl", "jsd")
SAMPLED = ("k1", "k2", "k3")

TILE = 2**21  # logits per tile on a CPU: 8 MiB of float32


class Head(NamedTuple):
    """How a model turns hidden states into logits: softcap(scale * (h W^T + b))."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V), in float32."""
        logits = self.scale * nn.functional.linear(hidden, self.weight, self.bias).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def lm_head(model: nn.Module, vocab_size: int | None = None) -> Head:
    """The LM head of a transformers causal language model (not DDP's or FSDP's wrapper), plain LoRA on it included.

    `vocab_size` keeps the first so many rows: heads are often padded past the tokenizer's ids, and differently in
    student and teacher. Raises `ValueError` if the head has another kind of adapter.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias  # PEFT gives a layer with an adapter the weight of its base
    if hasattr(head, "base_layer") and not (head.disable_adapters or head.merged):
        adapters = [name for name in head.active_adapters if name in getattr(head, "lora_A", {})]
        if not hasattr(head, "lora_A") or any(a in head.lora_variant or head.lora_bias[a] for a in adapters):
            name = next(name for name, module in model.named_modules() if module is head)
            raise ValueError(f"The adapter on {name} is not plain LoRA: merge it into the model (`merge_and_unload`).")
        weight = sum((head.get_delta_weight(name) for name in adapters), start=weight).to(weight.dtype)
    if hasattr(weight, "full_tensor"):  # FSDP2 shards the head; one gather, differentiable, serves all tiles
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    config = model.config.get_text_config()
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # of different model families
    scale = next((value for name in names if (value := getattr(config, name, None)) is not None), 1.0)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    bias = None if bias is None else bias[:vocab_size]
    return Head(weight[:vocab_size], bias, scale, getattr(config, "final_logit_softcapping", None))


def divergence_from_logits(student_logits, teacher_logits, kind="reverse_kl", jsd_beta=0.5) -> Tensor:
    """D(student || teacher) over the last dimension: (..., V), (..., V) -> (...).

    `reverse_kl` is KL(student || teacher), `forward_kl` is KL(teacher || student), and `jsd` is, with 0 < beta < 1 and
    m = (1 - beta) student + beta teacher, beta KL(teacher || m) + (1 - beta) KL(student || m) (GKD, arXiv 2306.13649).
    """
    _check_exact(kind, jsd_beta)
    return _divergence(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), kind, jsd_beta)


def divergence_from_hidden(
    student_hidden, student_head, teacher_hidden, teacher_head, mask, kind="reverse_kl", jsd_beta=0.5, temperature=1.0
) -> Tensor:
    """D(student || teacher) at each token where `mask` (B, T) is 1, and 0 elsewhere: (B, T) in float32, differentiable
    in the student alone.

    The last hidden states that predict each token are (B, T, H), each model with its own H and `Head`; `temperature`
    divides both models' logits. Raises `ValueError` if the heads have different numbers of rows.
    """
    _check_exact(kind, jsd_beta)
    if (rows := len(student_head.weight)) != (others := len(teacher_head.weight)):
        message = f"The student's head has {rows} rows and the teacher's {others}"
        raise ValueError(f"{message}: pass the tokenizer's size to `lm_head` for both.")
    if own_tiles(student_hidden):
        tokens = torch.zeros_like(mask, dtype=torch.long)  # of which no log-probability is asked for
        inputs = student_hidden, student_head, tokens, mask, teacher_hidden, teacher_head, mask
        return score_in_tiles(*inputs, kind, jsd_beta, temperature)[0]
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    on, heads = mask != 0, (student_head, teacher_head)
    if all(head.bias is not None for head in heads):  # the kernel has no number for 0 log 0
        banned = (student_head.bias == -torch.inf) & (teacher_head.bias == -torch.inf)
        student_head, teacher_head = (head._replace(bias=head.bias.masked_fill(banned, -1e4)) for head in heads)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": jsd_beta}[kind]
    inputs = student_hidden[on], *student_head[:2], teacher_hidden[on], *teacher_head[:2]
    values, _ = ChunkedDivergenceFunction.apply(*inputs, beta, temperature, *student_head[2:], *teacher_head[2:])
    return values.new_zeros(on.shape).masked_scatter(on, values)


def own_tiles(hidden: Tensor) -> bool:
    """Whether the tiles are ours, and `score_in_tiles` serves: on a CPU."""
    return hidden.device.type == "cpu"


def score_in_tiles(
    student_hidden, student_head, tokens, mask, teacher_hidden, teacher_head, where, kind, jsd_beta, temperature
) -> list[Tensor]:
    """The divergence at each token where `where` is 1, and the student's log-probability of the token and its entropy
    where `mask` is: (B, T) each in float32; 0 elsewhere. One projection through the student's head serves all three.

    As `divergence_from_hidden`, with the ids of the tokens (B, T), and `where` (B, T) a subset of `mask`. The student's
    head has all of its rows; the divergence runs over its first so many as the teacher's has.
    """
    _check_exact(kind, jsd_beta)

    def tile(hidden, tokens, teacher_hidden=None):
        teacher_logits = None if teacher_hidden is None else teacher_head.logits(teacher_hidden) / temperature
        return _LogitScores.apply(student_head.logits(hidden) / temperature, teacher_logits, tokens, kind, jsd_beta)

    again = functools.partial(checkpoint, tile, use_reentrant=False, preserve_rng_state=False)
    rows, inputs, parts = max(1, TILE // len(student_head.weight)), (student_hidden, tokens, teacher_hidden), []
    for on, used in ((where != 0, inputs), ((mask != 0) & (where == 0), inputs[:2])):
        if parts and not on.any():
            break
        tiles = [x[on].split(rows) for x in used]
        # many tiles are computed again in the backward
        scores = map(again if len(tiles[0]) > 1 and torch.is_grad_enabled() else tile, *tiles)
        values = map(torch.cat, zip(*scores, strict=True))
        # masked_scatter keeps an all-masked batch connected to the student, with gradient zero
        parts.append([value.new_zeros(on.shape).masked_scatter(on, value) for value in values])
    return [sum(columns) for columns in zip(*parts, strict=True)]


class _LogitScores(torch.autograd.Function):
    """Divergence, log-probabilities and entropy from logits: (N, V), (N, K <= V) -> three of (N,). The gradient in the
    student's is written out, in half the time of autograd's."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, tokens, kind, jsd_beta):
        policy = student_logits.log_softmax(-1)
        entropy = -(policy.exp() * _finite(policy)).sum(-1)
        log_probs = policy.gather(-1, tokens[:, None])[:, 0]
        divergence, p, q = torch.zeros_like(entropy), policy, None
        if teacher_logits is not None:
            q = teacher_logits.log_softmax(-1)
            if q.shape != p.shape:
                p = student_logits[:, : q.shape[-1]].log_softmax(-1)
            divergence = _divergence(p, q, kind, jsd_beta)
        ctx.save_for_backward(policy, entropy, tokens, p, q)
        ctx.kind, ctx.jsd_beta = kind, jsd_beta
        ctx.set_materialize_grads(False)
        return divergence, log_probs, entropy

    @staticmethod
    def backward(ctx, by_divergence, by_log_prob, by_entropy):
        policy, entropy, tokens, p, q = ctx.saved_tensors
        gradient = torch.zeros_like(policy)
        if by_log_prob is not None:
            gradient -= policy.exp() * by_log_prob[:, None]
            gradient.scatter_add_(-1, tokens[:, None], by_log_prob[:, None])
        if by_entropy is not None:
            gradient -= policy.exp() * (_finite(policy) + entropy[:, None]) * by_entropy[:, None]
        if by_divergence is not None and q is not None:
            if ctx.kind == "forward_kl":
                of_divergence = p.exp() - q.exp()
            else:  # that of KL(p || q), or of (1 - beta) KL(p || m)
                reverse = ctx.kind == "reverse_kl"
                gap = _log_ratio(p, q if reverse else _mixture(p, q, ctx.jsd_beta))
                of_divergence = p.exp() * (gap - (p.exp() * gap).sum(-1, keepdim=True))
                of_divergence *= 1.0 if reverse else 1 - ctx.jsd_beta
            gradient[:, : q.shape[-1]] += of_divergence * by_divergence[:, None]
        return gradient, None, None, None, None


def sampled_divergence(student_logps: Tensor, teacher_logps: Tensor, kind: str = "k3") -> Tensor:
    """Estimate of KL(student || teacher) from the sampled tokens' log-probabilities, elementwise.

    With u = pi_T / pi_theta: k1 = -log u (unbiased, may be negative), k2 = (log u)^2 / 2, k3 = (u - 1) - log u
    (unbiased, >= 0); J. Schulman, "Approximating KL divergence" (2020). The expected gradient is 0 for k1, that of the
    reverse KL for k2 and of the forward KL for k3: charge k2 by its own gradient (`long_term` off).
    """
    if kind not in SAMPLED:
        raise ValueError(f"A sampled estimator is one of {SAMPLED}, not {kind!r}.")
    log_u = teacher_logps - student_logps
    return {"k1": -log_u, "k2": log_u.square() / 2, "k3": log_u.expm1() - log_u}[kind]


def _divergence(p: Tensor, q: Tensor, kind: str, jsd_beta: float) -> Tensor:
    """D of log-probabilities of student and teacher: (..., V), (..., V) -> (...)."""
    if kind != "jsd":
        return _kl(p, q) if kind == "reverse_kl" else _kl(q, p)
    m = _mixture(p, q, jsd_beta)
    return jsd_beta * _kl(q, m) + (1 - jsd_beta) * _kl(p, m)


def _mixture(p: Tensor, q: Tensor, jsd_beta: float) -> Tensor:
    """log((1 - beta) student + beta teacher) of log-probabilities, (..., V)."""
    return torch.logaddexp(_finite(p) + math.log(1 - jsd_beta), _finite(q) + math.log(jsd_beta))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, with 0 log 0 = 0: (..., V) -> (...)."""
    return (p.exp() * _log_ratio(p, q)).sum(-1)


def _log_ratio(p: Tensor, q: Tensor) -> Tensor:
    """p - q of log-probabilities, 0 where p is impossible: (..., V)."""
    return torch.where(p == -torch.inf, 0.0, p - q)


def _finite(log_probs: Tensor) -> Tensor:
    """The lowest number in place of -inf, so that its product with probability 0 is 0, not NaN."""
    return log_probs.clamp(min=torch.finfo(log_probs.dtype).min)


def _check_exact(kind: str, jsd_beta: float) -> None:
    if kind not in EXACT:
        raise ValueError(f"An exact divergence is one of {EXACT}, not {kind!r}.")
    if kind == "jsd" and not 0 < jsd_beta < 1:
        raise ValueError(f"jsd needs 0 < jsd_beta < 1, not {jsd_beta}; its ends are forward_kl and reverse_kl.")
