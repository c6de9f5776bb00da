"""What evaluation writes down is what the completions are: checked against a reckoning of its own."""

import copy
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import make_gpt2, make_model

from cmdp import evaluation
from cmdp.divergence import divergence_from_logits
from cmdp.evaluation import evaluate, generate, score

PROBLEMS = [{"prompt": "a b c", "answer": "x"}, {"prompt": "d e f g h", "answer": "a"}]
TASK = SimpleNamespace(
    is_correct=lambda completion, answer: answer in completion.split(),
    steps_are_valid=lambda completion, prompt: len(completion.split()) < 4,
)
LENGTH = 12


@pytest.fixture
def student(tokenizer):
    return make_model(tokenizer, seed=0, spread=2.0)  # its completions end early as often as not


@pytest.fixture
def teacher(tokenizer):
    return make_model(tokenizer, seed=1, hidden=24, spread=2.0)


def measure(student, teacher, tokenizer, **changes):
    settings = {"samples": 8, "max_completion_length": LENGTH, "batch_size": 5, "seed": 0} | changes
    return evaluate(student, teacher, tokenizer, TASK, PROBLEMS, **settings)


@pytest.fixture
def tables(student, teacher, tokenizer):
    return measure(student, teacher, tokenizer)


def test_every_problem_is_sampled_and_decoded_greedily(tables):
    completions, _ = tables
    counts = completions.groupby(["prompt", "decoding"]).size().to_dict()
    assert counts == {(p, d): n for p in (0, 1) for d, n in (("sampled", 8), ("greedy", 1))}
    assert completions["tokens"].between(1, LENGTH).all()
    assert completions.loc[completions["truncated"] == 1, "tokens"].eq(LENGTH).all()
    assert 0 < completions["truncated"].mean() < 1, "both ended and truncated completions are met"


def test_the_same_seed_gives_the_same_tables_and_another_seed_others(student, teacher, tokenizer, tables):
    for again, table in zip(measure(student, teacher, tokenizer), tables, strict=True):
        pd.testing.assert_frame_equal(again, table)
    assert not measure(student, teacher, tokenizer, seed=1)[0]["cost"].equals(tables[0]["cost"])


def test_a_student_that_is_the_teacher_costs_nothing(student, tokenizer):
    completions, positions = measure(student, copy.deepcopy(student), tokenizer)
    assert completions["cost"].abs().max() < 1e-5
    assert positions["mean"].abs().max() < 1e-5


def test_cost_and_entropy_are_those_of_the_full_distributions(student, teacher, tokenizer):
    prompts = [problem["prompt"] for problem in PROBLEMS] * 4
    torch.manual_seed(0)
    with torch.no_grad():
        ids, attention, completion_ids, mask = generate(student, tokenizer, prompts, True, LENGTH)
        cost, entropy, _ = score(student, teacher, len(tokenizer), ids, attention, mask)
        keep = mask.shape[1]
        logits = [
            model(input_ids=ids, attention_mask=attention).logits[:, -keep - 1 : -1] for model in (student, teacher)
        ]
    logps = logits[0].log_softmax(-1)
    torch.testing.assert_close(cost, divergence_from_logits(*logits) * mask, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropy, -(logps.exp() * logps).sum(-1) * mask, atol=1e-5, rtol=1e-4)
    for row, on in zip(completion_ids, mask, strict=True):  # the mask ends with the first end token
        ended = (row == tokenizer.eos_token_id).nonzero()
        assert on.sum() == (ended[0] + 1 if len(ended) else keep)


def test_batches_do_not_change_what_a_completion_costs(student, teacher, tokenizer):
    torch.manual_seed(0)
    with torch.no_grad():
        ids, attention, _, mask = generate(student, tokenizer, [row["prompt"] for row in PROBLEMS], True, LENGTH)
        together = score(student, teacher, len(tokenizer), ids, attention, mask)
        for row in range(len(ids)):
            one = slice(row, row + 1)
            alone = score(student, teacher, len(tokenizer), ids[one], attention[one], mask[one])
            torch.testing.assert_close(alone[0], together[0][one], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(alone[1], together[1][one], atol=1e-5, rtol=1e-4)


def test_scoring_in_parts_changes_nothing(student, teacher, tokenizer, tables, monkeypatch):
    seen, whole = [], evaluation.score
    monkeypatch.setattr(evaluation, "score", lambda *given: seen.append(len(given[-1])) or whole(*given))
    monkeypatch.setattr(evaluation, "WIDEST", 1)  # a completion at a time
    for again, table in zip(measure(student, teacher, tokenizer), tables, strict=True):
        pd.testing.assert_frame_equal(again, table, rtol=1e-5)
    assert seen == 18 * [1]


def test_padding_moves_no_learned_position(tokenizer):
    """GPT-2 counts positions from 0, on which padding on the left must have no effect."""
    models = make_gpt2(tokenizer, seed=0), make_gpt2(tokenizer, seed=1, hidden=24)
    torch.manual_seed(0)
    with torch.no_grad():
        ids, attention, _, mask = generate(models[0], tokenizer, [row["prompt"] for row in PROBLEMS], True, LENGTH)
        together = score(*models, len(tokenizer), ids, attention, mask)
        assert attention[0, 0] == 0, "the first prompt is padded"
        whole = attention[:1, attention[0].argmax() :]
        alone = score(*models, len(tokenizer), ids[:1, -whole.shape[1] :], whole, mask[:1])
    for padded, bare in zip(together, alone, strict=True):
        assert bare.abs().max() > 0.1
        torch.testing.assert_close(padded[:1], bare, atol=1e-5, rtol=1e-4)


def test_positions_count_and_quantiles_agree_with_the_completions(tables):
    completions, positions = tables
    sampled = completions[completions["decoding"] == "sampled"]
    assert positions["position"].tolist() == list(range(1, LENGTH + 1))
    assert positions["count"].tolist() == [(sampled["tokens"] >= t).sum() for t in positions["position"]]
    last = positions.iloc[-1]
    assert last["mean"] == pytest.approx(sampled["cost"].mean(), rel=1e-5)
    assert last["q50"] == pytest.approx(sampled["cost"].median(), rel=1e-5)
    assert (positions["mean"].diff().dropna() >= -1e-6).all()


def test_a_completion_ends_at_every_end_token_of_the_model(student, tokenizer):
    student.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    torch.manual_seed(0)
    _, _, completions, mask = generate(student, tokenizer, ["a b c"] * 64, True, LENGTH)
    on = [(row.tolist().index(7), int(kept.sum())) for row, kept in zip(completions, mask, strict=True) if 7 in row]
    assert on
    assert all(length <= end + 1 for end, length in on)
    assert student.generation_config.eos_token_id == [tokenizer.eos_token_id, 7]


def test_the_head_reads_contiguous_states_while_generating_and_no_longer(student, tokenizer):
    """Of a slice a CPU would copy a frozen bfloat16 head once per row."""
    read = []
    student.lm_head.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].is_contiguous()))
    generate(student, tokenizer, [problem["prompt"] for problem in PROBLEMS], True, LENGTH)
    assert all(read)
    assert not student.lm_head._forward_pre_hooks


def test_a_task_needs_a_verifier_and_a_step_checker_and_no_more(student, teacher, tokenizer):
    completions, _ = measure(student, teacher, tokenizer)
    measured = ["correct", "valid", "tokens", "truncated", "entropy", "cost", "peak", "completion"]
    assert list(completions) == ["prompt", "decoding", *measured]
    words = completions["completion"].str.split()
    answers = completions["prompt"].map(lambda index: PROBLEMS[index]["answer"])
    found = [answer in own for own, answer in zip(words, answers, strict=True)]
    assert (completions["correct"] == found).all()
    assert (completions["valid"] == (words.str.len() < 4)).all()
    assert 0 < completions["correct"].mean() < 1
    assert 0 < completions["valid"].mean() < 1


def test_nothing_is_decoded_greedily_unless_asked_for(student, teacher, tokenizer, tables):
    completions, positions = measure(student, teacher, tokenizer, greedy=False)
    assert set(completions["decoding"]) == {"sampled"}
    sampled = tables[0][tables[0]["decoding"] == "sampled"]
    pd.testing.assert_frame_equal(completions, sampled)
    pd.testing.assert_frame_equal(positions, tables[1])


def test_the_log_probability_of_each_token_is_the_students(student, teacher, tokenizer):
    torch.manual_seed(0)
    with torch.no_grad():
        ids, attention, completion_ids, mask = generate(student, tokenizer, ["a b c"] * 4, True, LENGTH)
        _, _, log_probs = score(student, teacher, len(tokenizer), ids, attention, mask)
        logits = student(input_ids=ids, attention_mask=attention).logits[:, -mask.shape[1] - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0] * mask
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-4)


def test_a_token_of_a_row_beyond_the_ids_is_scored(student, teacher, tokenizer):
    """Heads are padded past the ids, and what samples from them can meet such a row. On a GPU an index out of bounds
    ends the process."""
    for model in (student, teacher):
        model.resize_token_embeddings(len(tokenizer) + 7)
    ids = torch.tensor([[3, 4, 5, len(tokenizer) + 3]])
    attention, mask = torch.ones_like(ids), torch.tensor([[1, 1]])
    with torch.no_grad():
        _, entropy, log_probs = score(student, teacher, len(tokenizer), ids, attention, mask)
        expected = student(input_ids=ids).logits[:, 1:-1].log_softmax(-1)
    torch.testing.assert_close(log_probs, expected.gather(-1, ids[:, 2:, None])[..., 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=1e-4)
