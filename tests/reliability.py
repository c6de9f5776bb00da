"""What interruptions, full disks and damaged files leave of a run: makes docs/reliability.md, in about ten minutes.

    python tests/reliability.py            # every point, on one core
    python tests/reliability.py --every 9  # each ninth, as tests/test_reliability.py

Each trial is a forked child that works in a copy of a small project. A kill point is a change of a file (opened for
writing, created, renamed, deleted): the child ends itself there with SIGKILL, or leaves the file last opened half
written first. The same command then runs undisturbed, and what it leaves is compared, to the byte, with what a run
leaves that was never killed; columns of seconds, and the memory taken, are left out.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pandas as pd
import safetensors.torch
import torch
import yaml

import cmdp.evaluation
import cmdp.trainer
import replication.run
from cmdp import cli, storage, train
from cmdp.models import build_model, build_tokenizer
from cmdp.tasks import arithmetic

CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR
TIMES = re.compile("time|seconds")
COMMANDS = {
    "run": lambda: replication.run.run("dual"),
    "trial": lambda: replication.run.trial("cmdp"),
    "profile": lambda: train.run_all(train.read(Path("small.yaml")), ["cmdp-adaptive"], [0]),
}


def project(folder: Path) -> Path:
    """A project whose runs take a second: parameter files, a student and a teacher of one narrow layer."""
    tokenizer = build_tokenizer(arithmetic.vocabulary())
    for seed, role in enumerate(("student", "teacher")):
        model = build_model(tokenizer, layers=1, hidden=16, heads=2, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 8 if parameter.dim() == 2 else 1  # far from uniform
        model.save_pretrained(folder / "results/start" / role)
        tokenizer.save_pretrained(folder / "results/start" / role)
    task = {"name": "arithmetic", "seed": 0, "steps": [2, 3], "sizes": {"test": 4, "validation": 4, "train": 8}}
    trained = {"max_steps": 3, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6}
    trained |= {"save_steps": 1, "save_total_limit": 1, "logging_steps": 1, "use_cpu": True}
    evaluate = {"split": "test", "prompts": 2, "samples": 1, "batch_size": 8}
    shared = {"task": task, "budget": {"budget": 1.5}, "train": trained}
    longer = {"prompts": 2, "steps": [4, 5], "samples": 1, "max_completion_length": 8}
    roles = {role: {"model": f"results/start/{role}"} for role in ("student", "teacher")}
    trials = {"cmdp": {"method": "cmdp", "grid": [{"lam": 1.0}, {"lam": 0.1}]}}
    runs = {"dual": {"part": "default", "method": "dual", "seeds": [0]}}
    profile = {"runs": {"cmdp-adaptive": {"method": "cmdp-adaptive", "lam": 1.0}}, "seeds": [0], "evaluate": evaluate}
    files = {
        "params.yaml": shared | {"evaluate": evaluate | {"longer": longer}},
        "experiments.yaml": {"runs": runs, "tuning": {"seeds": [7], "samples": 1, "trials": trials}},
        "results/chosen.yaml": {"runs": {"dual": {"dual_rate": 0.1}}},
        "small.yaml": shared | roles | profile | {"task": task | {"prompt_length": 40}},
    }
    roles["student"]["lora"] = {"r": 2}
    for name, content in files.items():
        (folder / name).write_text(yaml.safe_dump(content))
    return folder


# ---- one trial ----


def child(folder: Path, work, prepare=lambda: None, seconds: float = 120.0) -> tuple[int | None, str]:
    """Call `prepare` and then `work` in a fork, in `folder`: its exit code (-9 when killed, None when stuck), and what
    it printed."""
    output = folder.with_name(f"{folder.name}.out")
    sys.stdout.flush()
    if pid := os.fork():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            got, status = os.waitpid(pid, os.WNOHANG)
            if got:
                return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None, output.read_text(errors="replace")
    code = 3
    try:
        os.chdir(folder)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(open(n, "wb", 0, closefd=False), write_through=True) for n in (1, 2))
        prepare()
        cli.call("command", work)
        code = 0
    except SystemExit as stopped:
        print("" if isinstance(stopped.code, int) else stopped.code)
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def watch(at: int | None = None, cut: bool = False, log: Path | None = None):
    """Count changes of files under the working folder; end the process by SIGKILL before change `at`. With `cut`, the
    file that the change before opened for writing keeps half of its bytes. `log` receives the changes."""

    def install() -> None:
        root, count, last = os.getcwd(), 0, None
        lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if log else None

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count, last
            if event not in CHANGES or not isinstance(arguments[0], (str, os.PathLike)):
                return
            if event == "open" and not arguments[2] & WRITING:
                return
            path = os.path.abspath(os.fspath(arguments[0]))
            fails = event != "open" and os.path.lexists(path) == (event == "os.mkdir")
            if fails or not path.startswith(root):
                return
            count += 1
            if count == at:
                if cut:
                    os.truncate(last, os.path.getsize(last) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            last = path if event == "open" else None
            if lines:
                os.write(lines, f"{event} {path[len(root) + 1 :]}\n".encode())

        sys.addaudithook(hook)

    return install


def announced(function, place: int):
    """`function`, which writes the file that its argument `place` names, from C++ or Rust, unseen by audit hooks."""

    def announcing(*arguments, **named):
        path = [*arguments, *named.values()][place]
        if isinstance(path, (str, os.PathLike)):
            sys.audit("open", path, "wb", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        return function(*arguments, **named)

    return announcing


def contents(folder: Path) -> dict[str, str]:
    """What a command left, per file, without times and memory: locks aside."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix in (".lock", ".holder"):
            continue
        content = path.read_bytes()
        if path.suffix == ".csv":
            table = pd.read_csv(path)
            content = table[[name for name in table if not TIMES.search(name)]].to_csv().encode()
        elif path.name == "cmdp.json":
            content = json.dumps(json.loads(content) | {"memory": None}).encode()
        elif "memory" in path.parts:
            content = b""
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


# ---- killed at every change of a file ----


def reference(base: Path, name: str) -> tuple[dict[str, str], list[str]]:
    """What an undisturbed command leaves, and the changes of files that it makes."""
    folder, log = base.with_name(name), base.with_name(f"{name}.log")
    shutil.copytree(base, folder)
    code, said = child(folder, COMMANDS[name], watch(log=log))
    assert code == 0, said
    return contents(folder), log.read_text().splitlines()


def killed(base: Path, name: str, every: int = 1, offset: int = 0) -> list[tuple[str, str]]:
    """(the point, what became of it) for each point at which `name` is killed: "equal", or what is wrong."""
    want, changes = reference(base, name)
    points = [(at, cut) for at in range(1, len(changes) + 1) for cut in (False, True)]
    points = [(at, cut) for at, cut in points if not cut or (at > 1 and changes[at - 2].startswith("open"))]
    found = []
    for at, cut in points[offset::every]:
        folder = base.with_name("killed")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        code, said = child(folder, COMMANDS[name], watch(at, cut))
        where = f"half of {changes[at - 2]}" if cut else f"before {changes[at - 1]}"
        became = again(folder, COMMANDS[name], want) if code == -signal.SIGKILL else f"not killed: {code} {said[-300:]}"
        found.append((where, became))
    return found


def again(folder: Path, work, want: dict[str, str]) -> str:
    """Run a command once more: "equal" if it leaves what `want` says."""
    code, said = child(folder, work)
    if code != 0:
        return f"stuck: {code} {said[-300:]}"
    left = contents(folder)
    different = sorted(name for name in want.keys() | left.keys() if want.get(name) != left.get(name))
    return f"different: {' '.join(different)}" if different else "equal"
