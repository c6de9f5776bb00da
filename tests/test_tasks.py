"""Tasks by name, their problems from the settings of a parameter file, and reading of files."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from cmdp import tasks
from cmdp.tasks import NAMES, load_problems, load_task

SETTINGS = {"name": "arithmetic", "seed": 0, "steps": [2, 3], "sizes": {"test": 2, "train": 3}}
ROWS = [{"question": f"How many is {i}?", "answer": f"{i} + 0 = {i}\n#### {i}"} for i in range(20)]


class Tokenizer:
    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        return f"<{messages[0]['role']}>{messages[0]['content']}"


def test_tasks_are_loaded_by_name_and_unknown_ones_refused():
    for name in NAMES:
        task = load_task(name)
        assert all(callable(getattr(task, part)) for part in ("is_correct", "steps_are_valid"))
    assert load_task("math") is load_task("competition_math")
    for name in ("os", "own.py", None):
        with pytest.raises(ValueError, match="The task is one of"):
            load_task(name)


def test_the_task_section_gives_its_problems():
    expected = load_task("arithmetic").problems({"test": 2, "train": 3}, (2, 3), 0)
    assert load_problems(SETTINGS) == expected
    assert load_problems({**SETTINGS, "prompt_length": 40}, Tokenizer()) == expected


def test_the_tokenizer_renders_prompts_in_natural_language():
    settings = {"name": "gsm", "source": "gsm-symbolic", "sizes": {"train": 2}, "seed": 0}
    assert all(problem["prompt"].endswith("Answer:") for problem in load_problems(settings)["train"])
    assert all(problem["prompt"].startswith("<user>") for problem in load_problems(settings, Tokenizer())["train"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": 3}, "Settings of task 'arithmetic' are sizes, steps, seed, slips: .*'levels'"),
        ({"name": "gsm"}, "Settings of task 'gsm' are source, sizes, seed, test"),
        ({"name": "competition_math"}, "are source, sizes, seed, test"),
        ({"name": "none"}, "The task is one of"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_right_ones(change, message):
    with pytest.raises(ValueError, match=message) as error:
        load_problems(SETTINGS | change)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"are sizes, steps, seed, slips: .*'seed'"):
        load_problems({key: value for key, value in SETTINGS.items() if key != "seed"})


@pytest.mark.parametrize(
    "names", [["train.jsonl"], ["train.parquet"], ["train-00000-of-2.parquet", "train-00001-of-2.parquet"]]
)
def test_files_are_read_as_jsonl_or_parquet(tmp_path, names):
    for part, name in enumerate(names):
        rows = ROWS[part :: len(names)]
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        else:
            (tmp_path / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    read = tasks.read(tmp_path)["train"]
    assert sorted(read, key=ROWS.index) == ROWS
    if len(names) == 1:
        assert tasks.read(tmp_path / names[0])["train"] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "answers"),
    [
        ("own.jsonl", '{"answer": 3}\n{"answer": 0.5}\n{"answer": "x"}\n{"n": 1}\n', ["3", "0.5", "x", "None"]),
        ("own.jsonl", '\ufeff{"answer": "2020-01-01"}\n\n{"answer": "2021-02-03"}', ["2020-01-01", "2021-02-03"]),
        ("own.json", '[{"answer": 12345678901234567890123}]', ["12345678901234567890123"]),
        ("own.csv", "answer\n3\n0.5\n007\nNone\nTrue\n", ["3", "0.5", "007", "None", "True"]),
        ("own.csv", "n,answer\n1,\n2,a\n", ["None", "a"]),
    ],
)
def test_answers_are_read_as_they_are_written(tmp_path, name, content, answers):
    (tmp_path / name).write_text(content, encoding="utf-8")
    rows = tasks.read(tmp_path / name)["train"]
    assert [str(row["answer"]) for row in rows] == answers
    assert len({tuple(row) for row in rows}) == 1


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^nowhere is no file or folder .* train\.jsonl"):
        tasks.read("nowhere")
    for name, content, message in (
        ("train.parquet", "no parquet", "is empty or malformed: .*Parquet"),
        ("train.jsonl", "", "is empty or malformed"),
        ("train.jsonl", '{"question": "?"}\n["a list"]\n', r"train\.jsonl, line 2, is no JSON object"),
        ("train.jsonl", '{"question": "?"}\n\n{"question":\n', r"train\.jsonl, line 3, is no JSON object"),
        ("train.csv", "a,b\n1,2,3\n4,5,6,7\n", "is empty or malformed"),
        ("train.txt", "text", r"ends in \.jsonl, \.json, \.parquet, \.csv"),
    ):
        path = tmp_path / name
        path.write_text(content)
        for source in (path, tmp_path)[: 1 + (path.suffix != ".txt")]:
            with pytest.raises(ValueError, match=message) as error:
                tasks.read(source)
            assert "\n" not in str(error.value)
        path.unlink()


def test_splits_share_no_question_and_keep_duplicates_once():
    rows = [{"prompt": f"Number {i % 10}?"} for i in range(20)]
    splits = tasks.cut(
        rows, [{"prompt": "number 3"}, {"prompt": "Number 3!"}], {"test": None, "a": 4, "train": None}, 0
    )
    assert {name: len(split) for name, split in splits.items()} == {"test": 1, "a": 4, "train": 5}
    asked = [tasks.key(row["prompt"]) for split in splits.values() for row in split]
    assert len(set(asked)) == len(asked) == 10
