"""The measurement of answer verifier and step checker on GSM8K."""

import json
import os

import pytest
from gsm8k import check_gsm8k


def write(path, answers: list[str]) -> None:
    rows = [{"question": f"{path.stem} {i}?", "answer": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_it_counts_what_is_wrong(tmp_path):
    write(
        tmp_path / "train.jsonl", [f"She has {a}+2 = <<{a}+2={a + 2}>>{a + 2} plums.\n#### {a + 2}" for a in range(9)]
    )
    write(tmp_path / "test.jsonl", ["1+2 = <<1+2=3>>3\n#### 3", "7+2 = <<7+2=8>>10, x - 1 = <<x>>3\n#### 9"])
    checked = check_gsm8k(tmp_path)
    assert check_gsm8k(tmp_path) == checked
    assert checked["problems"] == checked["accepted"] == checked["refused"] == 11
    assert checked["valid"] == 10
    assert checked["annotations"] == {"read": 11, "unread": 1, "wrong": 1}
    assert checked["equations"] == {"read": 11, "unread": 1, "wrong": 1}
    assert checked["mutations"] == {"equations": 10, "caught": 1.0}
    assert checked["flagged"] == ["test 2: 7+2 = 10"]


@pytest.mark.skipif("GSM8K" not in os.environ, reason="GSM8K names no folder with GSM8K's two JSONL files")
def test_gsm8ks_own_solutions_pass():
    checked = check_gsm8k(os.environ["GSM8K"])
    assert checked["accepted"] == checked["refused"] == checked["problems"] == 8792
    assert checked["annotations"]["wrong"] == 0
    assert checked["annotations"]["unread"] < 0.02 * checked["annotations"]["read"]
    assert checked["equations"]["wrong"] <= 28  # each looked at: wrong as it is written
    assert checked["equations"]["read"] > 2 * checked["equations"]["unread"]
    assert checked["mutations"]["caught"] > 0.99
