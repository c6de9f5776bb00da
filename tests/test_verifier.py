"""The process of math-verify: nothing in it runs code, writes files or starts processes; threads share it."""

import itertools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cmdp.tasks.answers import is_correct
from cmdp.tasks.verifier import is_readable, verifier

PROLOGUE = "from cmdp.tasks import verifier; verifier.lock_down()\n"
MAKES_A_FOLDER = "[copyright[numpy.__name__]for[copyright.__class__.__getitem__]in[[numpy.lib._utils_impl.os.mkdir]]]"
SUMS = (
    r"\sum_{n=0}^{\infty}\frac{%s^n}{n!}",
    r"\sum_{n=0}^{\infty}\frac{1}{n!%s^n}",
    r"\sum_{n=1}^{\infty}\frac{1}{n^3+%s}",
    r"\prod_{n=1}^{9}(1+%s)",
    r"\int_0^1 %s dx",
    r"\lim_{x\to0} %s",
)


def run(code: str, folder: Path, **more) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-B", "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False, **more
    )


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.mkdir('made')",
        "import os; os.system('touch made')",
        "import os; os.open('made', os.O_CREAT | os.O_WRONLY)",
        "import os; os.rename('there', 'made')",
        "import os; os.remove('there')",
        "import os; os.fork() or open('made', 'w')",
        "import pathlib; pathlib.Path('made').write_text('x')",
        "open('made', 'w')",
        "open('made', 'ab')",
        "import subprocess; subprocess.run(['touch', 'made'])",
        "import shutil; shutil.copy('there', 'made')",
        "import socket; socket.socket()",
        "import ctypes; ctypes.CDLL(None)",
        "eval('1 + 1')",
        'exec(\'open("made", "w")\')',
    ],
)
def test_a_locked_process_ends_before_it_does_harm(code, tmp_path):
    (tmp_path / "there").write_text("x")
    process = run(PROLOGUE + f"{code}\nprint('went on')", tmp_path)
    assert process.returncode == 70
    assert "went on" not in process.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_sympy_writes_no_names_into_code_and_reads_numbers_without_eval(tmp_path):
    code = """
import sympy
from sympy.core import evalf
for lambdify in (sympy.lambdify, evalf.lambdify, sympy.utilities.lambdify):
    try:
        lambdify(sympy.Symbol('x'), 1)
    except RuntimeError:
        print('refused')
print(sympy.Number('12') + 1, sympy.Number('1.5') * 2)
"""
    assert run("import sympy\n" + PROLOGUE + code, tmp_path).stdout.split() == ["refused"] * 3 + [
        "13",
        "3.00000000000000",
    ]


@pytest.mark.parametrize(
    "without",
    [
        "verifier.is_readable = lambda text: True; verifier._NAME = re.compile('.*', re.DOTALL)",
        "verifier.lock_down = lambda: None; verifier.is_readable = lambda text: True",
        "verifier.lock_down = lambda: None; verifier._NAME = re.compile('.*', re.DOTALL)",
    ],
    ids=["the process alone", "names alone", "the whitelist alone"],
)
def test_each_layer_alone_runs_no_code(without, tmp_path):
    for payload in (f"|{SUMS[0]}|", f"\\sin({SUMS[1]})"):  # each makes a folder where there is no layer at all
        question = json.dumps([payload % f"\\text{{{MAKES_A_FOLDER}}}", "\\pi"]) + "\n"
        code = f"import re; from cmdp.tasks import verifier; {without}; verifier.serve()"
        assert run(code, tmp_path, input=question).stdout.split() in (["ready"], ["ready", "false"])
        assert list(tmp_path.iterdir()) == []


def payloads() -> list[str]:
    """Strings from a grammar of LaTeX around Python, and names that are more than names."""
    atoms = [
        MAKES_A_FOLDER,
        "__import__('os').mkdir('made')",
        "_}_{import__(chr(111)+chr(115))",
        "open('made','w')",
        "lambda:0",
        "os.system('touch made')",
        "x" * 60,
        "print.__self__",
    ]
    wraps = [
        "\\text{%s}",
        "\\mathrm{%s}",
        "\\mbox{%s}",
        "\\operatorname{%s}",
        "x_{%s}",
        "\\frac{%s}{2}",
        "%s",
        "\\sqrt{%s}",
    ]
    outer = ["%s", "|%s|", "\\sin(%s)", "\\{%s,1\\}", "(%s, 2)", "[0, %s)", "\\begin{pmatrix}%s\\end{pmatrix}", *SUMS]
    return [c % (b % a) for a, b, c in itertools.product(atoms, wraps, outer)]


def test_no_string_makes_a_file_a_process_or_a_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_correct("\\boxed{x^2+2x+1}", "(x+1)^2")
    process = verifier.process
    sample = random.Random(0).sample(payloads(), 300)
    for payload, marker in zip(sample, itertools.cycle(["\\boxed{%s}", "#### %s", "The answer is %s"])):
        assert not is_correct(marker % payload, "\\{18,\\pi\\}")
        is_correct("\\boxed{\\pi}", payload)  # the answer of a data set is no better
        assert list(tmp_path.iterdir()) == []
    assert not any(is_readable(payload) for payload in sample)
    assert verifier.process is process  # nothing of it came near the parser
    assert process.poll() is None
    assert Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() == ""
    assert not any("socket" in os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir())


def test_the_process_knows_no_secrets(monkeypatch):
    for name in ("JUDGE_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret-value")
    verifier.stop()
    assert is_correct("\\boxed{x^2+18x+81}", "(x+9)^2")
    assert "secret-value" not in Path(f"/proc/{verifier.process.pid}/environ").read_text()


@pytest.mark.parametrize(
    "text",
    ["\\text{a}", "\\sum x", "\\prod x", "\\int x", "\\lim x", "a.__class__", "name", "x;y", "'a'", "@", "_" * 9 + "~"],
)
def test_only_a_whitelist_is_readable(text):
    assert not is_readable(text)


def test_it_works_in_threads_and_after_its_process_has_died():
    results = {}

    def check(i: int) -> None:
        results[i] = is_correct(f"\\boxed{{x^2+{2 * i}x+{i * i}}}", f"(x+{i})^2")

    threads = [threading.Thread(target=check, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(1, 5), True)
    verifier.process.kill()
    verifier.process.wait()
    assert not is_correct("\\boxed{x^2+100}", "(x+10)^2")  # an answer may be lost with the process, but no more
    assert is_correct("\\boxed{x^2+14x+49}", "(x+7)^2")
