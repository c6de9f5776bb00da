"""GSM8K and GSM-Symbolic: files and splits, prompts, and the check of the steps."""

import json
import os
import subprocess
import sys

import pytest

from cmdp import tasks
from cmdp.tasks import gsm
from cmdp.tasks.steps import equations

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALCULATION = "Ana has {a}+{b} = <<{a}+{b}={c}>>{c} plums.\n#### {c}"


def row(a: int, b: int) -> dict[str, str]:
    return {"question": f"Ana has {a} plums and gets {b}. How many?", "answer": CALCULATION.format(a=a, b=b, c=a + b)}


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def problems(source, sizes, seed, tokenizer=None):
    return tasks.load_problems({"name": "gsm", "source": source, "sizes": sizes, "seed": seed}, tokenizer)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", [row(a, 1) for a in range(1000, 1030)])
    write(tmp_path / "test.jsonl", [row(a, 2) for a in range(10)])
    return tmp_path


def test_problems_are_read_from_files_without_annotations_and_with_the_answer_alone(folder):
    splits = problems(folder, {"test": 4, "validation": 5, "train": None}, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == {"test": 4, "validation": 5, "train": 25}
    assert splits["test"][3] == {
        "prompt": f"{gsm.INSTRUCTION}\n\nQuestion: Ana has 3 plums and gets 2. How many?\nAnswer:",
        "answer": "5",
        "solution": "Ana has 3+2 = 5 plums.\n#### 5",
    }
    assert all(problem["answer"].isdigit() and len(problem["answer"]) == 4 for problem in splits["train"])  # no comma
    prompts = [problem["prompt"] for rows in splits.values() for problem in rows]
    assert len(set(prompts)) == len(prompts)


def test_what_is_held_out_depends_on_the_seed_alone(folder):
    sizes = {"test": 4, "validation": 5, "train": 10}
    first = problems(folder, sizes, seed=0)
    assert problems(folder, sizes, seed=0) == first
    other = problems(folder, sizes, seed=1)
    assert other["validation"] != first["validation"]
    assert other["test"] == first["test"]
    assert problems(folder, {**sizes, "train": None}, seed=0)["validation"] == first["validation"]


def test_a_question_of_the_test_split_is_dropped_from_training_whatever_part_is_tested(folder):
    write(folder / "train.jsonl", [row(9, 2), row(500, 1), row(500, 1), row(501, 1)])
    splits = problems(folder, {"test": 1, "train": None}, seed=0)
    assert sorted(problem["answer"] for problem in splits["train"]) == ["501", "502"]
    asked = "ana has 9 plums, and  gets 2. How many"
    assert asked != row(9, 2)["question"]
    assert tasks.key(asked) == tasks.key(row(9, 2)["question"])
    assert tasks.key("Ana has 9.") != tasks.key("Ana has -9.")


def test_mistakes_in_the_source_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="30 problems left for 'train', and 31"):
        problems(folder, {"train": 31}, seed=0)
    with pytest.raises(FileNotFoundError, match="nowhere is no file or folder here"):
        problems("nowhere", {"train": 1}, seed=0)
    write(folder / "test.jsonl", [{"question": "?", "solution": "1"}])
    with pytest.raises(ValueError, match=r"\(test\), row 1: .* \(columns: question, solution\)"):
        problems(folder, {"train": 1}, seed=0)
    write(folder / "test.jsonl", [{"question": "?", "answer": "It is 1."}])
    with pytest.raises(ValueError, match="ends in `#### n`"):
        problems(folder, {"train": 1}, seed=0)
    (folder / "test.jsonl").write_text("not JSON\n")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1, is no JSON object"):
        problems(folder, {"train": 1}, seed=0)


def test_offline_and_not_cached_says_what_to_do(tmp_path):
    code = "from cmdp.tasks import read; read('openai/gsm8k')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (
        process.stderr.strip()
        .splitlines()[-1]
        .startswith("FileNotFoundError: openai/gsm8k is no file or folder here, nor cached or reachable on the Hub")
    )
    assert "unset HF_HUB_OFFLINE" in process.stderr
    assert "train.jsonl" in process.stderr


def test_symbolic_problems_are_generated_offline_disjoint_and_repeatable():
    sizes = {"test": 30, "validation": 30, "train": 60}
    splits = problems("gsm-symbolic", sizes, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == sizes
    rows = [row for split in splits.values() for row in split]
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(gsm.is_correct(row["solution"], row["answer"]) for row in rows)
    assert all(equation.holds for row in rows for equation in equations(row["solution"]))
    assert not any("Do not include units" in row["prompt"] for row in rows)
    assert problems("gsm-symbolic", sizes, seed=0) == splits
    assert problems("gsm-symbolic", {"test": 30}, seed=0)["test"] == splits["test"]
    assert problems("gsm-symbolic", sizes, seed=1)["test"] != splits["test"]
    with pytest.raises(ValueError, match="say how many"):
        problems("gsm-symbolic", {"train": None}, seed=0)


def test_prompts_follow_the_chat_template_and_encode_to_what_they_say(folder):
    from cmdp.models import build_tokenizer

    tokenizer = build_tokenizer(["plums"])
    plain = problems(folder, {"test": 1}, seed=0, tokenizer=tokenizer)["test"][0]["prompt"]
    assert plain.endswith("\nAnswer:")
    tokenizer.chat_template = TEMPLATE
    prompt = problems(folder, {"test": 1}, seed=0, tokenizer=tokenizer)["test"][0]["prompt"]
    question = "Ana has 0 plums and gets 2. How many?"
    assert prompt == f"<|user|>{question}\n\n{gsm.INSTRUCTION}<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("completion", "valid"),
    [
        ("3+2 = 5 plums.\n#### 5", True),
        ("3 + 2 = 5 and 5 - 1 = 4.\nThe answer is 4.", True),
        ("3 + 2 = 5 and twice 5 - 1 = 9.\nThe answer is 9.", True),
        ("3+2 = 6 plums.\n#### 5", False),
        ("3+2 = 5, 5 - 1 = 3\n#### 5", False),
        ("<<3+2=6>>5 plums.\n#### 5", False),
        ("<<3+2=5>>5 plums.\n#### 5", True),
        ("3+2 = 5 plums.", False),  # no answer
        ("#### 5", False),  # no step
        ("x + 2 = 5\n#### 5", False),  # none that can be judged
        ("", False),
        ("3+2 = 5\n" * 9000 + "#### 5", False),  # no derivation is so long
    ],
)
def test_a_derivation_is_valid_when_every_equation_holds_and_an_answer_follows(completion, valid):
    assert gsm.steps_are_valid(completion, "Ana has 3 plums and gets 2. How many?") is valid
