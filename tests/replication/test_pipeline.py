"""The pipeline under `kill -9`: unfinished stages do not pass for finished, and finished ones are not run again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from replication.experiments import shrink

ROOT = Path(__file__).parents[2]
STAGE = "pretrain@student"
STEPS = 30


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository with the smoke settings, and nothing trained yet."""
    folder = tmp_path_factory.mktemp("pipeline") / "copy"
    made = ("models", "checkpoints", "results", "figures", "dvc.lock")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", *made))
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copy(ROOT / ".dvcignore", folder)
    before = Path.cwd()
    os.chdir(ROOT)
    shrink(str(folder))
    os.chdir(before)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["supervised"]["save_steps"] = 5
    params["start"]["student"]["max_steps"] = STEPS
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def test_the_smoke_settings_shrink_what_they_name_and_nothing_else(copy):
    small, whole = (yaml.safe_load((folder / "params.yaml").read_text()) for folder in (copy, ROOT))
    assert small["train"]["max_steps"] == 3
    assert small["train"]["adam_beta2"] == whole["train"]["adam_beta2"]
    assert small["budget"] == whole["budget"]
    runs = yaml.safe_load((copy / "experiments.yaml").read_text())["runs"]
    assert set(runs) < set(yaml.safe_load((ROOT / "experiments.yaml").read_text())["runs"])
    assert all(row["seeds"] == [0] for row in runs.values())


def dvc(folder: Path, *words: str) -> subprocess.Popen:
    """Start DVC in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.Popen(["dvc", *words], cwd=folder, env=environment, start_new_session=True)


def weights(folder: Path) -> Path:
    return folder / "results" / "start" / "student" / "model.safetensors"


def test_a_stage_killed_midway_is_unfinished_and_resumes_from_its_checkpoint(copy, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        shutil.copytree(copy, folder)
    process = dvc(killed, "repro", "--single-item", STAGE)
    for _ in range(600):
        if list(killed.glob("checkpoints/start/student/checkpoint-*/manifest.json")):
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(killed.glob("checkpoints/start/student/checkpoint-*"))
    assert not weights(killed).exists()
    assert not (killed / "dvc.lock").exists()

    assert dvc(killed, "repro", "--single-item", STAGE).wait() == 0
    assert dvc(whole, "repro", "--single-item", STAGE).wait() == 0
    assert weights(killed).read_bytes() == weights(whole).read_bytes()
    assert not list(killed.glob("checkpoints/start/student"))
    made = weights(killed).stat().st_mtime_ns
    assert dvc(killed, "repro", "--single-item", STAGE).wait() == 0
    assert weights(killed).stat().st_mtime_ns == made
