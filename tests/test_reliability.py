"""A few points of each kind of tests/reliability.py, which tries them all."""

import os
import signal
import time

import pandas as pd
import pytest
import reliability
import safetensors.torch
import torch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    before = os.getcwd(), torch.save, safetensors.torch.serialize_file
    yield reliability.prepare(tmp_path_factory.mktemp("reliability"))
    os.chdir(before[0])
    torch.save, safetensors.torch.serialize_file = before[1:]


@pytest.mark.parametrize("kind", reliability.TRIED)
def test_a_rerun_ends_as_an_undisturbed_run_or_in_one_line(base, kind):
    tried = list(reliability.TRIED[kind][0](base, every=89))
    assert tried
    assert [point for point in tried if point[1] != "equal" and not point[1].startswith("not tried here")] == []


def test_steps_and_seconds_add_up_over_a_resume(base):
    """A step takes at least 0.2 s; training is stopped after two of three."""
    trainer, folder = reliability.cmdp.trainer.CMDPTrainer, reliability.copy(base)
    step = trainer.training_step

    def slow():
        trainer.training_step = lambda *arguments: time.sleep(0.2) or step(*arguments)

    def stop():
        slow()
        reliability.signalled(trainer, "training_step", 2, signal.SIGTERM)()

    work = reliability.COMMANDS["run"]
    assert reliability.child(folder, work, stop)[0] == 130
    assert reliability.child(folder, work, slow)[0] == 0
    log = pd.read_csv(folder / "models/default/dual/0/training.csv")
    assert log["step"].tolist() == [1, 2, 3]
    assert log["seconds"].diff().min() > 0.2
    assert log["seconds"].iloc[0] > 0.2
    assert log["time/update"].notna().all()
    times = pd.read_csv(folder / "results/runs/default/dual/times.csv")
    assert times["seconds"].item() == pytest.approx(log["seconds"].iloc[-1])
