"""The pipeline under `kill -9`: what is unfinished does not pass for finished, and what was done is not done again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cmdp.cli import read_params

ROOT = Path(__file__).parents[1]
STAGE = "supervised@student"
STEPS = 30


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository with the smoke profile's parameters and problems, and nothing trained yet."""
    folder = tmp_path_factory.mktemp("pipeline") / "copy"
    made = ("data", "models", "checkpoints", "results", "figures", "dvc.lock")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", *made))
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copy(ROOT / ".dvcignore", folder)
    params = read_params(ROOT / "params.yaml", ROOT / "profiles" / "smoke.yaml")
    params["supervised"]["save_steps"] = 5
    params["student"]["max_steps"] = STEPS
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    assert dvc(folder, "repro", "--single-item", "data").wait() == 0
    return folder


def dvc(folder: Path, *words: str) -> subprocess.Popen:
    """Start DVC in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.Popen(["dvc", *words], cwd=folder, env=environment, start_new_session=True)


def weights(folder: Path) -> bytes:
    return (folder / "models" / "student" / "model.safetensors").read_bytes()


def test_a_stage_killed_midway_is_unfinished_and_goes_on_from_its_checkpoint(copy, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        shutil.copytree(copy, folder)
    process = dvc(killed, "repro", "--single-item", STAGE)
    for _ in range(600):
        if list(killed.glob("checkpoints/student/checkpoint-*/trainer_state.json")):
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(killed.glob("checkpoints/student/checkpoint-*"))
    assert not (killed / "models").exists()
    assert STAGE not in (killed / "dvc.lock").read_text()

    assert dvc(killed, "repro", "--single-item", STAGE).wait() == 0
    assert dvc(whole, "repro", "--single-item", STAGE).wait() == 0
    assert weights(killed) == weights(whole)
    assert not list(killed.glob("checkpoints/student"))
    # finished is finished
    made = (killed / "models" / "student").stat().st_mtime_ns
    assert dvc(killed, "repro", "--single-item", STAGE).wait() == 0
    assert (killed / "models" / "student").stat().st_mtime_ns == made
