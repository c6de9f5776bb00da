"""The arithmetic task: splits, careless solutions, the answer's verifier and the step checker."""

import hashlib
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp.models import build_tokenizer
from cmdp.storage import read_yaml
from cmdp.tasks.arithmetic import (
    LARGEST,
    MOST_STEPS,
    NAMES,
    apply,
    draw,
    is_correct,
    problems,
    solve,
    steps_are_valid,
    vocabulary,
)

ROOT = Path(__file__).parents[1]
SEEDS = st.integers(0, 2**31 - 1)
SIZES = {"train": 400, "validation": 60, "test": 60}
PROMPT, SOLUTION = "Ana 7 + 5 - 3 =", "12 9"


@pytest.fixture(scope="module")
def splits():
    return problems(SIZES, [2, 4], seed=0)


def test_splits_have_the_sizes_asked_for_and_share_no_problem(splits):
    assert {name: len(rows) for name, rows in splits.items()} == SIZES
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == sum(SIZES.values())


def test_splits_depend_on_the_seed_and_on_nothing_else(splits):
    random.seed(123)
    assert problems(SIZES, [2, 4], seed=0) == splits
    assert problems(SIZES, [2, 4], seed=1) != splits
    first = problems({"train": 400}, [2, 4], seed=0)  # what is drawn later does not change what was drawn before
    assert first["train"] == splits["train"]


def test_the_supervised_split_changes_no_other_and_holds_none_of_their_problems(splits):
    found = problems({"supervised": 5000, **SIZES}, [2, 4], seed=0, slips=dict.fromkeys(NAMES, 0.5))
    assert {name: found[name] for name in SIZES} == splits
    assert list(found) == ["supervised", *SIZES]
    held_out = {row["prompt"] for rows in splits.values() for row in rows}
    supervised = [row["prompt"] for row in found["supervised"]]
    assert not held_out & set(supervised)
    assert len(supervised) == 5000


@given(SEEDS, st.integers(1, MOST_STEPS))
@settings(max_examples=200, deadline=None)
def test_every_solution_verifies_step_checks_and_stays_in_range(seed, steps):
    name, start, operations = draw(random.Random(seed), steps)
    assert name in NAMES
    assert len(operations) == steps
    values = solve(start, operations)
    assert all(1 <= value <= LARGEST for value in values)
    prompt = f"{name} {start} {' '.join(f'{op} {n}' for op, n in operations)} ="
    completion = " ".join(map(str, values))
    assert is_correct(completion, str(values[-1]))
    assert steps_are_valid(completion, prompt)
    assert set(f"{prompt} {completion}".split()) <= set(vocabulary())


@given(SEEDS, st.integers(0, 3), st.sampled_from([-1, 1]))
@settings(max_examples=60, deadline=None)
def test_a_wrong_answer_or_a_wrong_step_is_told_apart_from_a_right_one(seed, changed, by):
    row = problems({"test": 1}, [4], seed)["test"][0]
    words = row["solution"].split()
    words[changed] = str(int(words[changed]) + by)
    wrong = " ".join(words)
    assert not steps_are_valid(wrong, row["prompt"])
    assert is_correct(wrong, row["answer"]) == (changed != 3)


# ---- slips ----


def test_a_slip_adds_one_and_the_solution_goes_on_from_there():
    slips = iter([0, 1, 0])
    assert solve(7, [("+", 5), ("-", 3), ("*", 2)], lambda: next(slips)) == [12, 10, 20]


def test_each_name_slips_at_its_own_rate_and_the_answer_stays_true():
    rates = {"Ana": 0.15, "Dan": 0.5}  # the others never do
    rows = problems({"supervised": 6000, "test": 50}, [2, 4], seed=0, slips=rates)
    steps, slipped = defaultdict(int), defaultdict(int)
    for row in rows["supervised"]:
        name, start, *rest, _ = row["prompt"].split()
        value = int(start)
        for op, number, said in zip(rest[::2], rest[1::2], row["solution"].split(), strict=True):
            wrong_by = int(said) - apply(value, op, int(number))
            assert wrong_by in (0, 1)
            steps[name] += 1
            slipped[name] += wrong_by
            value = int(said)
        true = solve(int(start), list(zip(rest[::2], map(int, rest[1::2]), strict=True)))
        assert row["answer"] == str(true[-1])
    for name in NAMES:
        rate = rates.get(name, 0.0)
        assert slipped[name] / steps[name] == pytest.approx(rate, abs=4 * (rate * (1 - rate) / steps[name]) ** 0.5)
    assert all(steps_are_valid(row["solution"], row["prompt"]) for row in rows["test"])  # only teachers' are careless


def test_vocabulary_has_no_duplicates_and_a_token_for_every_word_even_of_slipped_solutions():
    words = vocabulary()
    assert len(words) == len(set(words))
    tokenizer = build_tokenizer(words)
    always = problems({"supervised": 3000}, [2, 4], seed=0, slips=dict.fromkeys(NAMES, 1.0))["supervised"]
    for row in always:
        text = f"{row['prompt']} {row['solution']}"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text


def test_the_largest_slipped_value_is_in_the_vocabulary():
    operations = [("*", 3)] * MOST_STEPS
    worst = max(
        solve(1, [("+", 6), *operations[:n], ("-", 0)], lambda: 1)[-1] - solve(1, [("+", 6), *operations[:n]])[-1]
        for n in range(MOST_STEPS - 1)
    )
    assert str(LARGEST + worst) in vocabulary()


@pytest.mark.parametrize(("a", "op", "b", "value"), [(3, "+", 4, 7), (3, "-", 4, -1), (3, "*", 4, 12)])
def test_operations_mean_what_they_say(a, op, b, value):
    assert apply(a, op, b) == value


# ---- the checkers ----


@pytest.mark.parametrize("completion", ["12 9", "  12 9\n", "12\n9", "12  9 "])
def test_the_right_solution_is_valid_however_it_is_spaced(completion):
    assert is_correct(completion, "9")
    assert steps_are_valid(completion, PROMPT)


@pytest.mark.parametrize(
    "completion",
    [
        "9",  # no derivation
        "12 9 9",  # one too many
        "4 9",  # another order
        "11 9",  # untrue
        "12 12 9",
        "= 12 9",
        "12 ; 9",
        "012 9",
    ],
)
def test_a_right_answer_does_not_make_a_derivation_valid(completion):
    assert is_correct(completion, "9")
    assert not steps_are_valid(completion, PROMPT)


@pytest.mark.parametrize(
    "completion",
    ["", " ", "12", "12 10", "9 12", "12 -9", "12 9.0", "12 9 =", "12 nine", "12 ٩", "12 9\x00", "129", "12 09", "9 ;"],
)
def test_garbled_and_wrong_answers_are_refused(completion):
    assert not is_correct(completion, "9")
    assert not steps_are_valid(completion, PROMPT)


@pytest.mark.parametrize(
    "completion",
    [
        "9" * 5000,  # more digits than `int` reads
        "9" * 2**20,
        "12 " * 2**19,
        "12 9 " * 2**18 + "8",
        "= " * 2**19,
        "12 " + "1" * 2**20,
        "\n" * 2**20,
        "-" * 2**20,
    ],
    ids=lambda completion: completion[:12],
)
def test_hostile_completions_are_refused_and_fast(completion):
    start = time.process_time()
    assert not is_correct(completion, "9")
    assert not steps_are_valid(completion, PROMPT)
    assert time.process_time() - start < 1.0


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_text_makes_the_checkers_raise(text):
    assert is_correct(text, "9") in (True, False)
    assert steps_are_valid(text, PROMPT) == (text.split() == SOLUTION.split())


def test_only_the_last_word_is_the_answer():
    assert is_correct("1 2 9", "9")
    assert not is_correct("9 2", "9")


# ---- sizes ----


def test_asking_for_more_problems_than_there_are_is_an_error_and_soon():
    start = time.process_time()
    with pytest.raises(ValueError, match="Too few different problems"):
        problems({"train": 3000}, [1], seed=0)
    assert time.process_time() - start < 20


def test_more_steps_than_the_vocabulary_allows_are_refused():
    with pytest.raises(ValueError, match=f"at most {MOST_STEPS} steps, not {MOST_STEPS + 1}"):
        problems({"train": 1}, [2, MOST_STEPS + 1], seed=0)


@pytest.mark.parametrize(
    ("section", "digest"),
    [
        ("task", "06d043f54d748c6410045f587e56177cb893666672c9e51ca372d5006217bcc7"),
        ("supervised", "deb4acdbc8d487a56d62fda1473ace00c642aeda39a4cdbc8f8613c239489616"),
    ],
)
def test_problems_are_those_of_the_recorded_results(section, digest):
    params = read_yaml(ROOT / "params.yaml")
    task, sizes = params["task"], params[section]["sizes"]
    sizes = sizes | {name: min(size, 2000) for name, size in sizes.items() if name == "supervised"}
    splits = problems(sizes, task["steps"], task["seed"], task["slips"])
    assert hashlib.sha256(json.dumps(splits).encode()).hexdigest() == digest
