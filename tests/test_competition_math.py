"""MATH: files and splits, gold answers, prompts, the verifier on its kinds of answers."""

import json

import pytest

from cmdp.tasks import competition_math as math
from cmdp.tasks import load_problems, load_task


def row(n: int, **more: str) -> dict[str, str]:
    solution = f"First \\boxed{{0}} seems right, but $x^2 = {n * n}$, so $x = \\boxed{{\\frac{{{n}}}{{7}}}}$."
    return {"problem": f"What is ${n}/7$?", "solution": solution, "level": "Level 1", **more}


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def problems(source, sizes, seed, **test):
    return load_problems({"name": "competition_math", "source": source, "sizes": sizes, "seed": seed, **test})


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", [row(n) for n in range(10, 30)])
    write(tmp_path / "test.jsonl", [row(n, answer=f"\\frac{{{n}}}{{7}}") for n in range(15)])
    return tmp_path


def test_problems_are_read_with_the_last_box_as_answer_and_share_no_question(folder):
    splits = problems(folder, {"test": None, "validation": 3, "train": None}, seed=0)
    # five of the training questions are asked in the test split
    assert {name: len(rows) for name, rows in splits.items()} == {"test": 15, "validation": 3, "train": 12}
    assert splits["test"][2]["answer"] == "\\frac{2}{7}"
    assert splits["test"][2]["prompt"] == f"{math.INSTRUCTION}\n\nQuestion: What is $2/7$?\nAnswer:"
    for rows in splits.values():
        for problem in rows:
            assert math.is_correct(problem["solution"], problem["answer"])
    prompts = [problem["prompt"] for rows in splits.values() for problem in rows]
    assert len(set(prompts)) == len(prompts)


def test_the_test_split_may_come_from_elsewhere(folder, tmp_path):
    write(tmp_path / "elsewhere.jsonl", [row(n, answer="1") for n in (12, 99)])
    splits = problems(folder, {"test": None, "train": None}, seed=0, test=tmp_path / "elsewhere.jsonl")
    assert [problem["answer"] for problem in splits["test"]] == ["1", "1"]
    assert len(splits["train"]) == 19


def test_a_solution_without_an_answer_is_named(folder):
    write(folder / "train.jsonl", [{"problem": "?", "solution": "The answer is 7"}])
    with pytest.raises(ValueError, match=r"row 1: its solution has no answer in .*'The answer is 7'"):
        problems(folder, {"train": 1}, seed=0)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("the largest value of $x$, our answer is $\\boxed 2$.", "2"),
        ("The largest is $x = \\boxed 2$.", "2"),
        ("so it is $\\boxed 12$ in all.", "12"),
        ("First $\\boxed{1}$, then $\\boxed {2}$.", "2"),
        ("so $\\fbox{$\\frac12$}$", "\\frac12"),
    ],
)
def test_gold_answers_are_read_from_every_kind_of_box(solution, answer):
    gold = math.parse({"solution": solution})["answer"]
    assert gold == answer
    assert math.is_correct(f"$\\boxed{{{answer}}}$", gold)


@pytest.mark.parametrize(
    ("given", "right", "same"),
    [
        ("\\dfrac{9}{7}", "\\frac{9}{7}", True),
        ("9/7", "\\frac{9}{7}", True),
        ("\\frac97", "\\frac{9}{7}", True),
        ("1\\frac{2}{7}", "\\frac{9}{7}", True),
        ("2\\sqrt{13}", "\\sqrt{52}", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\frac{\\pi}{2})", True),
        ("(-\\infty, 2) \\cup (3, \\infty)", "(-\\infty,2)\\cup(3,\\infty)", True),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
        ("\\text{(A)}", "A", True),
        ("10\\%", "10", True),
        ("\\$32,348", "32348", True),
        ("1, -2", "-2, 1", True),
        ("p - q", "q - p", False),
        ("\\sqrt{53}", "2\\sqrt{13}", False),
        ("\\text{(B)}", "A", False),
        ("(\\frac{\\pi}{2}, 3)", "(3, \\frac{\\pi}{2})", False),
        ("1", "1, -2", False),
    ],
)
def test_answers_of_every_kind_are_compared_by_value(given, right, same):
    assert math.is_correct(f"so it is $\\boxed{{{given}}}$.", right) is same


def test_it_is_a_task_and_judges_equations_between_numbers():
    task = load_task("competition_math")
    assert task is math
    assert task.steps_are_valid("$2 \\cdot 3 = 6$, so $x = \\boxed{6}$.", "")
    assert not task.steps_are_valid("$2 \\cdot 3 = 5$, so $x = \\boxed{6}$.", "")
