"""Check a worked solution: recompute its equations between numbers, and abstain from everything else.

    Natalia sold 48/2 = 24 clips in May, so 48 + 24 = 72 altogether.

Read are calculator annotations (`<<48/2=24>>`) and equations wholly of numbers, + - * / ^ × ÷ ( ) and %, where no word
beside them ("half of 10 + 3", "= 3 remainder 2") may change them. Values are exact. A right side with k decimals is the
left one rounded or cut to k decimals; a whole number is exact, unless it is a percentage or the sign is ≈.
"""

import ast
import re
from fractions import Fraction
from operator import add, mul, sub, truediv
from typing import NamedTuple

from cmdp.tasks.answers import NUMBER_WORDS

LONGEST = 20_000  # characters of a text that are read
LARGEST = 200  # characters of an expression; bits of a numerator or denominator


class Equation(NamedTuple):
    """An equation as it was read, `left` = `right`, and whether it holds."""

    left: str
    right: str
    holds: bool


_ANNOTATION = re.compile(r"<<([^<>]{0,400})>>")
_REWRITES = [  # LaTeX and Markdown
    (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\\approx(?![A-Za-z])", "≈"),
    (r"\\[dt]?frac *\{([^{}]{1,60})\} *\{([^{}]{1,60})\}", r"((\1)/(\2))"),
    (r"\\[dt]?frac *([0-9])([0-9])", r"(\1/\2)"),
    (r"\\(?:text|mathrm|mbox|textbf|boxed) *\{([^{}]{0,60})\}", r" \1 "),
    (r"\{,\}", ","),
    (r"\^ *\{(-?[0-9]{1,9})\}", r"^(\1)"),
    (r"\\(?:left|right|quad|qquad)(?![A-Za-z])|\\[][(),;! ]|\\(?=[%$&#])", " "),
    (r"(?<=[0-9)])\*\*(?=[0-9(])", "^"),
    (r"\*\*|__|[&`]", " "),
    (r"(?m)^[ \t]*(?:[-*•+][ \t]|[0-9]{1,2}[.)][ \t])", ""),  # an item of a list
    (r"(?<=[0-9)%])[ \t]*[xX][ \t]*(?=[$0-9(.])", " * "),
    (r"(/\(*[0-9]+\)*|[0-9] ?%) of (?=[$0-9(])", r"\1 ⊗ "),  # 1/4 of 60, 20% of 50
]
_PLAIN = str.maketrans("−–×·∙⋅÷≅[]", "--****/≈()", "$€£")
_RUN = "0123456789.,+*/^()%- \t\u00a0\u202f"  # what an expression is made of
_SIGN = re.compile(r"((?<![<>!=:~])={1,2}(?![=>])|≈)")
_NUMBER = r"(?<![0-9.,])(?:(?:0|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]*)(?:\.[0-9]+)?|\.[0-9]+)(?![0-9.,])"
_EXPRESSION = re.compile(rf"(?:{_NUMBER} ?%?|[-+*/^()\s])+")
_CHANGES = rf"{NUMBER_WORDS}|per ?cent|cents?|¢|point|am|pm|a\.m|p\.m|o'clock"
_BEFORE = re.compile(  # what an equation may not follow: an operator in words, a label, a word number
    rf"(?i)[0-9]\S*\s+(?!and$)[^\W\d]+$|(?<!total )(?<!sum )(?<!cost )(?<!amount )\bof$|(?<![\w'’])(?:{_CHANGES}"
    r"|[b-hj-z]|by|per|over|than|to|from|less|more|(?:an)?other|additional|extra|step|phase|round|method|option|day"
    r"|week|month|year|part|no|number|question|problem|case|page|chapter|grade|room|level|away|average|mean|log|ln|sin"
    r"|cos|tan|sqrt|max|min|gcd|(?:one|two|half) and)s?$"
)
_AFTER = re.compile(  # what may not follow it: such a word, "and a half", another quantity, a remainder
    rf"(?i)\s*(?:{_CHANGES}|(?-i:MM?))s?\b|\s*[b-fi-kn-rt-z](?:\b| ?[0-9])"
    r"|\s*(?:\w+\s+)?and\s+(?:an?\b|one\b|half|\(?[0-9]+ ?/)|\s*[a-z]+\.?,?\s+(?:(?:and|with|plus)\s+)?[0-9.,]+\s*[a-z]"
    r"|[^.;!?=]*(?:\b(?:remainder|mod|modulo|rounded|base)\b|[0-9]+( \w+)? (?:remain|left|extra)|left ?over|leaving)"
)
_CLAUSE = re.compile(r"[.;:!?=]|,\s|\b(?:and|so|then|because|since|which|but)\b")
_OPERATOR = re.compile(r"[+*⊗^<>\\{}_|√=]|\s/|/\s|\s-\s*[0-9(]|-\s")
_CLAUSE_START = re.compile(r"[.;:!?=(\"—]\s*|,\s")
_OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Pow: pow}


def equations(text: str) -> list[Equation]:
    """The equations that are read in the first `LONGEST` characters of a text, annotations left out."""
    return list(filter(None, _equations(without_annotations(text[:LONGEST]))))


def annotations(text: str) -> list[Equation | str]:
    """The calculator annotations of a text: each as its equations, or as it stands where it cannot be read."""
    found = [(_equations(inside), inside) for inside in _ANNOTATION.findall(text[:LONGEST])]
    return [one for read, inside in found for one in (read if read and None not in read else [inside])]


def without_annotations(text: str) -> str:
    """The text as a reader sees it: "48/2 = <<48/2=24>>24" is "48/2 = 24"."""
    return _ANNOTATION.sub("", text)


def coverage(text: str) -> tuple[int, int]:
    """How many equations of a text without its annotations are (read, unread), by signs `=` and `≈`."""
    found = _equations(without_annotations(text[:LONGEST]))
    return len(found) - found.count(None), found.count(None)


def _equations(text: str) -> list[Equation | None]:
    """One per sign, None where it is not read. A chain a = b = c is two."""
    for pattern, plain in _REWRITES:
        text = re.sub(pattern, plain, text)
    found = []
    for line in text.translate(_PLAIN).split("\n"):
        parts = _SIGN.split(line)
        for i in range(1, len(parts), 2):
            left, right = _left(parts[i - 1], is_first=i == 1), _right(parts[i + 1])
            holds = _holds(left, right, parts[i]) if left and right else None
            found.append(None if holds is None else Equation(left, right, holds))
    return found


def _left(segment: str, is_first: bool) -> str | None:
    """The expression that ends the segment; None where there is none, or the text before may be a part of it."""
    before = segment.rstrip(_RUN + "⊗")
    run = segment[len(before) :]
    *cut, expression = re.split(r"[.,](?=\s)|(?<=\D)\.(?=\D)", run)  # a sentence or a list ends
    gap = bool(cut) or expression[:1].isspace() or not before
    expression = expression.strip().replace("⊗", "*")
    while expression.startswith("(") and expression.count("(") > expression.count(")"):
        before, expression, gap = before + "(", expression[1:].strip(), True
    is_alone = not re.search(r"[0-9)%]\s*[-+*/^(]", expression)  # a number, which is read in the middle of a chain
    clause = "" if cut else _CLAUSE_START.split(before[-300:])[-1].rstrip()
    if (
        (is_alone and (is_first or cut or before.strip()))
        or (cut and re.search(r"[-+*/^(]\s*$", cut[-1]))
        or re.match(r"[+*/^)]|-\s", expression)
        or (clause and expression.startswith("-"))
    ):
        return None
    if not clause:
        return expression if gap or (before[-1] in ":;(" and not before[-2:-1].isdigit()) else None
    is_label = re.search(r"\b[A-Z]\w*$", clause) and re.match(r"[0-9]+\s*-", expression)  # "Lot 1 - 5 + 3"
    is_sum = re.search(r"[0-9] +and$", clause) and (is_first or re.match(r"[0-9]+ ?/", expression))  # "1 and 1/4 * 4"
    changes = is_label or is_sum or _BEFORE.search(clause) or _OPERATOR.search(clause)
    return expression if gap and clause[-1].isalpha() and not changes else None


def _right(segment: str) -> str | None:
    """The expression that begins the segment; None where there is none, or what follows may change it."""
    run = segment[: len(segment) - len(segment.lstrip(_RUN))]
    end = re.search(r"[.,](?=\s|$)|(?<=[0-9%)])\s+\(|$", run).start()
    expression, after = run[:end].strip(), segment[end : end + 300]
    if end == len(run) and after and not run[-1:].isspace():  # what touches it
        if expression.endswith("/") and after[0].isalpha():  # "$3/apple"
            expression = expression[:-1]
        elif after[0] not in ".,;:?)\"'—" or after[1:2].isdigit():
            return None
    while expression.endswith(")") and expression.count(")") > expression.count("("):
        expression = expression[:-1].strip()
    return None if _AFTER.match(after) or _OPERATOR.search(_CLAUSE.split(after, maxsplit=1)[0]) else expression


def _holds(left: str, right: str, sign: str) -> bool | None:
    """Whether the equation holds; None where a side is no expression, or a percent sign is missing from one side."""
    if re.search(r"[+-] *[0-9.,]+ ?%", left) and re.search(r"[0-9](?![0-9.,]| ?%)", left):
        return None  # "50 + 20%"
    decimals = max((len(part) for part in re.findall(r"\.([0-9]+)", right)), default=0)
    error = Fraction(1, 10**9) if re.search(r"\.[0-9]{10}", left + right) else 0  # relative, of a program's numbers
    for percent in (Fraction(1, 100), Fraction(1)):
        a, b = _value(left, percent), _value(right, percent)
        if a is None or b is None:
            return None
        last = Fraction(1, 10**decimals) * (percent if right.endswith("%") else 1)  # a unit of the last decimal
        is_close = a * b >= 0 and -last / 2 <= abs(a) - abs(b) < last
        if abs(a - b) <= error * abs(b) or (is_close and (decimals or sign == "≈" or right.endswith("%"))):
            return True if percent != 1 else None
        if ("%" in left) == ("%" in right):
            break
    return False


def _value(expression: str, percent: Fraction) -> Fraction | None:
    """The value of an expression, or None where it is not one, divides by zero, or is too large."""
    if len(expression) > LARGEST or not _EXPRESSION.fullmatch(expression):
        return None

    def exact(match: re.Match) -> str:
        value = Fraction(match[0].rstrip("% ").replace(",", ""))
        return f"({value * percent if match[0].endswith('%') else value})"

    text = re.sub(r"(?<![0-9.,/])([0-9]+) ([0-9]+/[0-9]+)(?![0-9.,])", r"(\1+\2)", expression)  # 2 1/2
    text = re.sub(r"/\s+([0-9]+/[0-9]+)(?![0-9.,/])", r"/ (\1)", text)  # 60 / 3/4
    text = re.sub(rf"{_NUMBER}(?: ?%)?", exact, re.sub(r"(?<=[0-9%)])\(", "*(", text)).replace("^", "**")
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    """The value of a parsed expression. Raises where it is anything but arithmetic of bounded size."""
    match node:
        case ast.Constant():
            return Fraction(node.value)
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluate(node.operand)
        case ast.BinOp():
            a, b = _evaluate(node.left), _evaluate(node.right)
            if not isinstance(node.op, ast.Pow) or (b.denominator == 1 and abs(b) <= 60):
                value = _OPERATORS[type(node.op)](a, b)
                if max(map(int.bit_length, value.as_integer_ratio())) <= LARGEST:
                    return value
    raise ValueError("no arithmetic, or too large")
