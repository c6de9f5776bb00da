"""Evaluation: sample from a student, and record what each completion earns and costs (method, section 8).

The result is a table with one row per completion. Budget-dependent metrics are computed downstream (`statistics`), so
one evaluation serves the whole frontier.
"""

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from cmdp.divergence import divergence_from_hidden, lm_head, score_in_tiles
from cmdp.models import positions, tokenise, whole_states, without_peft
from cmdp.reward import cumulative_cost
from cmdp.tasks import reward

WIDEST = 2**28  # bytes of a layer's output while completions are scored: more are scored in parts
QUANTILES = (0.1, 0.5, 0.9)  # of the cumulative cost at each position


@torch.no_grad()
def evaluate(
    student, teacher, tokenizer, task, problems, samples, max_completion_length, batch_size, seed, greedy=True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sample `samples` completions per problem at temperature 1, and with `greedy` one more greedily.

    Args:
        task: a module of `cmdp.tasks`, or anything with its `is_correct` or `reward`, and `steps_are_valid`.
        problems: rows with `prompt` and the columns that the reward takes.

    Returns:
        completions: one row per completion: `prompt` (index), `decoding`, `correct` (the task reward), `valid` (all
            steps right), `tokens`, `truncated`, `entropy` (mean, nats per token), `cost` (C, nats), `peak` (of a token)
            and the text as `completion`.
        positions: over sampled completions, at each position: `count` (completions that reach it), mean and quantiles
            of the cumulative cost C_t in nats, constant after a completion's end.
    """
    student, teacher = without_peft(student).eval(), teacher.eval()
    torch.manual_seed(seed)
    tables, curves = [], []
    for decoding, repeats in (("sampled", samples), ("greedy", int(greedy))):
        order = [index for index in range(len(problems)) for _ in range(repeats)]
        for start in tqdm(range(0, len(order), batch_size), f"{decoding} completions", leave=False, disable=None):
            indices = order[start : start + batch_size]
            columns = {key: [problems[index][key] for index in indices] for key in problems[0]}
            prompts = columns.pop("prompt")
            how = decoding == "sampled", max_completion_length
            ids, attention, completion_ids, mask = generate(student, tokenizer, prompts, *how)
            ended = (_is_end(student, tokenizer, completion_ids) * mask).any(dim=1)
            rows = _rows_at_once(ids.shape[1], student, teacher)
            parts = zip(*(x.split(rows) for x in (ids, attention, mask)), strict=True)
            scores = [score(student, teacher, len(tokenizer), *part)[:2] for part in parts]
            cost, entropy = map(torch.cat, zip(*scores, strict=True))
            texts = tokenizer.batch_decode(completion_ids.masked_fill(mask == 0, tokenizer.pad_token_id), True)
            length = mask.sum(dim=1)
            table = pd.DataFrame({"prompt": indices, "decoding": decoding})
            table["correct"] = reward(task)(texts, prompts=prompts, **columns)
            table["valid"] = [float(task.steps_are_valid(*pair)) for pair in zip(texts, prompts, strict=True)]
            table["tokens"], table["truncated"] = length.tolist(), (~ended).int().tolist()
            table["entropy"] = (entropy.sum(dim=1) / length.clamp(min=1)).tolist()
            table["cost"], table["peak"] = cost.sum(dim=1).tolist(), cost.amax(dim=1).tolist()
            tables.append(table.assign(completion=texts))
            if decoding == "sampled":
                total = cumulative_cost(cost, mask)
                total = torch.cat([total, total[:, -1:].expand(-1, max_completion_length - mask.shape[1])], dim=1)
                curves.append((total.cpu(), length.cpu()))
    return pd.concat(tables, ignore_index=True), _positions(*map(torch.cat, zip(*curves, strict=True)))


def _positions(total: Tensor, length: Tensor) -> pd.DataFrame:
    quantiles = total.quantile(torch.tensor(QUANTILES), dim=0)
    table = pd.DataFrame({"position": range(1, total.shape[1] + 1)})
    table["count"] = [(length > t).sum().item() for t in range(total.shape[1])]
    table["mean"] = total.mean(dim=0).tolist()
    return table.assign(**{f"q{int(100 * q)}": row.tolist() for q, row in zip(QUANTILES, quantiles, strict=True)})


def generate(student, tokenizer, prompts: list[str], sample: bool, max_completion_length: int) -> tuple[Tensor, ...]:
    """Complete `prompts`, at temperature 1 or greedily. A completion stops at the tokenizer's end token and at every
    end token of the model's generation config, whose other settings (top_p, penalties) are not used.

    Returns:
        ids (B, P + T); attention over them; the completion's ids (B, T) and its mask (B, T), which ends with the first
        end token.
    """
    own, ends = student.generation_config, _ends(student, tokenizer)
    encoded = tokenizer.pad({"input_ids": tokenise(tokenizer, prompts)}, return_tensors="pt").to(student.device)
    sampling = {"do_sample": sample, "temperature": 1.0 if sample else None, "top_k": 0 if sample else None}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    config = GenerationConfig(max_new_tokens=max_completion_length, **sampling, **tokens)
    student.generation_config = GenerationConfig()  # it would fill in what `config` leaves open
    try:
        with whole_states(student):
            ids = student.generate(encoded.input_ids, attention_mask=encoded.attention_mask, generation_config=config)
    finally:
        student.generation_config = own
    completion_ids = ids[:, encoded.input_ids.shape[1] :]
    is_end = _is_end(student, tokenizer, completion_ids)
    mask = (is_end.cumsum(dim=1) - is_end.long() == 0).long()
    return ids, torch.cat([encoded.attention_mask, mask], dim=1), completion_ids, mask


def _ends(student, tokenizer) -> list[int]:
    named = student.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


def _is_end(student, tokenizer, ids: Tensor) -> Tensor:
    return torch.isin(ids, torch.tensor(_ends(student, tokenizer), device=ids.device))


def _rows_at_once(tokens: int, *models) -> int:
    """How many rows of so many tokens keep the output of either model's widest layer, in float32, below `WIDEST`."""
    configs = [model.config.get_text_config() for model in models]
    width = max(getattr(config, "intermediate_size", None) or 4 * config.hidden_size for config in configs)
    return max(1, WIDEST // (4 * tokens * width))


def score(student, teacher, vocab_size: int, ids: Tensor, attention: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """At each completion token the reverse KL to the teacher, over the first `vocab_size` ids, the student's entropy
    and its log-probability of the token, over all rows of its head: in nats, (B, T) each, 0 off the mask."""
    keep = mask.shape[1]
    hidden, call = [], {"input_ids": ids, "attention_mask": attention, "use_cache": False}
    for model in (student, teacher):
        states = model.base_model(**call, **positions(model, attention)).last_hidden_state
        hidden.append(states[:, -keep - 1 : -1])
    heads = [lm_head(model, vocab_size) for model in (student, teacher)]
    cost = divergence_from_hidden(hidden[0], heads[0], hidden[1], heads[1], mask).clamp(min=0.0)
    nowhere = torch.zeros_like(mask)  # the divergence is not computed again
    rest = ids[:, -keep:], mask, hidden[1], heads[1], nowhere, "reverse_kl", 0.5, 1.0
    _, log_probs, entropy = score_in_tiles(hidden[0], lm_head(student), *rest)
    return cost, entropy, log_probs
