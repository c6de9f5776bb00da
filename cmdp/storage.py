"""How a stage keeps its files: outputs that appear whole or not at all, checkpoints that fit what is being run, and a
record of what produced the results."""

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

import pandas as pd
import yaml

CHECKPOINTS = Path("checkpoints")
MAKERS = ("budget", "divergence", "evaluation", "methods", "models", "reward", "supervised", "tasks", "trainer")
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "pandas")


class _Loader(yaml.SafeLoader):
    """Reads 2e-5, without a point, as the number that it is to everyone but YAML 1.1."""


_NUMBER = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def parse_yaml(text: str):
    """What a YAML text says: mappings, lists, strings and numbers alone."""
    return yaml.load(text, _Loader)  # a safe loader: it makes no objects


def read_yaml(path: Path) -> dict:
    """The mapping that a parameter file holds."""
    return parse_yaml(path.read_text(encoding="utf-8"))


def enter_repository() -> Path:
    """Make the repository's root the working folder, from wherever below it a notebook was opened.

    Raises:
        FileNotFoundError: no folder above holds a params.yaml.
    """
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "params.yaml").is_file():
            os.chdir(folder)
            return folder
    raise FileNotFoundError(f"{Path.cwd()} is not inside a clone of the repository: no params.yaml above it.")


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `folder` when the block ends, and is dropped if the block fails."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


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
    """Write JSON that a person can read and a diff can show."""
    write_text(json.dumps(content, indent=2) + "\n", path)


def checkpoint_folder(name: str, settings: dict, inputs: list[Path]) -> tuple[Path, bool]:
    """The folder for a training run's checkpoints, and whether there is one to go on from.

    A checkpoint fits only the run that it was made by: the same settings, the same input files and the same code of
    the modules that train and measure, `MAKERS`. One that does not fit is deleted, with a line that says so.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    package = Path(__file__).parent
    code = [path for maker in MAKERS for path in (*package.glob(f"{maker}.py"), *package.glob(f"{maker}/*.py"))]
    for path in sorted([*inputs, *code]):
        digest.update(path.read_bytes())
    folder = CHECKPOINTS / name
    mark = folder / "made-by.txt"
    if not mark.is_file() or mark.read_text() != digest.hexdigest():
        if mark.is_file():
            print(f"{folder} was made by other settings, inputs or code: it is begun anew.")
        shutil.rmtree(folder, ignore_errors=True)
        write_text(digest.hexdigest(), mark)
    return folder, any([complete(path) for path in folder.glob("checkpoint-*")])


def complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end. One cut off on the way is deleted, so that no run resumes from it:
    the trainer writes `trainer_state.json` last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        shutil.rmtree(checkpoint)
        return False
    return True


def provenance() -> dict:
    """What the results were made on: code, libraries, machine."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip() or "unknown"


def processor() -> str:
    """The name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
