"""Measure a student on held-out prompts: one tidy table a run (method, section 8).

Each row is one completion: is its answer right, is its derivation, what did it cost under the teacher. What depends on
a budget is left to whoever reads the table, so that one evaluation serves the whole frontier.
"""

from types import ModuleType

import pandas as pd
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cmdp.divergence import divergence_from_hidden, lm_head
from cmdp.reward import cumulative_cost, modified_reward, trajectory_budget

# Quantiles over trajectories that the table of cumulative costs keeps at each position
QUANTILES = (0.1, 0.5, 0.9)


@torch.no_grad()
def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ModuleType,
    problems: list[dict[str, str]],
    samples: int,
    max_completion_length: int,
    batch_size: int,
    seed: int,
    greedy: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sample `samples` completions a problem at temperature 1, and with `greedy` one more greedily.

    Returns:
        completions: a row a completion, with `prompt` (its index), `decoding`, `correct`, `valid` (every step right),
            `tokens`, `truncated`, `entropy` (mean, nats a token), `cost` (C, nats), `peak` (the costliest token's),
            `confidence` (the student's probability of the last token before the end, the answer's) and, where the task
            tells styles apart, `style`; and `completion`, the text.
        positions: for sampled completions and each position, how many reach it (`count`) and, over all, mean and
            quantiles of the cumulative cost C_t in nats, constant after a completion's end.
    """
    student.eval(), teacher.eval()
    torch.manual_seed(seed)
    rows, curves = [], []
    for decoding, repeats in (("sampled", samples), ("greedy", int(greedy))):
        order = [index for index in range(len(problems)) for _ in range(repeats)]
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = [problems[index] for index in indices]
            ids, attention, completion_ids, mask = generate(
                student, tokenizer, [row["prompt"] for row in batch], decoding == "sampled", max_completion_length
            )
            cost, entropy, log_probs = score(student, teacher, len(tokenizer), ids, attention, mask)
            answer = (mask.sum(dim=1) - 2).clamp(min=0)
            confidence = log_probs.gather(1, answer[:, None])[:, 0].exp()
            texts = tokenizer.batch_decode(completion_ids.masked_fill(mask == 0, tokenizer.pad_token_id), True)
            ended = (completion_ids * mask == tokenizer.eos_token_id).any(dim=1)
            length = mask.sum(dim=1)
            for i, (index, problem, text) in enumerate(zip(indices, batch, texts, strict=True)):
                rows.append(
                    {
                        "prompt": index,
                        "decoding": decoding,
                        "correct": int(task.is_correct(text, problem["answer"])),
                        "valid": int(task.steps_are_valid(text, problem["prompt"])),
                        "tokens": length[i].item(),
                        "truncated": int(not ended[i].item()),
                        "entropy": (entropy[i].sum() / length[i].clamp(min=1)).item(),
                        "cost": cost[i].sum().item(),
                        "peak": cost[i].max().item(),
                        "confidence": confidence[i].item(),
                        "completion": text,
                        **({"style": task.style(text)} if hasattr(task, "style") else {}),
                    }
                )
            if decoding == "sampled":
                padding = max_completion_length - mask.shape[1]
                total = cumulative_cost(cost, mask)
                total = torch.cat([total, total[:, -1:].expand(-1, padding)], dim=1)
                curves.append((total.cpu(), length.cpu()))
    return pd.DataFrame(rows), _positions(curves)


def generate(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    sample: bool,
    max_completion_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Complete `prompts`, at temperature 1 or greedily.

    Returns:
        ids (B, P + T), attention over them, the completion's ids (B, T) and its mask, which ends with the end token.
    """
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(student.device)
    config = GenerationConfig(
        max_new_tokens=max_completion_length,
        do_sample=sample,
        temperature=1.0 if sample else None,
        top_k=0 if sample else None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    ids = student.generate(encoded.input_ids, attention_mask=encoded.attention_mask, generation_config=config)
    completion_ids = ids[:, encoded.input_ids.shape[1] :]
    is_end = completion_ids == tokenizer.eos_token_id
    mask = (is_end.cumsum(dim=1) - is_end.long() == 0).long()
    return ids, torch.cat([encoded.attention_mask, mask], dim=1), completion_ids, mask


def score(
    student: PreTrainedModel, teacher: PreTrainedModel, vocab_size: int, ids: Tensor, attention: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """At each completion token the reverse KL to the teacher, the student's entropy and its log-probability of the
    token, in nats: (B, T) each."""
    keep = mask.shape[1]
    hidden = [
        model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state[:, -keep - 1 : -1]
        for model in (student, teacher)
    ]
    heads = [lm_head(model, vocab_size) for model in (student, teacher)]
    cost = divergence_from_hidden(hidden[0], heads[0], hidden[1], heads[1], mask).clamp(min=0.0)
    entropy, log_probs = torch.zeros_like(cost), torch.zeros_like(cost)
    for row in range(len(ids)):  # a completion at a time: (T, V) logits of one model
        logps = heads[0].logits(hidden[0][row]).log_softmax(-1)
        entropy[row] = -(logps.exp() * logps).sum(-1) * mask[row]
        log_probs[row] = logps.gather(-1, ids[row, -keep:, None])[:, 0] * mask[row]
    return cost, entropy, log_probs


def ledger(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: dict[str, str],
    task: ModuleType,
    settings: dict,
    max_completion_length: int,
    seed: int,
) -> pd.DataFrame:
    """Sample one completion and account for it token by token.

    Args:
        settings: `budget`, `budget_form`, `lam` and, optionally, `penalty`.

    Returns:
        A row a token: `token`, its `cost`, `cumulative` cost C_t and `remaining` budget z_t in nats, and what the two
        forms of the modified reward pay for it, `exhausted` and `overshoot`.
    """
    torch.manual_seed(seed)
    ids, attention, completion_ids, mask = generate(
        student, tokenizer, [problem["prompt"]], True, max_completion_length
    )
    with torch.no_grad():
        cost, _, _ = score(student, teacher, len(tokenizer), ids, attention, mask)
    text = tokenizer.decode(completion_ids[0], skip_special_tokens=True)
    right = torch.tensor([float(task.is_correct(text, problem["answer"]))])
    budget = trajectory_budget(settings["budget"], mask, settings["budget_form"])
    length = int(mask.sum())
    rewards = {
        form: modified_reward(
            right, cost, mask, budget, lam=settings["lam"], penalty=settings.get("penalty", 0.0), form=form
        ).reward[0, :length]
        for form in ("exhausted", "overshoot")
    }
    total = cumulative_cost(cost, mask)[0, :length]
    return pd.DataFrame(
        {
            "token": tokenizer.convert_ids_to_tokens(completion_ids[0, :length]),
            "cost": cost[0, :length],
            "cumulative": total,
            "remaining": budget[0] - total,
            **rewards,
        }
    )


def _positions(curves: list[tuple[Tensor, Tensor]]) -> pd.DataFrame:
    total, length = (torch.cat(column) for column in zip(*curves, strict=True))
    quantiles = total.quantile(torch.tensor(QUANTILES), dim=0)
    table = {
        "position": range(1, total.shape[1] + 1),
        "count": [(length > t).sum().item() for t in range(total.shape[1])],
        "mean": total.mean(dim=0).tolist(),
    }
    return pd.DataFrame(table | {f"q{int(100 * q)}": row.tolist() for q, row in zip(QUANTILES, quantiles, strict=True)})
