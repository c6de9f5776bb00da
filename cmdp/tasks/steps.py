"""Check a worked solution: recompute every equation between numbers that a text states, by a small parser.

    Natalia sold 48/2 = 24 clips in May, so 48 + 24 = 72 altogether.

An equation is what stands around `=`, as far as it reads as arithmetic: on the left back to the last word that does not
follow a number, on the right up to the first. Units are words and are passed over; so are `$` and the like. What is
not arithmetic (a variable, a conversion such as "1 hour = 60 minutes") is not judged. Nothing is evaluated but here,
on fractions of bounded size.
"""

import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 20_000  # characters of a text; what is longer is not a solution
WINDOW = 60  # tokens of an expression
DEPTH = 20  # of parentheses
LARGEST = 10**40  # a numerator or denominator beyond it is not computed


class Equation(NamedTuple):
    """An equation as it was read, `left` = `right`, and whether it holds."""

    left: str
    right: str
    holds: bool


_ANNOTATION = re.compile(r"<<([^<>]{0,400})>>")
_REWRITES = [  # of LaTeX and Markdown, before the text is cut into tokens
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:approx|thickapprox)(?![A-Za-z])"), "≈"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]{1,60})\}\s*\{([^{}]{1,60})\}"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]{0,60})\}"), r" \1 "),
    (re.compile(r"\\(?:left|right|boxed|quad|qquad)(?![A-Za-z])"), " "),
    (re.compile(r"\\[\[\]()]"), " ; "),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\\[,;! ]"), " "),
    (re.compile(r"(?<=[0-9)])\*\*(?=[0-9(])"), "^"),
    (re.compile(r"\*\*|__|`"), " "),
    (re.compile(r"^\s*(?:[-*•+]\s|[0-9]{1,2}[.)]\s)", re.MULTILINE), " ; "),  # an item of a list
]
_TOKEN = re.compile(
    r"(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<![0-9A-Za-z])\.[0-9]+)"
    r"|(?P<equals>==?|≈|≅)"
    r"|(?P<times>[*×·∙⋅]|(?<![A-Za-z])[xX](?![A-Za-z]))"
    r"|(?P<operator>[+/÷^−–-])"
    r"|(?P<open>[(\[])|(?P<close>[)\]])"
    r"|(?P<percent>%)"
    r"|(?P<currency>[$€£])"
    r"|(?P<word>[^\W\d_]+(?:['’-][^\W\d_]+)*|[°¢])"
    r"|(?P<stop>\n|[^\s])"
)
_SAME = {"×": "*", "·": "*", "∙": "*", "⋅": "*", "x": "*", "X": "*", "÷": "/", "−": "-", "–": "-"}


def equations(text: str) -> list[Equation]:
    """The equations of a text that can be judged, calculator annotations (`<<48/2=24>>`) left out.

    A right side written with decimals may be rounded or cut: it holds within one unit of its last decimal. A whole
    number is exact, unless `≈` says that it is not. A percentage may stand for its number or for its hundredth.
    """
    found = []
    for line in _rewritten(_ANNOTATION.sub("", text[:LONGEST])).split("\n"):
        if "=" in line or "≈" in line or "≅" in line:
            found += _of_line(_tokens(line))
    return found


def annotations(text: str) -> list[Equation | str]:
    """The calculator annotations of a text: each as an equation, or as it stands where it cannot be read as one."""
    found: list[Equation | str] = []
    for match in _ANNOTATION.finditer(text[:LONGEST]):
        read = _of_line(_tokens(match[1]))
        found += read or [match[1]]
    return found


def without_annotations(text: str) -> str:
    """The text as a reader sees it: "48/2 = <<48/2=24>>24" is "48/2 = 24"."""
    return _ANNOTATION.sub("", text)


def _rewritten(text: str) -> str:
    for pattern, plain in _REWRITES:
        text = pattern.sub(plain, text)
    return text


class _Token(NamedTuple):
    kind: str  # number, operator, open, close, percent, word, equals, stop
    text: str
    start: int


def _tokens(line: str) -> list[_Token]:
    tokens: list[_Token] = []
    for match in _TOKEN.finditer(line):
        kind, text = match.lastgroup, match[0]
        if kind == "currency":
            continue
        if kind in ("times", "operator"):
            kind, text = "operator", _SAME.get(text, text)
        tokens.append(_Token(kind, text, match.start()))
    return tokens


def _of_line(tokens: list[_Token]) -> list[Equation]:
    """The equations of a line; a chain a = b = c is two."""
    segments: list[list[_Token]] = [[]]
    signs = []
    for token in tokens:
        if token.kind == "equals":
            signs.append(token.text)
            segments.append([])
        else:
            segments[-1].append(token)
    found = []
    for index, sign in enumerate(signs):
        left = _ending(segments[index])
        right = _beginning(segments[index + 1], last=index + 1 == len(signs))
        if left is None or right is None:
            continue
        found.append(Equation(_written(left), _written(right), _holds(left, right, sign)))
    return found


def _ending(segment: list[_Token]) -> list[_Token] | None:
    """The longest arithmetic expression that ends the segment, or None where that is part of something else."""
    start = max(
        [i + 1 for i, token in enumerate(segment) if token.kind == "stop"] + [len(segment) - WINDOW, 0],
    )
    segment = _without_units(segment[start:])
    for i, token in enumerate(segment):
        if token.kind == "word" or (i and segment[i - 1].kind in ("operator", "close", "number", "percent")):
            continue
        if _value(segment[i:]) is not None:
            return segment[i:]
    return None


def _beginning(segment: list[_Token], last: bool) -> list[_Token] | None:
    """The longest arithmetic expression that begins the segment: all of it, or what comes before the first words."""
    end = next((i for i, token in enumerate(segment) if token.kind == "stop"), len(segment))
    whole = _without_units(segment[: min(end, WINDOW)])
    if not last and end == len(segment) and _value(whole) is not None:
        return whole
    end = next((i for i, token in enumerate(whole) if token.kind == "word"), len(whole))
    for i in range(end, 0, -1):
        if _value(whole[:i]) is not None:
            return whole[:i]
    return None


def _without_units(tokens: list[_Token]) -> list[_Token]:
    return tokens


def _written(tokens: list[_Token]) -> str:
    return " ".join(token.text for token in tokens)


def _holds(left: list[_Token], right: list[_Token], sign: str) -> bool:
    last = right[-1] if right[-1].kind == "number" else right[-2] if len(right) > 1 else right[-1]
    decimals = len(last.text.partition(".")[2])
    for percent in (Fraction(1, 100), Fraction(1)):
        for percent_right in (Fraction(1, 100), Fraction(1)):
            a, b = _value(left, percent), _value(right, percent_right)
            if a is None or b is None:
                continue
            unit = Fraction(1, 10**decimals)
            if a == b or ((decimals or sign in "≈≅") and abs(a - b) < unit):
                return True
    return False


def _value(tokens: list[_Token], percent: Fraction = Fraction(1, 100)) -> Fraction | None:
    """The value of an expression, or None where it is not one, or divides by zero, or is too large."""
    if not tokens or len(tokens) > WINDOW or len(tokens[-1].text) > 60:
        return None
    try:
        value, end = _sum(tokens, 0, percent, 0)
    except (_Unreadable, ZeroDivisionError):
        return None
    return value if end == len(tokens) else None


class _Unreadable(Exception):
    """The tokens are no arithmetic expression."""
