"""Final answers in the text of a language model: find the last one, and compare it with the reference answer.

An answer stands after `####`, in `\\boxed{}`, or after "the answer is". Numbers are compared exactly, as fractions; a
number followed by anything but a unit is not read. Everything else (sets, intervals, expressions) goes to math-verify.

Completions are untrusted: only whitelisted LaTeX reaches the parser, in a process of its own, whose program this file
is too. That process has limits on time and memory and knows no secrets, and it ends when anything in it is about to run
code from text, write a file, or start a process.
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
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

LONGEST = 400  # characters of an answer
SECONDS = 1  # of processor time per comparison
MEMORY = 2 * 2**30  # bytes of address space
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")  # all that the process has of it

_THOUGHT = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.I)
_THOUGHT_END = re.compile(_THOUGHT.pattern.replace("<", "</"), re.I)
_MARK = re.compile(r"####|\\(?:boxed|fbox)(?![A-Za-z])\s*\{?")
_SAID = re.compile(r"\banswer(?: is)?[\s*]{0,9}(?:is|:|=)", re.I)
_LABEL = re.compile(r"(?:[\s:*]|\$\$|\\\[)*(?:(?:the |my )?(?:final )?answer\b(?: is)?(?:[\s:=*]|\$\$|\\\[)*)?", re.I)
_HEADING = re.compile(  # "#### Step 2" with more text below
    r"[ *]*(?:[0-9]{1,2}[.):] +)?(?!(?:the |my )?(?:final )?answer|[A-Z]{2,3} ?[0-9])[A-Z]{2,}.{0,200}\n\s*\S", re.I
)
_SENTENCE_END = re.compile(r"(?<!Rs)\.(?=\s|$)|;|,?\s(?:because|since|which|so|as|where|thus|hence|I)\b")
_UNICODE = {"−": "-", "–": "-", "⁄": "/", "÷": "/", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty "}
_UNICODE |= {"≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "∩": "\\cap ", "°": "^\\circ ", "√": "\\sqrt "}
_SIGNS = str.maketrans(_UNICODE)
_CURRENCY = r"[$£¥€\u20a0-\u20c0]"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\$+([^$]*)(?<!\\)\$+|(?<!\\)\\[()\[\]]", r"\1"),  # math delimiters
        (r"(?<![\w)])\*\*([^*]+)\*\*(?![\w(])|\*\*(?= [A-Za-z])", r"\1"),  # bold
        (r"(?<!\\)\\(?:(?:left|right|displaystyle|rm|bf|it)(?![A-Za-z])|!|(?:text)?color\s*\{\w*\})", ""),
        (r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z]))|~|\s+", " "),
        (r"\{\s*,\s*\}", ","),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:math(?:rm|it|bf)|operatorname)\s*\{\s*([A-Za-z])\s*\}", r" \1"),
        (r"\\(?:math(?:rm|it|bf)|text(?:rm|bf|it|normal)?|[mh]box|operatorname)\s*\{", r"\\text{"),
        (r",?\s*\\text\{\s*(?:and|or)\s*\}", ","),
        (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])", r"\\text{ degree }"),
        (r"\\text\{\s*([0-9][0-9.,]*)\s*\}|^\s*\{([^{}]*)\}\s*$|\\(?=[$%#&])", r"\1\2"),
        (r"\\sqrt +([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        (rf"^\s*([+-]?) *({_CURRENCY}|(?:US\$|[A-Z]{{3}}|Rs\.?)(?=[ 0-9])) *([+-]?\.?[0-9].*)", r"\1\3 \2"),
        (r"  +", " "),
    )
]
_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"([-+]?) ?(?:({_DECIMAL})(?: and)? (?={_DECIMAL} ?/))?({_DECIMAL})(?: ?/ ?({_DECIMAL})|[eE]([-+]?[0-9]{{1,2}}))?"
)
_REPEATING = re.compile(r"([-+]?[0-9]*)\.([0-9]*)\\overline ?\{([0-9]+)\}")
_QUANTITY = re.compile(  # a core, and then only words
    r"(?P<core>(?!\\text).*?(?:[0-9)}\]]|\\pi|(?= ?\\text)))"
    rf"(?P<words>(?:\\text\{{[^{{}}]*\}}|{_CURRENCY}|[A-Za-z'.,/() %¢-]|(?<=[A-Za-z}}])\^(?:[23]|\{{[23]\}}))*)"
)
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNITS = """cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|m meter metre|in inche inch|l liter
    |ft foot feet|mi mile|g gram|kg kilogram|lb pound|oz ounce|h hr hour|min minute|s sec second|am|pm|deg degree
    |% percent percentage|cent ¢|$ dollar usd|€ euro eur|£ gbp|₹ rs rupee inr|2 square sq|3 cubic cu"""
_SAME_UNIT = {word: words.split()[0] for words in _UNITS.split("|") for word in words.split()}
_CHANGES = re.compile(  # words that change the number before them, or deny it
    r"^ *and\b|\b(?:or|but|not|no|plus|minus|times|over|by|squared|cubed|power|root|factorial|mod|modulo|choose|pi|sqrt"
    r"|log|base|remainder|r(?!s)|zero|one|two|half|halve|third|quarter|(?:three|four|fif|five|six|seven|eigh|eight|ni?ne?|ten"
    r"|eleven|twelve|twelf|hundred|thousand|\w+illion)(?:th)?|(?:twen|thir|four|for|fif|six|seven|eigh|nine)t(?:y|een|ieth|eenth)"
    r"|myriad|lakh|crore|bn|mil|dozen|score|gross|pair|double|twice|triple|couple|fold|ish|negative|below|to|through|until|versus"
    r"|except|without|if|is|was|are|were|isn|would|could|should|might|wrong|incorrect|divided|multiplied|raised)s?\b"
)
_COMMANDS = """frac sqrt pi infty cdot times div pm mp le leq ge geq ne neq lt gt in cup cap setminus emptyset varnothing
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp binom langle rangle lfloor rfloor lceil
    rceil alpha beta gamma delta epsilon theta lambda mu nu xi rho sigma tau phi varphi chi psi omega"""
_READABLE = re.compile(
    rf"(?:\\(?:{'|'.join(_COMMANDS.split())})(?![A-Za-z])|\\(?:begin|end)\{{[pbvB]?matrix\}}|\\[\\{{}}]"
    r"|[0-9 +\-*/^_(){}\[\]|.,=<>!&]|(?<![A-Za-z])[A-Za-z]{1,3}(?![A-Za-z]))+"
)
_REFUSED = re.compile(  # exponents and factorials of many digits, towers, and numbers with a base
    r"[0-9]{60,}|(?:\^|\*\*)[\s{(+-]*[0-9]{5,}|[0-9]{4,}[\s)}]*!|![\s)}]*!|[0-9][\s}]*_"
    r"|[0-9][\s)}]*(?:\^|\*\*)[\s{(+-]*[0-9]+[\s)}]*(?:\^|\*\*|!)"
)


def extract(completion: str) -> str | None:
    """The last answer that the completion states, tidied, or None: after `####` (unless that begins a heading) or in
    `\\boxed{}`, wherever one is, else after "the answer is". Thoughts (`<think>...</think>`) are left out. Only the last
    50,000 characters are searched.
    """
    text = _THOUGHT.split(_THOUGHT_END.split(completion)[-1], maxsplit=1)[0][-50_000:]
    marks = [mark for mark in _MARK.finditer(text) if mark[0] != "####" or not _HEADING.match(text, mark.end())]
    mark = (marks or list(_SAID.finditer(text)) or [None])[-1]
    if mark is None:
        return None
    rest = text[mark.end() : mark.end() + 2 * LONGEST]
    rest = rest[_LABEL.match(rest).end() :]
    if mark[0].endswith("{"):
        depths = accumulate(((c == "{") - (c == "}") for c in rest), initial=1)
        answer = rest[: next((i - 1 for i, depth in enumerate(depths) if depth == 0), 0)]
    else:
        answer = rest.partition("\n")[0]
        if mark[0].startswith("\\"):  # MATH's convention for a box without braces
            answer = answer.partition("$")[0]
        elif mark[0] != "####":
            answer = _SENTENCE_END.split(answer, maxsplit=1)[0]
    answer = tidy(answer)
    return answer if 0 < len(answer) <= LONGEST else None


def tidy(answer: str) -> str:
    """An answer in plain LaTeX: without math delimiters, spacing, colour, bold, Unicode signs and a full stop."""
    answer = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda match: "^{" + unicodedata.normalize("NFKC", match[0]) + "}", answer)
    answer = re.sub("[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), answer).translate(_SIGNS)
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer.strip(" *`.,:;")


def number(text: str) -> Fraction | None:
    """The value of "-1,234.50", "1e3", "3/4", "2 3/4", "2\\frac{3}{4}" or "0.\\overline{3}"; None of anything else."""
    if match := _REPEATING.fullmatch(text):
        whole, fixed, period = match.groups()
        return Fraction(f"{whole or 0}.{fixed}0") + Fraction(
            f"{'-' * whole.startswith('-')}{int(period)}/{(10 ** len(period) - 1) * 10 ** len(fixed)}"
        )
    fraction = r"\\frac ?(?:\{ ?(-?)([0-9,.]+) ?\}|([0-9])) ?(?:\{ ?([0-9,.]+) ?\}|([0-9]))"
    match = _NUMBER.fullmatch(re.sub(fraction, r" \1\2\3/\4\5", text).strip())
    if match is None:
        return None
    sign, *parts, exponent = match.groups()
    whole, over, under = (Fraction(f"{part.replace(',', '')}0" if "." in part else part.replace(",", "")) for part in
                          (parts[0] or "0", parts[1], parts[2] or "1"))  # fmt: skip
    if not under:
        return None
    return (-1 if sign == "-" else 1) * (whole + over / under) * Fraction(10) ** int(exponent or 0)


def is_correct(completion: str, answer: str) -> bool:
    """Whether the last answer that the completion states is `answer`. Never raises, and takes bounded time: milliseconds,
    or `SECONDS` and the start of a process at worst.

    Numbers are equal when their values are; a percentage stands for its number or its hundredth. Units are compared
    where both answers have them. Anything else is equal when math-verify says so.
    """
    given = extract(completion)
    return given is not None and equal(given, answer)


@lru_cache(maxsize=4096)
def equal(given: str, right: str) -> bool:
    """Whether two answers are the same."""
    given, right = tidy(given), tidy(right)
    if not given or not right or len(right) > LONGEST:
        return False
    if _plain(given) == _plain(right):
        return True
    (core, scale, units), (other, other_scale, other_units) = _quantity(given), _quantity(right)
    if units and other_units and units != other_units:
        return False
    value, other_value = number(core), number(other)
    if value is not None and other_value is not None:
        values, others = {value * scale}, {other_value * other_scale}
        if units != other_units:
            values |= {value / 100} if "%" in units else set()
            others |= {other_value / 100} if "%" in other_units else set()
        return not values.isdisjoint(others)
    if scale != other_scale or "%" in units | other_units:
        return False
    return core == other or (_is_readable(core) and _is_readable(other) and _worker.verify(core, other))


def _plain(text: str) -> str:
    text = re.sub(r"([_^]) ?\{(\w)\}", r"\1\2", text)
    words = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text).strip(" ().")
    return text if not re.fullmatch(r"[A-Za-z .'-]+", words) else words.casefold() if len(words) > 3 else words


def _quantity(text: str) -> tuple[str, int, frozenset[str]]:
    """An answer's core, scale (thousand, ...) and units; all of it as core where what follows a number is no unit."""
    nothing = text, 1, frozenset()
    if (match := _QUANTITY.fullmatch(text)) is None:
        return nothing
    tail = re.sub(r"\\text|\.", "", match["words"]).lower().replace("per cent", "%")
    words = [
        word if len(word) < 3 else word.removesuffix("s") for word in re.findall(r"[a-z-]+|[^\sa-z',/(){}^-]", tail)
    ]
    attached = tail[:1].isalpha() and not match["words"].startswith("\\")
    if (not words and tail.strip()) or (attached and (words[0] not in _SAME_UNIT or len(words[0]) < 2)):
        return nothing
    scale = 1
    while words and words[0] in _SCALES:
        scale *= _SCALES[words[0]]
        tail = tail.replace(words.pop(0), "", 1)
    if _CHANGES.search(tail) or any(len(word) < 2 and word not in _SAME_UNIT for word in words[:1]):
        return nothing
    if any(len(word) < 2 and word not in _SAME_UNIT and word not in "acf" for word in words[1:]):
        return nothing
    return match["core"].strip(), scale, frozenset(_SAME_UNIT.get(word, word) for word in words)


def _is_readable(text: str) -> bool:
    deepest = max(accumulate((character in "{([") - (character in "})]") for character in text))
    return bool(deepest <= 12 and _READABLE.fullmatch(text) and not _REFUSED.search(text))


class _Worker:
    """The process that runs math-verify: started when first needed, and again when it has died or after a fork."""

    def __init__(self) -> None:
        self.lock, self.process, self.owner = threading.Lock(), None, 0

    def start(self) -> None:
        # Neither forked (torch may be loaded) nor by multiprocessing, which would run the caller's main module again
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        command = [sys.executable, "-P", "-B", __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, encoding="utf-8", **pipes)
        self.owner = os.getpid()
        if not self.process.stdout.readline():
            raise RuntimeError("math-verify does not start: is it installed (`pip install math-verify`)?")

    def stop(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None

    def verify(self, given: str, right: str) -> bool:
        """What math-verify says; False where it takes too long. Safe to call from any thread, and after a fork."""
        with self.lock:
            if self.process is None or self.owner != os.getpid():
                self.start()
            reply = ""
            with contextlib.suppress(OSError):
                self.process.stdin.write(json.dumps([given, right]) + "\n")
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            if not reply:
                self.stop()
            return reply == "true\n"


_worker = _Worker()
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=lambda: setattr(_worker, "lock", threading.Lock()))


def _lock_down() -> None:
    """Limits and guards of the worker process, once all is imported."""
    import resource

    from sympy import Float, Integer

    def refuse(*_, **__):
        raise RuntimeError("refused")

    def read_number(text: str, *_, **__):
        return Float(text) if "." in text else Integer(text)

    # SymPy's ways from text to code: one writes names into generated Python, one evaluates text, as which numbers come
    for name, replacement in (("lambdify", refuse), ("parse_expr", read_number)):
        for module in list(sys.modules.values()):
            if name in getattr(module, "__dict__", {}):
                setattr(module, name, replacement)
    for name, limit in (("AS", MEMORY), ("FSIZE", 0), ("CORE", 0), ("NPROC", 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    generated = re.compile(rb"def monomial_[a-z]+\([ABk, ]*\):\n[ABNa-z0-9\s(),=+*<>:-]*")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def end(event: str, arguments: tuple) -> None:
        if event == "open":
            refused = isinstance(arguments[2], int) and arguments[2] & writing
        elif event == "compile":  # modules have a file; SymPy generates code for tuples of exponents
            source, path = arguments
            refused = not str(path).endswith(".py") and not generated.fullmatch(bytes(source or b""))
        else:  # importing lists folders
            family = event.partition(".")[0]
            refused = family in ("os", "subprocess", "socket", "shutil", "ctypes", "pty") and event != "os.listdir"
        if refused:
            os._exit(70)

    sys.addaudithook(end)


def _serve() -> None:
    """Answer one question per line, [given, right] as JSON, with "true" or "false", until the input ends."""
    for name in (signal.SIGPROF, signal.SIGALRM):  # the kernel's own end of a process
        signal.signal(name, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF, signal.SIGALRM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.alarm(120)

    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify import grader, verify
    from sympy import Basic, Float, MatrixBase, Symbol
    from sympy.core.function import AppliedUndef

    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    rounds = grader.sympy_numeric_eq

    def numeric_eq(a, b, *settings) -> bool:
        """Equality by rounding, of constants alone, and relative to their size."""
        if isinstance(a, MatrixBase) or not rounds(a, b, *settings):
            return rounds(a, b, *settings)
        x, y = a.doit().evalf(60), b.doit().evalf(60)
        near = 2e-6 if a.has(Float) or b.has(Float) else 1e-50
        return not (a.free_symbols or b.free_symbols) and bool(abs(x - y) <= near * max(abs(x), abs(y)))

    grader.sympy_numeric_eq = numeric_eq

    def parse(text: str) -> Basic:
        if not _is_readable(text):
            raise ValueError("not whitelisted")
        is_real = not grader.should_treat_as_complex(text)
        value = latex2sympy(normalize_latex(text, rules), is_real=is_real, normalization_config=None)
        names = [getattr(atom, "name", str(atom.func)) for atom in value.atoms(Symbol, AppliedUndef)]
        if not all(re.fullmatch(r"[A-Za-z]{1,12}(?:_\{?\w{1,4}\}?)?", name) for name in names):
            raise ValueError("a name that is none")
        return value

    same = verify(parse("(x+1)^2"), parse("x^2+2x+1"), timeout_seconds=None)  # loads what is slow the first time
    _lock_down()
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(4 * SECONDS)
        try:
            given, right = map(parse, json.loads(line))
            same = verify(right, given, timeout_seconds=None)
        except (Exception, RecursionError, MemoryError):
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    _serve()
