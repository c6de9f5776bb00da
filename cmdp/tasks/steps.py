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
FLOAT = Fraction(1, 10**9)  # relative error that a number printed by a program has
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
    (re.compile(r"(?<=[0-9]) and [($]{0,2}(?=[0-9]{1,9}/[0-9])"), " "),  # "1 and 1/4"
    (re.compile(r"\.(?=\s+[a-z(]|\s*[-+*/=])"), " "),  # an abbreviation: "600 sq. ft. * 2"
    (re.compile(r"^[ \t]*(?:[-*•+][ \t]|[0-9]{1,2}[.)][ \t])", re.MULTILINE), " ; "),  # an item of a list
]
_SPOKEN = re.compile(
    r"(?<![$0-9.,])[$0-9.,]{1,30}(?: (?:plus|minus|times|divided by) [$0-9.,]{1,30}){1,20} equals (?=[$0-9.])"
)
_SIGNS = {" plus ": " + ", " minus ": " - ", " times ": " * ", " divided by ": " / ", " equals ": " = "}
_TOKEN = re.compile(
    r"(?P<compound>[0-9]+%?-[A-Za-z]{2,}[A-Za-z-]*)"  # 5-minute
    r"|(?P<number>(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?:[ \u00a0\u202f][0-9]{3})+|0|[1-9][0-9]*)"
    r"(?:\.[0-9]+)?(?![0-9:]|,[0-9])|(?<![0-9])\.[0-9]+)"
    r"|(?P<unread>[0-9][0-9,.:]*[0-9]|[0-9]|√)"  # 007, 16,0000, 7:30
    r"|(?P<equals>(?<![<>!=])==?(?![>=])|≈|≅)"
    r"|(?P<times>[*×·∙⋅]|(?<![A-Za-z])[xX](?=\s*[$€£]?\s*[0-9(\[.]|\s+[A-Za-z]{2}))"
    r"|(?P<operator>[+/÷^−–-])"
    r"|(?P<open>[(\[])|(?P<close>[)\]])"
    r"|(?P<percent>%)"
    r"|(?P<currency>[$€£])"
    r"|(?P<word>[^\W\d_]+(?:['’&-][^\W\d_]+)*|[°¢])"
    r"|(?P<stop>\S)"
)
_SAME = {"÷": "/", "−": "-", "–": "-"}


def equations(text: str) -> list[Equation]:
    """The equations of a text that can be judged, calculator annotations (`<<48/2=24>>`) left out.

    A right side written with decimals may be rounded or cut: it holds within one unit of its last decimal. A whole
    number is exact, unless `≈` says that it is not. A percentage may stand for its number or for its hundredth. Only
    the first `LONGEST` characters are read.
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
    return _SPOKEN.sub(lambda match: re.sub("|".join(_SIGNS), lambda sign: _SIGNS[sign[0]], match[0]), text)


class _Token(NamedTuple):
    kind: str  # number, unread, operator, open, close, percent, word, stop, equals
    text: str
    start: int
    end: int


# Words that change the value of the number they stand by: what holds them is not judged
_QUANTITIES = {"half", "halve", "twice", "double", "dozen", "hundred", "thousand", "million", "billion", "pi"}
_SYMBOLS = set("amgshlL")  # an article, and units, where a space parts them from the number
# Words that no unit has, and that end a clause
_CLAUSES = {
    "because",
    "so",
    "is",
    "are",
    "was",
    "were",
    "since",
    "thus",
    "means",
    "then",
    "if",
    "which",
    "or",
    "and",
    "gives",
}


def _tokens(line: str) -> list[_Token]:
    tokens: list[_Token] = []
    for match in _TOKEN.finditer(line):
        kind, text = match.lastgroup, match[0]
        if kind == "times":
            kind, text = "operator", "*"
        elif kind == "operator":
            text = _SAME.get(text, text)
        elif kind == "compound":
            kind = "word"
        elif kind == "number":
            text = re.sub(r"[,\s]", "", text)
        if kind != "currency":
            tokens.append(_Token(kind, text, match.start(), match.end()))
    return tokens


def _of_line(tokens: list[_Token]) -> list[Equation]:
    """The equations of a line that can be judged; a chain a = b = c is two."""
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
        left = _left(segments[index])
        right = _right(segments[index + 1], last=index + 1 == len(signs))
        if left is None or right is None:
            continue
        (left, exact_left), (right, exact_right) = left, right
        is_amount = len(left) == 1 or (len(left) == 3 and left[1].text == "/" and abs(_value(left) or 0) < 1)
        if is_amount and not (exact_left and (exact_right or len(left) > 1)):
            continue  # "1 hour = 60 minutes", "1/2 dollar = 50 cents"
        found.append(Equation(_written(left), _written(right), _holds(left, right, sign)))
    return found


def _left(segment: list[_Token]) -> tuple[list[_Token], bool] | None:
    """The longest expression that ends the segment, and whether it is all there is; None where there is none, or it is
    part of something that is no arithmetic."""
    start = max([i + 1 for i, token in enumerate(segment) if token.kind == "stop"], default=0)
    phrase = _without_units(segment[max(start, len(segment) - WINDOW) :])
    for i, token in enumerate(phrase):
        before = phrase[i - 1] if i else None
        if before and before.kind != "word":  # it would be cut out of a longer one
            continue
        if before and token.kind == "open" and before.end == token.start:  # a function: f(2)
            continue
        if _continues(phrase, i):
            return None
        if token.text == "-" and not _is_sign(phrase, i):
            continue
        if _value(phrase[i:]) is not None:
            return phrase[i:], len(phrase[i:]) == len(segment)
    return None


def _is_sign(tokens: list[_Token], i: int) -> bool:
    """Whether the minus at `i` begins a number: it touches what follows it, and not what it follows."""
    touches_next = i + 1 < len(tokens) and tokens[i].end == tokens[i + 1].start
    return touches_next and not (i and tokens[i - 1].end == tokens[i].start)


def _continues(phrase: list[_Token], i: int) -> bool:
    """Whether the words before token `i` stand after an operator: "x - 5", "3 + another 5"."""
    while i and phrase[i - 1].kind == "word":
        i -= 1
    return i > 0 and phrase[i - 1].kind == "operator"


def _right(segment: list[_Token], last: bool) -> tuple[list[_Token], bool] | None:
    """The longest expression that begins the segment, and whether it is all there is: up to the first words, or in
    the middle of a chain all of the segment if that can be."""
    end = next((i for i, token in enumerate(segment) if token.kind == "stop"), len(segment))
    phrase = segment[: min(end, WINDOW)]
    if not last and end == len(segment):
        whole = _without_units(phrase)
        if _value(whole) is not None:
            return whole, len(whole) == len(segment)
    words = next((i for i, token in enumerate(phrase) if token.kind in ("word", "unread")), len(phrase))
    if words < len(phrase) and _is_variable(phrase, words, unit=words > 0 and phrase[words - 1].text == "/"):
        return None
    after = next((i for i in range(words, len(phrase)) if phrase[i].kind != "word"), None)
    if words and after and after > words and phrase[after].text in ("*", "/", "+", "^") and not _is_per(phrase, after):
        return None  # "8 bags * Y"
    if words and phrase[words - 1].kind == "operator":  # "12 / total" is no arithmetic; "12 - he" is, and a dash
        if not _is_per(phrase, words - 1) and (words == len(phrase) or phrase[words - 1].text != "-"):
            return None
        words -= 1
    for i in range(words, 0, -1):
        if _value(phrase[:i]) is not None:
            return (phrase[:i], i == end) if i == words or phrase[i].kind == "open" else None
    return None


def _is_per(tokens: list[_Token], i: int) -> bool:
    """Whether a unit is what the division sign at `i` divides by: "$3/apple"."""
    after = tokens[i + 1 : i + 2]
    return tokens[i].text == "/" and bool(after) and after[0].kind == "word" and not _is_variable(tokens, i + 1, True)


def _is_variable(tokens: list[_Token], i: int, unit: bool = False) -> bool:
    """Whether the word is a quantity or a part of one: "5x", "3 million"; what stands where a `unit` must is a unit."""
    word = tokens[i].text
    if len(word) > 1:
        return word.lower().rstrip("s") in _QUANTITIES
    is_attached = not unit and i > 0 and tokens[i - 1].end == tokens[i].start
    return word.isalpha() and (is_attached or word not in _SYMBOLS)


def _belong(words: set[str]) -> bool:
    return not words & _CLAUSES and all(word.islower() or word.endswith(("'s", "’s")) for word in words)


def _without_units(tokens: list[_Token]) -> list[_Token]:
    """The tokens without words that say what a number counts: those between it and an operator, a bracket or the end.

    "20% of 50" and "1/2 of 50" are products.
    """
    kept: list[_Token] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if _is_per(tokens, i):
            i += 2
            continue
        if token.kind != "word":
            kept.append(token)
            i += 1
            continue
        end = i
        while end < len(tokens) and tokens[end].kind == "word" and not _is_variable(tokens, end):
            end += 1
        words = {word.text for word in tokens[i:end]}
        after = tokens[end] if end < len(tokens) else None
        is_share = kept and (kept[-1].kind in ("percent", "close") or [t.text for t in kept[-2:-1]] == ["/"])
        if end == i:  # a variable
            kept.append(token)
            i += 1
        elif is_share and words == {"of"} and after and after.kind in ("number", "open"):
            kept.append(token._replace(kind="operator", text="*"))
            i = end
        elif (
            kept
            and kept[-1].kind in ("number", "percent", "close")
            and not words & _CLAUSES
            and (after is None or after.kind in ("operator", "close"))
        ):
            i = end
        elif kept and kept[-1].kind == "operator" and after and after.kind == "number" and _belong(words):
            i = end  # "5 + another 3", not "day 1 + Day 2"
        else:
            kept += tokens[i:end]
            i = end
    return kept


def _written(tokens: list[_Token]) -> str:
    return " ".join(token.text for token in tokens)


def _holds(left: list[_Token], right: list[_Token], sign: str) -> bool:
    decimals = max(len(token.text.partition(".")[2]) for token in right if token.kind == "number")
    unit = Fraction(1, 10**decimals) if decimals or sign in "≈≅" else Fraction(0)
    in_percent = right[-1].kind == "percent"
    for percent in (Fraction(1, 100), Fraction(1)):
        for percent_right in (Fraction(1, 100), Fraction(1)):
            a, b = _value(left, percent), _value(right, percent_right)
            within = unit * percent_right if in_percent else unit
            if a is not None and b is not None and (abs(a - b) < max(within, abs(b) * FLOAT) or a == b):
                return True
    return False


def _value(tokens: list[_Token], percent: Fraction = Fraction(1, 100)) -> Fraction | None:
    """The value of an expression, or None where it is not one, or divides by zero, or is too large."""
    if not tokens or len(tokens) > WINDOW:
        return None
    try:
        value, end = _sum(tokens, 0, percent, 0)
    except (_Unreadable, ZeroDivisionError):
        return None
    return value if end == len(tokens) else None


class _Unreadable(Exception):
    """The tokens are no arithmetic expression, or not one to compute."""


def _is(tokens: list[_Token], i: int, *texts: str) -> bool:
    return i < len(tokens) and tokens[i].text in texts


def _checked(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise _Unreadable
    return value


def _sum(tokens: list[_Token], i: int, percent: Fraction, depth: int) -> tuple[Fraction, int]:
    """sum := product (("+" | "-") product)*; returns its value and where it ends, as all of these do."""
    value, i = _product(tokens, i, percent, depth)
    while _is(tokens, i, "+", "-"):
        other, end = _product(tokens, i + 1, percent, depth)
        value, i = _checked(value + other if tokens[i].text == "+" else value - other), end
    return value, i


def _product(tokens: list[_Token], i: int, percent: Fraction, depth: int) -> tuple[Fraction, int]:
    """product := power (("*" | "/") power | "(" sum ")")*"""
    value, i = _power(tokens, i, percent, depth)
    while _is(tokens, i, "*", "/", "(", "["):
        by = tokens[i].text
        other, end = _power(tokens, i + (by in "*/"), percent, depth)
        if by == "/" and _is_tight_fraction(tokens, i):  # "60 / 3/4"
            under, end = _power(tokens, end + 1, percent, depth)
            other = other / under
        value, i = _checked(value / other if by == "/" else value * other), end
    return value, i


def _is_tight_fraction(tokens: list[_Token], i: int) -> bool:
    """Whether the division sign at `i` has a space after it, and what follows is a fraction without any."""
    over = tokens[i + 1 : i + 4]
    return (
        [token.kind for token in over] == ["number", "operator", "number"]
        and over[1].text == "/"
        and tokens[i].end < over[0].start
        and over[0].end == over[1].start
        and over[1].end == over[2].start
    )


def _power(tokens: list[_Token], i: int, percent: Fraction, depth: int) -> tuple[Fraction, int]:
    """power := operand ["^" operand]"""
    value, i = _operand(tokens, i, percent, depth)
    if _is(tokens, i, "^"):
        exponent, i = _operand(tokens, i + 1, percent, depth)
        if exponent.denominator != 1 or abs(exponent) > 60:
            raise _Unreadable
        value = _checked(value**exponent.numerator)
    return value, i


def _operand(tokens: list[_Token], i: int, percent: Fraction, depth: int) -> tuple[Fraction, int]:
    """operand := "-" operand | "(" sum ")" | number, each with "%" or not; "2 1/2" is a number"""
    if i >= len(tokens) or depth > DEPTH:
        raise _Unreadable
    token = tokens[i]
    if token.text == "-":
        value, i = _operand(tokens, i + 1, percent, depth + 1)
        return -value, i
    if token.kind == "open":
        value, i = _sum(tokens, i + 1, percent, depth + 1)
        if i >= len(tokens) or tokens[i].kind != "close":
            raise _Unreadable
    elif token.kind == "number":
        if len(token.text) > 30:
            raise _Unreadable
        value = Fraction(token.text)
        mixed = tokens[i + 1 : i + 4]
        if [t.kind for t in mixed] == ["number", "operator", "number"] and mixed[1].text == "/":
            value += Fraction(mixed[0].text) / Fraction(mixed[2].text)
            i += 3
    else:
        raise _Unreadable
    i += 1
    if _is(tokens, i, "%"):
        return value * percent, i + 1
    return value, i
