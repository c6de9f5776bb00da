"""A few points of each kind of tests/reliability.py, which tries them all."""

import os

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
