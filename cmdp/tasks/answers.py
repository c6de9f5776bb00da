"""Final answers in the text of a language model: find the last, and compare it with the right one.

An answer stands after `####`, in `\\boxed{}`, or after "the answer is". Numbers are compared exactly, as fractions;
everything else (sets, intervals, expressions) goes to math-verify. A completion is anyone's text, and what it asks
SymPy to compute may take for ever, in C where no signal is handled. So math-verify runs in a process of its own, which
the kernel kills when a comparison has used up its time, and which is fed nothing long. This file is also that process's
program: it imports no other module of the package.
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
from collections import deque
from fractions import Fraction
from functools import lru_cache

LONGEST = 400  # characters of an answer; what is longer is not one
DIGITS = 60  # of a number
SECONDS = 1  # of processor time that math-verify has for a comparison
MEMORY = 2 * 2**30  # bytes of address space that it has

_MARKED = re.compile(r"####|\\(?:boxed|fbox)\s*\{")
_SAID = re.compile(r"\banswer(?: is)?\s{0,9}(?:is|:|=)", re.IGNORECASE)
_DECIMAL = re.compile(
    rf"(?P<sign>-?)[$€£]?\s*(?P<whole>[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,19}}|[0-9]{{1,{DIGITS}}})?"
    rf"(?:\.(?P<decimals>[0-9]{{0,{DIGITS}}}))?\s*[€£]?"
)
_FRACTION = re.compile(  # with or without a whole number before it: 3/4, 2 3/4, \frac{3}{4}, 2\frac34
    r"(?P<sign>-?)\s*(?:(?P<whole>[0-9]{1,30})(?:\s+|(?=\\)))?"
    r"(?:(?P<a>[0-9,.]+)\s*/\s*(?P<b>[0-9,.]+)"
    r"|\\frac\s*(?:\{\s*(?P<c>-?[0-9,.]+)\s*\}|(?P<e>[0-9]))\s*(?:\{\s*(?P<d>[0-9,.]+)\s*\}|(?P<f>[0-9])))"
)
_WITH_UNIT = re.compile(  # "18 dollars", "$18/hour": what may stand after ####
    r"(-?\s?[$€£]?\s?[0-9][0-9,]*(?:\.[0-9]+)?)\s*(?!pi\b)(?:/\s*|\()?[A-Za-z][A-Za-z' ()/.-]+"
)
_SAYS_NOTHING = re.compile(r"(?<!\\)\\(?:left(?![A-Za-z])|right(?![A-Za-z])|[!,;])")
_SAYS_THE_SAME = re.compile(r"(?<!\\)\\(?:[dt]frac(?![A-Za-z])|[$% ])|[−–\u00a0]")
_PLAIN = {
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\$": "$",
    "\\%": "%",
    "\\ ": " ",
    "−": "-",
    "–": "-",
    "\u00a0": " ",
}
# What SymPy would be at for ever, or for long: an exponent or a factorial of five digits, a tower of numbers
_HUGE = re.compile(
    rf"[0-9]{{{DIGITS},}}|(?:\^|\*\*)[\s{{(+-]*[0-9]{{5,}}|[0-9]{{4,}}[\s)}}]*!|![\s)}}]*!"
    r"|[0-9][\s)}]*(?:\^|\*\*)[\s{(+-]*[0-9]+[\s)}]*(?:\^|\*\*|!)"
)


def extract(completion: str) -> str | None:
    """The last answer that the completion states, tidied, or None: after `####` or in `\\boxed{}`, wherever one is,
    and else after "the answer is". Only the last 50,000 characters are looked at.
    """
    tail = completion[-50_000:]
    found = deque(_MARKED.finditer(tail), maxlen=1) or deque(_SAID.finditer(tail), maxlen=1)
    if not found:
        return None
    marker = found[0]
    rest = tail[marker.end() : marker.end() + 2 * LONGEST]
    if marker[0].endswith("{"):
        answer = _until_brace_closes(rest)
    else:
        answer = rest.lstrip(" \t*:").partition("\n")[0]
        if marker[0] != "####":  # a sentence may go on after it
            answer = re.split(r"\.(?:\s|$)|,\s|;", answer)[0]
    answer = tidy(answer or "")
    if marker[0] == "####" and (with_unit := _WITH_UNIT.fullmatch(answer)):
        answer = with_unit[1]
    return answer if 0 < len(answer) <= LONGEST else None


def _until_brace_closes(text: str) -> str | None:
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index]
    return None


def tidy(answer: str) -> str:
    """An answer without what says nothing: math delimiters, spacing commands, bold, a full stop at the end."""
    answer = _SAYS_THE_SAME.sub(lambda match: _PLAIN[match[0]], _SAYS_NOTHING.sub("", answer))
    answer = answer.strip().strip("*").strip()  # bold
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(answer) > len(opening + closing) and answer.startswith(opening) and answer.rstrip(".").endswith(closing):
            answer = answer.rstrip(".")[len(opening) : -len(closing)].strip()
    return answer.rstrip(".").strip()


def number(text: str) -> Fraction | None:
    """The value of "-1,234.50", "$3", "3/4", "2 3/4" or "\\frac{3}{4}", or None where `text` is anything else.

    A percent sign is left out: see `is_correct`.
    """
    text = text.strip().removesuffix("%").strip()
    if len(text) > 3 * DIGITS:
        return None
    match = _FRACTION.fullmatch(text)
    if match is None:
        return _decimal(text)
    over = _decimal(match["a"] or match["c"] or match["e"])
    under = _decimal(match["b"] or match["d"] or match["f"])
    if over is None or not under:
        return None
    value = int(match["whole"] or 0) + over / under
    return -value if match["sign"] else value


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match["whole"] or match["decimals"]):
        return None
    whole, decimals = (match["whole"] or "").replace(",", ""), match["decimals"] or ""
    value = Fraction(int(whole + decimals), 10 ** len(decimals))
    return -value if match["sign"] else value


def is_correct(completion: str, answer: str) -> bool:
    """Whether the last answer that the completion states is `answer`. Never raises on anyone's completion, and takes
    bounded time: a few milliseconds, or `SECONDS` and the start of a process at worst.

    Numbers are equal when their values are; a percentage stands for its number and for its hundredth, so that 50 %, 50
    and 0.5 (but not 50 and 0.5) agree. Anything else is equal when math-verify says so.
    """
    given = extract(completion)
    return given is not None and equal(given, answer)


@lru_cache(maxsize=4096)
def equal(given: str, right: str) -> bool:
    """Whether two answers, as `extract` returns them, are the same."""
    right = tidy(right)
    if not right or not given:
        return False
    if given == right:
        return True
    values = _values(given), _values(right)
    if all(values):
        return not values[0].isdisjoint(values[1])
    if any(len(text) > LONGEST or _HUGE.search(text) or not _is_sane(text) for text in (given, right)):
        return False
    return _worker.verify(given, right)


def _values(text: str) -> set[Fraction]:
    value = number(text)
    return set() if value is None else {value, value / 100} if text.endswith("%") else {value}


def _is_sane(text: str) -> bool:
    """Whether a parser may see it: no control characters, no digits of another script, no deep nesting."""
    if not all(character.isprintable() and (character.isascii() or not character.isdecimal()) for character in text):
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest <= 12


class _Worker:
    """The process that runs math-verify, started when it is first needed and again when it has died."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process = self.owner = None

    def start(self) -> None:
        # Neither forked (torch and its threads may be loaded) nor spawned by multiprocessing, which would run the
        # caller's main module again. -P: the folder of this file, which holds a math.py, is not searched for modules.
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )

    def stop(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None

    def verify(self, given: str, right: str) -> bool:
        """What math-verify says; False where it takes too long. Safe to call from any thread, and after a fork."""
        with self.lock:
            for _ in range(2):
                if self.process is None or self.owner != os.getpid():
                    self.start()
                if self.process.stdout.readline():  # it says when it is ready for the next
                    break
                self.stop()  # it has died since
            else:
                raise RuntimeError("math-verify does not start: is it installed (`pip install math-verify`)?")
            try:
                self.process.stdin.write(json.dumps([given, right]) + "\n")
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            except OSError:
                reply = ""
            if not reply:
                self.stop()
                self.start()  # its imports take a second: let them begin
            return reply == "true\n"


_worker = _Worker()
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=lambda: setattr(_worker, "lock", threading.Lock()))


def _serve() -> None:
    """Answer one question a line, [given, right] as JSON, with "true" or "false", until the input ends."""
    import resource

    # The kernel's own end of a process, whatever it is doing. Processor time: a busy machine changes no reward.
    for name in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(name, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF, signal.SIGALRM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.alarm(120)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX alone: math-verify reads plain expressions by SymPy's `parse_expr`, which is an `eval`.
    reads = [LatexExtractionConfig(boxed_match_priority=0)]
    parse(r"\boxed{x^2}", reads, parsing_timeout=None)  # what is slow the first time
    while True:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print("ready", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(4 * SECONDS)
        try:
            given, right = (parse(rf"\boxed{{{text}}}", reads, parsing_timeout=None) for text in json.loads(line))
            same = bool(given and right) and verify(right, given, timeout_seconds=None)
        except (Exception, RecursionError, MemoryError):
            same = False
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    _serve()
