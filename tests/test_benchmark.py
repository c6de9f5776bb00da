"""The benchmark times what it says: the same work for every trainer, in phases that add up."""

import pandas as pd
import pytest

from replication.benchmark import PHASES, _trainers, benchmark

TINY = {
    "student": {"layers": 1, "hidden": 16, "heads": 2},
    "teacher": {"layers": 2, "hidden": 24, "heads": 2},
    "vocabulary": 20,
    "prompts": 2,
    "num_generations": 2,
    "prompt_length": 3,
    "completion_length": 6,
    "repeats": 3,
    "warmup": 1,
    "use_cpu": True,
    "seed": 0,
}


def test_the_table_has_every_phase_of_every_trainer_and_the_ratios(tmp_path):
    benchmark(TINY, tmp_path / "benchmark.csv")
    table = pd.read_csv(tmp_path / "benchmark.csv")
    assert (table["min"] <= table["median"]).all()
    assert (table["median"] <= table["max"]).all()
    assert (table["min"] > 0).all()
    assert set(table["repeats"]) == {3}
    seconds = table[table["unit"] == "seconds"].pivot(index="trainer", columns="phase", values="max")
    assert set(seconds.columns) == set(PHASES)
    assert list(seconds.index) == ["cmdp", "dual", "gkd-grpo", "trl-distillation", "trl-grpo"]
    ratios = table[table["unit"] == "ratio"].set_index("trainer")
    assert len(ratios) == 5
    assert ratios.loc["cmdp / slower of TRL's", "max"] <= ratios.loc["cmdp / trl-grpo", "max"]
    assert (ratios["low"] <= ratios["median"]).all()
    assert (ratios["median"] <= ratios["high"]).all()


def test_every_trainer_has_the_same_tokens_to_do(tmp_path):
    rows = [{"prompt": "w1 w2 w3"}] * 2 + [{"prompt": "w4 w5 w6"}] * 2
    trainers = _trainers(TINY, rows, str(tmp_path))
    for trainer in trainers.values():
        trainer.seconds = {}
        trainer.model.train()
        inputs = trainer._prepare_inputs(rows)
        assert inputs["completion_mask"].tolist() == [[1] * TINY["completion_length"]] * len(rows)
        assert inputs["prompt_mask"].tolist() == [[1] * TINY["prompt_length"]] * len(rows)
        if trainer is trainers["trl-grpo"]:
            assert inputs["ref_per_token_logps"].shape == inputs["completion_mask"].shape
    sizes = {
        name: sum(p.numel() for p in getattr(trainers[key], name).parameters())
        for key, name in (("cmdp", "teacher"), ("trl-grpo", "ref_model"), ("trl-distillation", "teacher_model"))
    }
    assert len(set(sizes.values())) == 1
    students = [sum(p.numel() for p in trainer.model.parameters()) for trainer in trainers.values()]
    assert students == pytest.approx([students[0]] * 5)
