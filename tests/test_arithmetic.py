"""The arithmetic task: splits, solutions, the answer's verifier and the step checker."""

import hashlib
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp.models import build_tokenizer
from cmdp.tasks.arithmetic import (
    LARGEST,
    apply,
    draw,
    is_correct,
    problems,
    render,
    steps_are_valid,
    vocabulary,
)

SEEDS = st.integers(0, 2**31 - 1)
SIZES = {"train": 400, "validation": 60, "test": 60}
PROMPT = "Ana has 7 then gets 5 then loses 3 . how many ?\n"
SOLUTION = "so 7 + 5 = 12 ; - 3 on 12 gives 9 ; # 9"


@pytest.fixture(scope="module")
def splits():
    return problems(SIZES, (2, 4), seed=0)


def test_splits_have_the_sizes_asked_for_and_share_no_problem(splits):
    assert {name: len(rows) for name, rows in splits.items()} == SIZES
    # the same start and operations are the same problem, whoever's they are
    asked = [row["prompt"].split(" ", 1)[1] for rows in splits.values() for row in rows]
    assert len(set(asked)) == len(asked) == sum(SIZES.values())


def test_splits_depend_on_the_seed_and_on_nothing_else(splits):
    random.seed(123)
    assert problems(SIZES, (2, 4), seed=0) == splits
    assert problems(SIZES, (2, 4), seed=1) != splits
    first = problems({"train": 400}, (2, 4), seed=0)  # what is drawn later does not change what was drawn before
    assert first["train"] == splits["train"]


@given(SEEDS, st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_every_solution_verifies_step_checks_and_stays_in_range(seed, steps):
    rng = random.Random(seed)
    start, operations = draw(rng, steps)
    row = render(rng, start, operations)
    assert len(operations) == steps
    assert is_correct(row["solution"], row["answer"])
    assert steps_are_valid(row["solution"], row["prompt"])
    words = f"{row['prompt']} {row['solution']}".split()
    assert set(words) <= set(vocabulary())
    assert all(0 <= int(word) <= LARGEST for word in words if word.isdigit())


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_wrong_answer_or_a_wrong_step_is_told_apart_from_a_right_one(seed):
    rng = random.Random(seed)
    row = render(rng, *draw(rng, 3))
    assert not is_correct(row["solution"], str(int(row["answer"]) + 1))
    words = row["solution"].split()
    numbers = [index for index, word in enumerate(words) if word.isdigit()]
    changed = rng.choice(numbers)  # any one number of the derivation
    words[changed] = str(int(words[changed]) + 1)
    wrong = " ".join(words)
    assert not steps_are_valid(wrong, row["prompt"])
    assert is_correct(wrong, row["answer"]) == (changed != numbers[-1])


def test_vocabulary_has_no_duplicates_and_tokenizes_every_problem_without_unknowns(splits):
    words = vocabulary()
    assert len(words) == len(set(words))
    tokenizer = build_tokenizer(words)
    for rows in splits.values():
        for row in rows:
            ids = tokenizer(row["prompt"] + row["solution"]).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == (row["prompt"] + row["solution"]).replace("\n", " ")


@pytest.mark.parametrize(("a", "op", "b", "value"), [(3, "+", 4, 7), (3, "-", 4, -1), (3, "*", 4, 12)])
def test_operations_mean_what_they_say(a, op, b, value):
    assert apply(a, op, b) == value


@pytest.mark.parametrize(
    "completion",
    [
        "so 7 + 5 = 12 ; - 3 on 12 gives 9 ; # 9",
        "7 + 5 = 12 ; 12 - 3 gives 9 ; # 9",
        "  next + 5 on 7 gives 12 ; so 12 - 3 = 9 ; # 9\n",
    ],
)
def test_every_phrasing_of_the_right_derivation_is_valid(completion):
    assert is_correct(completion, "9")
    assert steps_are_valid(completion, PROMPT)


@pytest.mark.parametrize(
    "completion",
    [
        "# 9",  # no derivation
        "so 7 + 5 = 12 ; # 9",  # a step is missing
        "so 7 + 5 = 12 ; - 3 on 12 gives 9 ; 9 + 0 = 9 ; # 9",  # one too many
        "so 7 - 3 = 4 ; 4 + 5 = 9 ; # 9",  # another order
        "so 7 + 4 = 11 ; 11 - 2 = 9 ; # 9",  # other numbers
        "so 7 + 5 = 13 ; 13 - 3 = 9 ; # 9",  # untrue
        "so 7 + 5 = 12 ; 11 - 2 = 9 ; # 9",  # not from the value before
        "so so 7 + 5 = 12 ; 12 - 3 = 9 ; # 9",
        "so 7 + 5 = 12 ; 12 - 3 = 9 ; # 8 # 9",
        "so 7 + 5 12 ; 12 - 3 = 9 ; # 9",
    ],
)
def test_a_right_answer_does_not_make_a_derivation_valid(completion):
    assert is_correct(completion, "9")
    assert not steps_are_valid(completion, PROMPT)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " ",
        "#",
        "# ",
        "9",
        "# 9 ;",
        "# 9 9",
        "# -9",
        "# 9.0",
        "#9",
        "## 9",
        "# # # # 9 #",
        "x# 9",
        "# nine",
        "# 10",
        "# ٩",
        "# 9 # 10",
        "# 9\x00",
        "so 7 + 5 = 12 ; - 3 on 12 gives 9 ;",
    ],
)
def test_garbled_and_wrong_answers_are_refused(completion):
    assert not is_correct(completion, "9")
    assert not steps_are_valid(completion, PROMPT)


@pytest.mark.parametrize(
    "completion",
    [
        "# " + "9" * 5000,  # more digits than `int` reads
        "# " + "9" * 2**20,
        "# " + "9" * 2**20 + "x",
        "#" * 2**20,
        "# " * 2**19,
        "# 9" * 2**18,
        "# 9 " * 2**18 + "#",
        " ; " * 2**18,
        "so " * 2**18,
        "7 + 5 = 12 ; " * 2**16 + "# 8",
        "so 7 + " + "5" * 5000 + " = 12 ; 12 - 3 = 9 ; # 8",
        "so 7 + 5 = " + "1" * 2**20 + " ; 12 - 3 = 9 ; # 8",
        "\n" * 2**20,
    ],
    ids=lambda completion: completion[:12],
)
def test_hostile_completions_are_refused_and_fast(completion):
    start = time.perf_counter()
    assert not is_correct(completion, "9")
    assert not steps_are_valid(completion, PROMPT)
    assert time.perf_counter() - start < 1.0


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_text_makes_the_checkers_raise(text):
    assert is_correct(text, "9") in (True, False)
    assert not steps_are_valid(text, PROMPT)


def test_only_the_last_answer_counts():
    assert is_correct("# 1 ; # 2 ; # 9", "9")
    assert not is_correct("# 9 ; # 2", "9")
    assert not steps_are_valid("# 1 ; # 2 ; # 9", PROMPT)


def test_asking_for_more_problems_than_there_are_is_an_error_and_soon():
    start = time.perf_counter()
    with pytest.raises(ValueError, match="Too few different problems"):
        problems({"train": 10**9}, (1, 1), seed=0)
    assert time.perf_counter() - start < 20


def test_problems_are_those_of_the_recorded_results():
    splits = problems({"test": 200, "validation": 200, "train": 2000, "supervised": 12000}, (2, 3), seed=0)
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    assert digest == "24e3b1203f1428f12becd6c60855f658050633b59f85f52915d7f11fbff27cee"
