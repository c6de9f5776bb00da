"""The laptop experiment: its problems, its start adapters, and what is committed of it."""

import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from cmdp.storage import read, read_yaml, write_json
from cmdp.tasks import arithmetic, gsm
from replication import laptop
from replication.ceiling import prices

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def splits():
    return laptop.problems()


def equations(row) -> list[tuple[int, str, int, int]]:
    found = re.findall(r"(-?\d+)([-+*])(\d+)=(-?\d+)", row["answer"])
    return [(int(a), op, int(b), int(c)) for a, op, b, c in found]


def test_solutions_are_right_where_they_are_not_to_teach(splits):
    for split in ("train", "test"):
        for row in splits[split]:
            parsed, steps = gsm.parse(row), equations(row)
            assert gsm.steps_are_valid(parsed["solution"], "")
            assert gsm.is_correct(row["answer"], str(arithmetic.apply(*steps[-1][:3])))
            assert all(1 <= step[3] <= laptop.LARGEST for step in steps)
            assert [int(number) for number in re.findall(r"\d+", row["question"][1]["content"])] == [
                steps[0][0],
                *(step[2] for step in steps),
            ]


def test_solutions_that_teach_slip_as_often_as_their_operation_says(splits):
    steps, slipped = Counter(), Counter()
    for row in splits["supervised"]:
        for *step, reached in equations(row):
            off = reached - arithmetic.apply(*step)
            assert off in (-1, 0, 1)
            steps[step[1]] += 1
            slipped[step[1]] += off != 0
    for op, rate in laptop.SLIPS.items():
        assert slipped[op] / steps[op] == pytest.approx(rate, abs=0.015)


def test_no_numbers_are_in_two_splits(splits):
    def key(row):  # a slip changes the values of later steps, not the question's numbers
        text = row["question"][1]["content"]
        verbs = re.findall(r"(finds|gets|buys|loses|sells|gives away|makes it) (\d+)", text)
        kinds = {verb: op for op, said in laptop.SAID.items() for verb in (x.split(" {")[0] for x in said)}
        return (re.search(r"\d+", text)[0], *((kinds[verb], number) for verb, number in verbs))

    keys = {split: set(map(key, rows)) for split, rows in splits.items()}
    assert not keys["train"] & keys["test"]
    assert not keys["supervised"] & (keys["train"] | keys["test"])


def test_fewer_evaluated_problems_than_training_problems_have_one_step(splits):
    share = {name: sum(len(equations(row)) == 1 for row in splits[name]) / len(splits[name]) for name in splits}
    assert round(share["train"], 2) == 0.35
    steps = (pd.read_csv(ROOT / laptop.START / "chains.csv") < 1).sum(axis=1)
    assert round((steps == 1).mean(), 2) == 0.09
    evaluated = splits["test"][: len(steps)]
    assert steps.tolist() == [len(equations(row)) for row in evaluated]


def test_the_ceiling_is_that_of_the_committed_chains():
    folder = ROOT / laptop.START
    p = pd.read_csv(folder / "chains.csv").to_numpy()
    pd.testing.assert_frame_equal(pd.read_csv(folder / "ceiling.csv"), prices(p), rtol=1e-4)
    assert len(p) == read_yaml(ROOT / laptop.PROFILE)["evaluate"]["prompts"]


def test_the_experiment_is_contested():
    """Reward and closeness conflict, and the teacher leaves room (method, section 11)."""
    chains = pd.read_csv(ROOT / laptop.START / "chains.csv").to_numpy()
    assert 0.3 < chains.prod(axis=1).mean() < 0.6
    summary = pd.read_csv(ROOT / "results" / "laptop-gpu" / "summary.csv")
    mean = summary.pivot(index="run", columns="measure", values="mean")
    assert mean.loc["grpo", "accuracy"] > mean.loc["sft", "accuracy"] + 0.1
    assert mean.loc["grpo", "csr"] < mean.loc["sft", "csr"] - 0.2
    assert mean.loc["gkd", "csr"] > 0.95
    assert mean.loc["gkd", "accuracy"] < mean.loc["grpo", "accuracy"] - 0.1


@pytest.mark.parametrize("run", ["gkd", "grpo", "cmdp-chance"])
def test_the_kept_adapters_are_the_student_moved(run):
    before, after = (load_file(ROOT / laptop.START / name / "adapter_model.safetensors") for name in ("student", run))
    assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in after.items()}
    moved = torch.cat([(after[name] - before[name]).float().flatten() for name in before]).norm()
    whole = torch.cat([x.float().flatten() for x in before.values()]).norm()
    assert 0 < moved < 0.5 * whole


def test_keeping_an_adapter_rounds_it_and_says_what_trained_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained, weights = Path("models/laptop-gpu/gkd/0"), {"a": torch.randn(3, 5)}
    trained.mkdir(parents=True)
    save_file(weights, trained / "adapter_model.safetensors")
    write_json({"r": 8}, trained / "adapter_config.json")
    write_json({"provenance": {"commit": "abc"}, "memory": {"device": "a GPU"}}, trained / "cmdp.json")
    write_json({"teacher": {"commit": "old"}}, laptop.START / "provenance.json")
    laptop.keep(str(trained))
    kept = load_file(laptop.START / "gkd" / "adapter_model.safetensors")
    assert torch.equal(kept["a"], weights["a"].bfloat16())
    made = read(laptop.START / "provenance.json")
    assert made["teacher"] == {"commit": "old"}
    assert (made["gkd"]["commit"], made["gkd"]["device"]) == ("abc", "a GPU")
