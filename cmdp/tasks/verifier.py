"""math-verify in a process of its own: are two answers, given as LaTeX, the same?

Answers are untrusted text. SymPy turns names into generated Python and may compute for ever, so only whitelisted LaTeX
is parsed, in a process whose program this file is. It has limits on time and memory, hardly an environment, no way from
text to code in SymPy, and it ends when it is about to compile text, write a file, or start a process.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from itertools import accumulate

SECONDS = 1  # of processor time per comparison
MEMORY = 2 * 2**30  # bytes of address space
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")  # all variables that the process sees

_COMMANDS = """frac sqrt pi infty cdot times div pm mp le leq ge geq ne neq lt gt in cup cap setminus emptyset sin
    cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp binom langle rangle lfloor rfloor lceil rceil
    alpha beta gamma delta epsilon theta lambda mu nu xi rho sigma tau phi varphi chi psi omega varnothing"""
_READABLE = re.compile(
    rf"(?:\\(?:{'|'.join(_COMMANDS.split())})(?![A-Za-z])|\\(?:begin|end)\{{[pbvB]?matrix\}}|\\[\\{{}}]"
    r"|[0-9 +\-*/^_(){}\[\]|.,=<>!&]|(?<![A-Za-z])[A-Za-z]{1,3}(?![A-Za-z]))+"
)
_NAME = re.compile(r"[A-Za-z]{1,12}(?:_\{?\w{1,4}\}?)?")
_REFUSED = re.compile(  # exponents and factorials of many digits, towers, and numbers with a base
    r"[0-9]{60,}|(?:\^|\*\*)[\s{(+-]*[0-9]{5,}|[0-9]{4,}[\s)}]*!|![\s)}]*!|[0-9][\s)}]*_"
    r"|[0-9][\s)}]*(?:\^|\*\*)[\s{(+-]*[0-9]+[\s)}]*(?:\^|\*\*|!)"
)


def is_readable(text: str) -> bool:
    """Whether the parser may see it: whitelisted LaTeX, names of at most three letters, nothing huge or deep."""
    deepest = max(accumulate((c in "{([") - (c in "})]") for c in text), default=0)
    return bool(deepest <= 12 and _READABLE.fullmatch(text) and not _REFUSED.search(text))


class Verifier:
    """The process, started when first needed, and again when it has died or after a fork."""

    def __init__(self) -> None:
        self.lock, self.process = threading.Lock(), None

    def start(self) -> None:
        # Neither forked (torch may be loaded) nor by multiprocessing, which would run the caller's main module again
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        variables = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        command = [sys.executable, "-P", "-B", __file__]
        self.process = subprocess.Popen(command, env=variables, text=True, bufsize=1, **pipes)
        if not self.process.stdout.readline():
            self.stop()
            raise RuntimeError("math-verify does not start: is it installed (`pip install math-verify`)?")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None

    def verify(self, given: str, right: str) -> bool:
        """What math-verify says; False where it takes too long. Safe to call from any thread, and after a fork."""
        if not (is_readable(given) and is_readable(right)):
            return False
        with self.lock:
            if self.process is None:
                self.start()
            reply = ""
            with contextlib.suppress(OSError):
                self.process.stdin.write(json.dumps([given, right]) + "\n")
                reply = self.process.stdout.readline()
            if not reply:
                self.stop()
            return reply == "true\n"


verifier = Verifier()
atexit.register(verifier.stop)
os.register_at_fork(after_in_child=verifier.__init__)  # which leaves the process to the parent


def lock_down() -> None:
    """Take from this process, for good, all that comparing answers does not need."""
    import resource

    from sympy import Float, Integer

    def refuse(*_, **__):
        raise RuntimeError("SymPy would write names from the text into generated Python")

    def read_number(text: str, *_, **__):  # instead of an `eval`, by which SymPy reads even numbers
        return Float(text) if "." in text else Integer(text)

    for module in list(sys.modules.values()):
        for name, harmless in (("lambdify", refuse), ("parse_expr", read_number)):
            if name in getattr(module, "__dict__", {}):
                setattr(module, name, harmless)
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))
    # SymPy's own generated code, sums and products of tuples' items
    generated = re.compile(rb"def monomial_[a-z]+\([ABk, ]*\):\n[ABNa-z0-9\s(),=+*<>:-]*")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    harmful = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.")

    def audit(event: str, arguments: tuple) -> None:
        if event == "open":
            refused = isinstance(arguments[2], int) and arguments[2] & writing
        elif event == "compile":  # modules have a file
            refused = not str(arguments[1]).endswith(".py") and not generated.fullmatch(bytes(arguments[0] or b""))
        else:
            refused = event.startswith(harmful) and event != "os.listdir"  # which imports need
        if refused:
            os._exit(70)

    sys.addaudithook(audit)


def serve() -> None:
    """Answer one question per line, [given, right] as JSON, with "true" or "false", until the input ends."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify import grader, verify
    from sympy import Basic, Float, MatrixBase, Symbol
    from sympy.core.function import AppliedUndef

    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    rounds = grader.sympy_numeric_eq

    def numeric_eq(a, b, *settings) -> bool:
        """As math-verify's, of constants alone, and relative to their size: it takes tiny values for equal."""
        if isinstance(a, MatrixBase) or not rounds(a, b, *settings):
            return rounds(a, b, *settings)
        x, y = a.doit().evalf(60), b.doit().evalf(60)
        near = 2e-6 if a.has(Float) or b.has(Float) else 1e-50
        return not (a.free_symbols or b.free_symbols) and bool(abs(x - y) <= near * max(abs(x), abs(y)))

    def parse(text: str) -> Basic:
        is_real = not grader.should_treat_as_complex(text)
        value = latex2sympy(normalize_latex(text, rules), is_real=is_real, normalization_config=None)
        names = [getattr(atom, "name", str(atom.func)) for atom in value.atoms(Symbol, AppliedUndef)]
        if not is_readable(text) or not all(map(_NAME.fullmatch, names)):
            raise ValueError("a name that is none")
        return value

    grader.sympy_numeric_eq = numeric_eq
    verify(parse("(x+1)^2"), parse("x^2+2x+1"), timeout_seconds=None)  # loads what is slow the first time
    lock_down()
    # The kernel ends the process, whatever it computes. Processor time: a busy machine changes no reward
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            given, right = map(parse, json.loads(line))
            same = verify(right, given, timeout_seconds=None)
        except (Exception, RecursionError, MemoryError):
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    serve()
