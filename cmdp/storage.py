"""Atomic writes, YAML, checkpoint fingerprints, provenance."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import filelock
import pandas as pd
from omegaconf import OmegaConf

CHECKPOINTS, MANIFEST = Path("checkpoints"), "manifest.json"
RECORD = "cmdp.json"  # beside a student's weights: what it was trained with, and what was measured
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "pandas")


def read_yaml(path: Path, *overrides: str) -> dict:
    """The mapping in a YAML file; `overrides` such as "train.max_steps=5" take the place of what it says. Raises
    `FileNotFoundError`, or `ValueError` where the file is no mapping or an override is malformed."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path} in {Path.cwd()}.")
    with named(" ".join([str(path), *overrides]), "cannot be read", ValueError):
        content = OmegaConf.load(path)
        if not OmegaConf.is_dict(content) or not content:
            raise ValueError(f"{path} is empty or no mapping of names to values.")
        for word in overrides:
            if "=" not in word:
                raise ValueError(f"{word!r} is no override: write section.field=value.")
            content = OmegaConf.merge(content, OmegaConf.from_dotlist([word]))
        return OmegaConf.to_container(content, resolve=True)


def read(path: Path, **options) -> dict | pd.DataFrame:
    """A file of a JSON object, or of CSV (by `pd.read_csv`). Raises `ValueError`, with its name, if it is damaged."""
    with named(path, "cannot be read", ValueError):
        return dict(json.loads(path.read_bytes())) if path.suffix == ".json" else pd.read_csv(path, **options)


def read_runs(folder: Path) -> pd.DataFrame:
    """One table of all runs and seeds in `folder`: RUN/SEED.csv. Raises `FileNotFoundError` if it has none."""
    if not (paths := sorted(folder.glob("*/*.csv"))):
        raise FileNotFoundError(f"There is no result in {folder}: train first.")
    return pd.concat(map(read, paths), ignore_index=True)


def read_record(folder: Path) -> dict:
    """What cmdp.json says of the student in `folder`. Raises `FileNotFoundError` if there is none."""
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"There is no {RECORD} in {folder}: name the folder of a student that cmdp trained.")
    return read(folder / RECORD)


def one_line(error: Exception) -> str:
    """What an error says, in one line of at most 400 characters."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def check_names(*names: str) -> None:
    """Raise `ValueError` for a name that would be no part of a path, or lead out of its folder."""
    if wrong := [name for name in names if not re.fullmatch("[a-z0-9][a-z0-9.-]{0,99}", str(name))]:
        raise ValueError(f"{wrong[0]!r} is no name: use small letters, digits, points and hyphens, 100 at most.")


@contextlib.contextmanager
def named(path: Path | str, fault: str = "cannot be written (is the disk full?)", kind=OSError) -> Iterator[None]:
    """Whatever goes wrong, also in a library of Rust or C++, raises a `kind` with one line that names `path`."""
    try:
        yield
    except Exception as error:
        raise kind(f"{path} {fault}: {one_line(error)}") from error


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill. It replaces `folder` when the block ends, and is dropped if the block fails."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        drop(folder)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_text(text: str, path: Path) -> None:
    """Write a file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with named(path):
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
    code = sorted(Path(__file__).parent.rglob("*.py"))
    made_from = [json.dumps(settings, sort_keys=True, default=str), *map(_sha256, [*code, *sorted(inputs)])]
    return hashlib.sha256("".join(made_from).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of a run. Raises `ValueError` if another process does, naming it."""
    path = CHECKPOINTS / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_suffix(".holder")
    try:
        with filelock.FileLock(path, timeout=0):
            write_text(f"process {os.getpid()} on {platform.node()}", holder)
            yield
    except filelock.Timeout:
        who = holder.read_text() if holder.is_file() else "another process"
        raise ValueError(f"{name} is being trained by {who}: wait for it, or end it.") from None


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
        drop(folder)
        write_text(made_by, mark)
    return folder, any([complete(path) for path in folder.glob("checkpoint-*")])


def certify(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint, last: the sha256 of each of its files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    write_json({str(path.relative_to(checkpoint)): _sha256(path) for path in files}, checkpoint / MANIFEST)


def complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is as it was certified. One that was cut off, or damaged since, is deleted with a line."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        manifest = read(checkpoint / MANIFEST)
        if all(_sha256(checkpoint / name) == digest for name, digest in manifest.items()):
            return True
    print(f"{checkpoint} is not as it was written: it is dropped.")
    drop(checkpoint)
    return False


def drop(folder: Path) -> None:
    """Delete a folder, renamed first: a kill on the way leaves nothing that passes for whole."""
    gone = folder.with_name(f".{folder.name}.dropped")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


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
    with contextlib.suppress(OSError, TypeError):  # elsewhere than on Linux, or unnamed
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()
