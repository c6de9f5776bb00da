"""The benchmark times what it says: the same work for every trainer, in phases that add up."""

from pathlib import Path

import pandas as pd
import pytest

from replication.benchmark import PROMPT_LENGTH, SIZES, benchmark, make_trainers

ROOT = Path(__file__).parents[2]
TINY = {
    "student": {"layers": 1, "hidden": 16, "heads": 2},
    "teacher": {"layers": 2, "hidden": 24, "heads": 2},
    "vocabulary": 20,
    "batch": (2, 2),
    "completion_length": 6,
    "turns": (3, 1),
    "use_cpu": True,
}


def test_the_table_has_every_phase_of_every_trainer_and_the_ratios(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", TINY)
    benchmark("tiny", tmp_path)
    table = pd.read_csv(tmp_path / "benchmark" / "tiny.csv")
    committed = pd.read_csv(ROOT / "results" / "benchmark" / "default.csv")
    assert list(table.columns) == list(committed.columns)
    assert table[["trainer", "phase", "unit"]].equals(committed[["trainer", "phase", "unit"]])
    assert (table["min"] <= table["median"]).all()
    assert (table["median"] <= table["max"]).all()
    assert (table["min"] > 0).all()
    assert set(table["repeats"]) == {3}
    seconds = table[table["unit"] == "seconds"].pivot(index="trainer", columns="phase", values="max")
    assert set(seconds.columns) == {"generation", "scoring", "update", "step"}
    assert list(seconds.index) == ["cmdp", "dual", "gkd-grpo", "trl-distillation", "trl-grpo"]
    ratios = table[table["unit"] == "ratio"].set_index("trainer")
    assert len(ratios) == 5
    assert ratios.loc["cmdp / slower of TRL's", "max"] <= ratios.loc["cmdp / trl-grpo", "max"]
    assert (ratios["low"] <= ratios["median"]).all()
    assert (ratios["median"] <= ratios["high"]).all()


def test_every_trainer_has_the_same_tokens_to_do(tmp_path):
    rows = [{"prompt": " ".join([word] * PROMPT_LENGTH)} for word in ("w1", "w1", "w2", "w2")]
    trainers = make_trainers(TINY, rows, str(tmp_path))
    for trainer in trainers.values():
        trainer.model.train()
        inputs = trainer._prepare_inputs(rows)
        assert inputs["completion_mask"].tolist() == [[1] * TINY["completion_length"]] * len(rows)
        assert inputs["prompt_mask"].tolist() == [[1] * PROMPT_LENGTH] * len(rows)
        if trainer is trainers["trl-grpo"]:
            assert inputs["ref_per_token_logps"].shape == inputs["completion_mask"].shape
    sizes = {
        name: sum(p.numel() for p in getattr(trainers[key], name).parameters())
        for key, name in (("cmdp", "teacher"), ("trl-grpo", "ref_model"), ("trl-distillation", "teacher_model"))
    }
    assert len(set(sizes.values())) == 1
    students = [sum(p.numel() for p in trainer.model.parameters()) for trainer in trainers.values()]
    assert students == pytest.approx([students[0]] * 5)


def test_an_unknown_benchmark_is_one_line_that_names_those_there_are():
    with pytest.raises(ValueError, match=r"no benchmark 'tiny'\. Benchmarks: default, large-vocabulary"):
        benchmark("tiny")
