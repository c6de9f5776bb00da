"""What interruptions, full disks and damaged files leave of a run: makes docs/reliability.md, in about ten minutes.

    python tests/reliability.py      # on one core
    python tests/reliability.py 9    # one point in 9 alone

Each trial is a forked child that works in a copy of a small project. A kill point is a change of a file (opened for
writing, created, renamed, deleted): the child ends itself there with SIGKILL, or leaves the file last opened half
written first. The same command then runs undisturbed, and what it leaves is compared, to the byte, with what a run
leaves that was never killed; columns of seconds, and the memory taken, are left out.
"""

# ruff: noqa: E402
import ctypes
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pandas as pd
import safetensors.torch
import torch
import yaml
from conftest import make_model

import cmdp.evaluation
import cmdp.trainer
import replication.run
from cmdp import cli, storage, train
from cmdp.models import build_tokenizer
from cmdp.tasks import arithmetic, competition_math, gsm

LIMIT = 5.0  # seconds that all checkers may take on one text
CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR
TIMES = re.compile("time|seconds")
Found = Iterator[tuple[str, str]]  # what was tried, and "equal", or what is wrong


def profile(*words: str) -> None:
    """Train and measure the run of small.yaml."""
    train.run_all(train.read(Path("small.yaml"), *words), ["cmdp-adaptive"], [0])


COMMANDS = {
    "run": lambda: replication.run.run("dual"),
    "trial": lambda: replication.run.trial("cmdp"),
    "profile": profile,
}


def project(folder: Path) -> Path:
    """A project whose runs take a second: parameter files, a student and a teacher of one narrow layer."""
    tokenizer = build_tokenizer(arithmetic.vocabulary())
    for seed, role in enumerate(("student", "teacher")):
        model = make_model(tokenizer, seed, spread=8.0, layers=1)
        model.save_pretrained(folder / "results/start" / role)
        tokenizer.save_pretrained(folder / "results/start" / role)
    task = {"name": "arithmetic", "seed": 0, "steps": [2, 3], "slips": {"Dan": 0.5}}
    task |= {"sizes": {"test": 4, "validation": 4, "train": 8}}
    trained = {"max_steps": 3, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6}
    trained |= {"save_steps": 1, "save_total_limit": 1, "logging_steps": 1, "use_cpu": True}
    evaluate = {"split": "test", "prompts": 2, "samples": 1, "batch_size": 8}
    shared = {"task": task, "budget": {"budget": 1.5}, "train": trained}
    roles = {role: {"model": f"results/start/{role}"} for role in ("student", "teacher")}
    tuning = {"seeds": [7], "samples": 1, "trials": 2, "further": 0, "ladder": 2.0, "csr": 0.95, "start": {"lam": 1.0}}
    tuning |= {"entries": {"cmdp": {"method": "cmdp", "by": "constrained", "fixed": {}}}}
    runs = {"dual": {"part": "default", "method": "dual", "seeds": [0]}}
    profile = {"runs": {"cmdp-adaptive": {"method": "cmdp-adaptive", "lam": 1.0}}, "seeds": [0], "evaluate": evaluate}
    files = {
        "params.yaml": shared | {"evaluate": evaluate},
        "experiments.yaml": {"runs": runs, "tuning": tuning},
        "results/chosen.yaml": {"runs": {"dual": {"dual_rate": 0.1}}},
        "small.yaml": shared | roles | profile | {"task": task | {"prompt_length": 40}},
    }
    roles["student"]["lora"] = {"r": 2}
    for name, content in files.items():
        (folder / name).write_text(yaml.safe_dump(content))
    return folder


# ---- one trial ----


def start(folder: Path, work, prepare=lambda: None) -> int:
    """Call `prepare` and then `work`, as a command, in a fork and in `folder`; it prints to FOLDER.PID.out."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 3
    try:
        os.chdir(folder)
        file = os.open(folder.with_name(f"{folder.name}.{os.getpid()}.out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
        prepare()
        cli.call("command", work)
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
        print("" if isinstance(stopped.code, int) else stopped.code, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(folder: Path, pid: int, seconds: float = 120.0) -> tuple[int | None, list[str]]:
    """The exit code of what `start` began (-9 when killed, None when stuck), and the lines that it printed."""
    end, code, output = time.monotonic() + seconds, None, folder.with_name(f"{folder.name}.{pid}.out")
    while code is None and time.monotonic() < end:
        got, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if got else time.sleep(0.01)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    said = output.read_text(errors="replace").splitlines() if output.is_file() else []
    output.unlink(missing_ok=True)
    return code, [line for line in said if line.strip()] or [""]


def child(folder: Path, work, prepare=lambda: None) -> tuple[int | None, list[str]]:
    """`start`, then `wait`."""
    return wait(folder, start(folder, work, prepare))


def copy(base: Path, name: str = "trial") -> Path:
    """A fresh copy of a project, beside it."""
    folder = base.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(base, folder)


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
            path = os.path.abspath(os.fspath(arguments[0]))
            if event == "open" and (not arguments[2] & WRITING or os.path.isdir(path)):
                return  # reads, and files without a name in a folder
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
    folder, log = copy(base), base.with_name("changes")
    code, said = child(folder, COMMANDS[name], watch(log=log))
    assert code == 0, said
    return contents(folder), log.read_text().splitlines()


def again(folder: Path, work, want: dict[str, str]) -> str:
    """Run a command once more: "equal" if it leaves what `want` says."""
    code, said = child(folder, work)
    if code != 0:
        return f"stuck: {code}, {said[-1]}"
    left = contents(folder)
    different = sorted(name for name in want.keys() | left.keys() if want.get(name) != left.get(name))
    return f"different: {' '.join(different)}" if different else "equal"


def killed(base: Path, name: str, every: int) -> Found:
    """End a command before each change of a file, and in the middle of each file that it writes."""
    want, changes = reference(base, name)
    points = [(at, cut) for at in range(1, len(changes) + 1) for cut in (False, True)]
    points = [(at, cut) for at, cut in points if not cut or (at > 1 and changes[at - 2].startswith("open"))]
    for at, cut in points[::every]:
        folder = copy(base)
        code, said = child(folder, COMMANDS[name], watch(at, cut))
        where = f"half of {changes[at - 2]}" if cut else f"before {changes[at - 1]}"
        yield where, again(folder, COMMANDS[name], want) if code == -signal.SIGKILL else f"not killed: {said[-1]}"


# ---- stopped by a signal ----


def signalled(owner, function: str, call: int, number: int):
    """Send the process a signal when it calls `owner.function` for the `call`-th time."""

    def install() -> None:
        original, calls = getattr(owner, function), itertools.count(1)

        def counting(*arguments, **named):
            if next(calls) == call:
                os.kill(os.getpid(), number)
            return original(*arguments, **named)

        setattr(owner, function, counting)

    return install


def stopped(base: Path, every: int) -> Found:
    """Signals in each step of training, in evaluation, and in steps that share a rollout."""
    trainer, sharing = cmdp.trainer.CMDPTrainer, ["steps_per_generation=2", "num_iterations=2", "max_steps=8"]
    for name, words in (("profile", []), ("profile, a rollout in 4 steps", [f"train.{word}" for word in sharing])):
        work = functools.partial(profile, *words)
        folder = copy(base)
        assert child(folder, work)[0] == 0
        want, steps = contents(folder), 8 if words else 3
        places = [(trainer, "training_step", n, signal.SIGTERM) for n in range(1, steps + 1)]
        places += [(cmdp.evaluation, "score", n, signal.SIGINT) for n in (1, 2)]
        for owner, function, call, number in places[::every]:
            folder = copy(base)
            code, said = child(folder, work, signalled(owner, function, call, number))
            finishes = owner is trainer and call > (4 if words else 2)  # no step is left after the next checkpoint
            right = code == 0 if finishes else code == 130 and "the same command" in said[-1]
            became = again(folder, work, want) if right else f"exit {code}: {said[-1]}"
            yield f"{name}: {number.name} in {function} {call}", became


# ---- a full disk ----


def disk(kib: int, remount: int = 0) -> None:
    """Make the working folder a file system of `kib` KiB (Linux, with user namespaces)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not remount:
        ids = os.getuid(), os.getgid()
        if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
            raise OSError(ctypes.get_errno(), "no user namespaces")
        Path("/proc/self/setgroups").write_text("deny")
        for kind, number in zip(("uid", "gid"), ids, strict=True):
            Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1")
    here = os.getcwd()
    if libc.mount(b"none", here.encode(), b"tmpfs", remount, f"size={kib}k".encode()):
        raise OSError(ctypes.get_errno(), "no tmpfs")
    os.chdir(here)


def full(base: Path, every: int) -> Found:
    """Disks on which a run fits by more and more; then there is room, and it runs again."""
    want, folder, size = reference(base, "run")[0], copy(base), sum(p.stat().st_size for p in base.rglob("*")) // 1024

    def work() -> None:
        disk(10_000)
        for kib in range(size + 40, size + 500, 12 * every):
            for path in Path().iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            disk(10_000, 32)  # MS_REMOUNT
            shutil.copytree(base, ".", dirs_exist_ok=True)
            disk(kib, 32)
            code, said = child(Path.cwd(), COMMANDS["run"])
            fault = "" if code == 0 or (code == 1 and "cannot be written" in said[-1]) else f"exit {code}: {said[-1]}"
            disk(10_000, 32)
            print(json.dumps([f"{kib} KiB", "" if code else "fits", fault or again(Path.cwd(), COMMANDS["run"], want)]))

    code, said = child(folder, work)
    rows = [json.loads(line) for line in said if line.startswith("[")]
    if code:
        yield "all", f"not tried here: {said[-1]}"
    yield from ((where, became) for where, fits, became in rows if not fits)


# ---- damaged files ----

DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(2000)),
    "another type": lambda path: path.write_text("[1]"),
}


def flip(path: Path) -> None:
    """Change one bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


def checkpoints(base: Path, every: int) -> Found:
    """Damage a file of the last checkpoint, of two, of a run that was killed."""
    want, changes = reference(base, "run")
    half_way = copy(base, "half-way")
    at = next(n for n, change in enumerate(changes, 1) if change.endswith("checkpoint-3"))
    assert child(half_way, COMMANDS["run"], watch(at))[0] == -signal.SIGKILL
    (last,) = half_way.rglob("checkpoint-2")
    damages, files = DAMAGE | {"a bit flipped": flip}, sorted(path.name for path in last.iterdir())
    for name, (how, damage) in [*itertools.product(files, damages.items())][::every]:
        folder = copy(half_way)
        damage(folder / last.relative_to(half_way) / name)
        yield f"{how}: {name}", again(folder, COMMANDS["run"], want)


INPUTS = {
    "run": ("params.yaml", "experiments.yaml", "results/chosen.yaml"),
    "trial": ("params.yaml", "experiments.yaml"),
    "profile": ("small.yaml", *(f"results/start/{role}" for role in ("student", "teacher"))),
    "profile of problems": ("train.jsonl", "test.jsonl", "train.parquet"),
    "profile of a GGUF file": ("teacher.gguf",),
    "run again": ("models/default/dual/0",),
}


def inputs(base: Path, every: int) -> Found:
    """Damage a file that a command reads. It ends in one line that names the file or its folder, or as if unharmed."""
    folder = copy(base, "inputs")
    assert child(folder, COMMANDS["run"])[0] == 0
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text((folder / "train.jsonl").read_text().replace("What", "So what"))
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    (folder / "teacher.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + random.Random(1).randbytes(500))
    gsm = ("task={name: gsm, source: ., sizes: {train: 4, test: 4}, prompt_length: 200}", "train.max_steps=1")
    works = COMMANDS | {"run again": COMMANDS["run"], "profile of problems": functools.partial(profile, *gsm)}
    works["profile of a GGUF file"] = functools.partial(profile, "teacher.model=teacher.gguf")
    tried = []
    for command, names in INPUTS.items():
        for path in (folder / name for name in names):
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            tried += [(command, file.relative_to(folder), how) for file in files for how in DAMAGE]
    for command, file, how in tried[::every]:
        trial = copy(folder)
        if file.suffix == ".parquet":
            (trial / "train.jsonl").unlink()
        DAMAGE[how](trial / file)
        code, said = child(trial, works[command])
        names = (str(file), str(file.parent), file.name)
        right = code == 0 or (code == 1 and any(name in said[-1] for name in names))
        yield f"{how}: {file}", "equal" if right else f"exit {code}: {said[-1]}"


# ---- locks and names ----


def locks(base: Path, every: int) -> Found:
    """Several processes that train one run at once: one does; the others are told, or find it done."""
    want = reference(base, "run")[0]
    for attempt in range(0, 10, every):
        folder = copy(base)
        ended = [wait(folder, pid) for pid in [start(folder, COMMANDS["run"]) for _ in range(4)]]
        codes = sorted(code for code, _ in ended)
        told = all("is being trained by" in said[-1] for code, said in ended if code == 1)
        left = again(folder, COMMANDS["run"], want)
        yield f"four at once, {attempt}", left if set(codes) <= {0, 1} and 0 in codes and told else f"{codes} {ended}"


NAMES = ["sft-/../../../../victim", "../victim", "/victim", "..", ".hidden", "a/b", "a\\b", "a b", "a;b", "Capital", ""]
NAMES += ["a\n", "x" * 300, "a\0", "-rf", "ünïcode", "$HOME", "~", "*", "a:b"]


def names(base: Path, every: int) -> Found:
    """Names of runs, parts, starts, trials and files that are no names: one line, and nothing is written."""
    places = {
        "run": lambda name: {"runs": {name: {"method": "cmdp", "seeds": [0]}}},
        "part": lambda name: {"runs": {"dual": {"method": "dual", "seeds": [0], "part": name}}},
        "start": lambda name: {"runs": {"dual": {"method": "dual", "seeds": [0], "start": name}}},
        "trial": lambda name: {"tuning": {"seeds": [0], "trials": {name: {"method": "cmdp", "grid": [{}]}}}},
        "seed": lambda name: {"runs": {"dual": {"method": "dual", "seeds": [name]}}},
        "profile": lambda name: {"runs": {name: {"method": "cmdp"}}},
    }
    for (place, content), name in itertools.islice(itertools.product(places.items(), NAMES), 0, None, every):
        folder = copy(base)
        path = folder / ("small.yaml" if place == "profile" else "experiments.yaml")
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | content(name)))
        before = sorted(base.parent.rglob("*"))
        work = {"profile": lambda name: train.run_all(train.read(Path("small.yaml")), [name], [0])}
        work |= {"trial": replication.run.trial, "run": replication.run.run}
        key = name if place in ("run", "trial", "profile") else "dual"
        code, said = child(folder, functools.partial(work.get(place, replication.run.run), key))
        changed = set(map(str, sorted(base.parent.rglob("*")))) ^ set(map(str, before))
        yield f"{place} {name[:20]!r}", "equal" if code == 1 and not changed else f"exit {code}: {said[-1]} {changed}"


# ---- untrusted text ----

_OS = "[copyright[numpy.__name__]for[copyright.__class__.__getitem__]in[[numpy.lib._utils_impl.os.mkdir]]]"
_CODE = (_OS, "__import__('os').mkdir('x')", "import(chr(111)+chr(115))", "lambda: exec('1')")
_AROUND = (r"\sum_{n=0}^{3}\text{%s}", r"\mathrm{%s}", "%s", r"\text{_}_{%s}", r"|\mbox{%s}|", r"\sin(%s)")
_HUGE = (
    "9" * 300,
    "9^9^9^9",
    "10^{99999}",
    "99999!",
    "2^{2^{2^{99}}}",
    "1e99",
    "0/0",
    r"\frac{1}{0}",
    r"\binom{99999}{9}",
)
_LATEX = [r"\frac", r"\sqrt", r"\boxed", r"\text", r"\sum", r"\int", r"\pi", r"\infty", r"\begin{matrix}", "\\\\"]
_LATEX += [*"^_{}()[]|,.1239x+-*/=!%&#$ "]
_REPEATED = ("1,", "1 ", "\\", "$", "((", "####", "the answer is ", "= 1 ", "\\boxed{", "**")
STRINGS = {
    "Unicode noise": lambda rng: "".join(map(chr, rng.choices(range(1, 0x3000), k=rng.randrange(1, 200)))),
    "LaTeX at random": lambda rng: "".join(rng.choices(_LATEX, k=rng.randrange(1, 40))),
    "deep nesting": lambda rng: rng.choice(["{", "(", r"\frac{", r"\sqrt{", "["]) * rng.randrange(10, 150) + "1",
    "huge numbers": lambda rng: rng.choice(["%s", "-%s", "%s+1", r"\sqrt{%s}", "(%s,1)"]) % rng.choice(_HUGE),
    "code": lambda rng: rng.choice(_AROUND) % rng.choice(_CODE),
    "long": lambda rng: rng.choice(_REPEATED) * rng.randrange(1_000, 30_000),
}
GOLDS = ("18", "\\pi", "(1,2)", "\\{18,2\\}", "x^2+1", "\\frac{1}{3}")


def strings(base: Path, every: int, kind: str, count: int = 200) -> Found:
    """Texts of a kind to the answer checkers and step checkers of all tasks: no exception, no file, in bounded time."""
    folder, rng = base.with_name("empty"), random.Random(kind)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)
    for index in range(0, count, every):
        text = STRINGS[kind](rng)
        forms = (text, f"\\boxed{{{text}}}", f"2 + 3 = {text}\n#### {text}")
        begun, fault = time.monotonic(), ""
        try:
            for form, gold in zip(forms, rng.sample(GOLDS, 3), strict=True):
                competition_math.is_correct(form, gold)
                gsm.steps_are_valid(form, "2 and 3?")
                arithmetic.is_correct(form, "18")
                arithmetic.steps_are_valid(form, "Ana 7 + 5 * 2 =")
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if (took := time.monotonic() - begun) > LIMIT:
            fault = f"{took:.0f} s"
        yield f"{kind} {index}", fault or ("a file was written" if os.listdir(folder) else "equal")
    os.chdir(base)


# ---- the table ----

TRIED = {  # what is tried, by what function, and how many of its points: one in so many
    "Killed at a change of a file, `replication run`": (functools.partial(killed, name="run"), 1),
    "Killed at a change of a file, `replication trial`": (functools.partial(killed, name="trial"), 6),
    "Killed at a change of a file, `cmdp train` with LoRA": (functools.partial(killed, name="profile"), 4),
    "SIGTERM in training, Ctrl-C in evaluation": (stopped, 1),
    "Disk full": (full, 2),
    "A file of the last checkpoint is damaged": (checkpoints, 1),
    "A file that a command reads is damaged": (inputs, 1),
    "Four processes train one run at once": (locks, 1),
    "A name that is none": (names, 1),
} | {f"Checkers of answers and steps: {kind}": (functools.partial(strings, kind=kind), 1) for kind in STRINGS}
PAGE = """# What interruptions and damage leave of a run

Generated by `python tests/reliability.py` in {minutes:.0f} minutes, at commit {commit}, on {processor}
(Python {python}, torch {libraries[torch]}).
tests/test_reliability.py tries a few of the points in every run of the tests.

{table}

- **Killed**: SIGKILL before a file is opened for writing, made, renamed or deleted, and with the file written last cut
  to half. "as undisturbed": after one rerun all files equal, to the byte, those of a run that was not killed, but for
  seconds and the memory taken. At most the steps after the last checkpoint are trained again.
- **Signals**: the command ends with 130 and says that the same command resumes. In a rollout that several steps share,
  a checkpoint waits for the last of them. Where `logging_steps` is over 1, the first row that is logged after a resume
  is a mean over fewer steps. A second signal stops at once, with the last checkpoint.
- **Disk full**: one line names what could not be written; with room the same command goes on.
- **Damaged checkpoints** are told by the sha256 of each file and dropped: the one before serves.
- **Damaged inputs** end in one line that names the file, or are not needed. Settings and weights that are well-formed
  but altered are not noticed.
- **Names** end in one line, and no file is written or deleted.
- **Checkers**: no exception, no file written, less than {limit:.0f} seconds per text (three completions, all tasks).
- **Step checker**: {caught:.2%} of {equations:,} right equations of GSM8K's solutions with one digit changed are found
  wrong (results/gsm8k/check.json).
- Not tested: power cuts (files are not synced to the disk one by one), network file systems, several GPUs.
"""


def prepare(root: Path) -> Path:
    """A project under `root`; everything that commands load is loaded, so that forks need not."""
    torch.save = announced(torch.save, 1)
    safetensors.torch.serialize_file = announced(safetensors.torch.serialize_file, 1)
    base = project(root / "base")
    os.chdir(copy(base))
    for command in COMMANDS.values():
        command()
    os.chdir(base)
    return base


def page(found: dict[str, list[tuple[str, str]]], sparser: int, seconds: float) -> str:
    """docs/reliability.md."""
    rows = [
        "| what | points | as undisturbed, or one line | different | stuck, or worse |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, tried in found.items():
        equal, different = (sum(became.startswith(word) for _, became in tried) for word in ("equal", "different"))
        one_in = TRIED[kind][1] * sparser
        cells = [kind + (f" (one point in {one_in})" if one_in > 1 else ""), len(tried), equal, different]
        rows.append(f"| {' | '.join(map(str, [*cells, len(tried) - equal - different]))} |")
    check = json.loads((ROOT / "results/gsm8k/check.json").read_text())["mutations"]
    about = storage.provenance() | check | {"minutes": seconds / 60, "limit": LIMIT, "table": "\n".join(rows)}
    return PAGE.format(**about)


def main(sparser: int = 1) -> None:
    begun, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as root:
        base = prepare(Path(root).resolve())
        for kind, (function, one_in) in TRIED.items():
            found[kind] = list(function(base, every=one_in * sparser))
            wrong = [point for point in found[kind] if point[1] != "equal"]
            said = f"{time.monotonic() - begun:4.0f} s  {kind}: {len(found[kind])}, {len(wrong)} wrong"
            print(said, *wrong, sep="\n    ", flush=True)
        os.chdir(ROOT)
    text = page(found, sparser, time.monotonic() - begun)
    (ROOT / "docs/reliability.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background, where a shell ignores it
    main(*map(int, sys.argv[1:]))
