"""Atomic writes, YAML, checkpoint fingerprints, provenance."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CHECKPOINTS = Path("checkpoints")
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "pandas")


def read_yaml(path: Path, *overrides: str) -> dict:
    """The mapping in a YAML file; `overrides` such as "train.max_steps=5" take the place of what it says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no mapping, or an override is malformed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path} in {Path.cwd()}.")
    try:
        content = OmegaConf.load(path)
        if not OmegaConf.is_dict(content) or not content:
            raise ValueError(f"{path} is empty or no mapping of names to values.")
        for word in overrides:
            if "=" not in word:
                raise ValueError(f"{word!r} is no override: write section.field=value.")
            content = OmegaConf.merge(content, OmegaConf.from_dotlist([word]))
        return OmegaConf.to_container(content, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{' '.join([str(path), *overrides])}: {said}") from error


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill. It replaces `folder` when the block ends, and is dropped if the block fails."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_text(text: str, path: Path) -> None:
    """Write a file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a CSV with six significant digits: enough to plot and to test, small enough for git."""
    write_text(table.to_csv(index=False, float_format="%.6g", lineterminator="\n"), path)


def write_json(content: dict, path: Path) -> None:
    """Write indented JSON."""
    write_text(json.dumps(content, indent=2) + "\n", path)


def fingerprint(settings: dict, inputs: list[Path]) -> str:
    """A digest of settings, input files and the package's code: what a checkpoint or a result was made from."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path in [*sorted(Path(__file__).parent.rglob("*.py")), *sorted(inputs)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def checkpoint_folder(name: str, made_by: str) -> tuple[Path, bool]:
    """The folder for a run's checkpoints, and whether it holds one to resume from.

    A checkpoint fits only the fingerprint `made_by` of the run that wrote it; one that does not is deleted, with a line
    that says so.
    """
    folder = CHECKPOINTS / name
    mark = folder / "made-by.txt"
    if not mark.is_file() or mark.read_text() != made_by:
        if mark.is_file():
            print(f"{folder} was made by other settings, inputs or code: starting over.")
        shutil.rmtree(folder, ignore_errors=True)
        write_text(made_by, mark)
    return folder, any([complete(path) for path in folder.glob("checkpoint-*")])


def complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end; one that was cut off is deleted, so that no run resumes from it. The
    trainer writes `trainer_state.json` last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        shutil.rmtree(checkpoint)
        return False
    return True


def provenance() -> dict:
    """What a result was made on: code, libraries, machine."""
    git, commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def processor() -> str:
    """The name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
