"""Final answers in the text of a language model: find the last one, and compare it with the reference answer.

An answer stands after `####`, in `\\boxed{}`, or after "the answer is". Numbers are compared exactly, as fractions; a
number followed by anything but a unit is not read. Everything else (sets, intervals, expressions) goes to math-verify.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from cmdp.tasks.verifier import verifier

LONGEST = 400  # characters of an answer

_TAG = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning|scratchpad) ?\|?[>\]▷]"
THOUGHT = re.compile(rf"[<\[◁]\|? ?(?:begin_of_)?{_TAG}|<\|channel\|>analysis", re.I)
THOUGHT_END = re.compile(rf"[<\[◁](?:/ ?|\|end_of_){_TAG}|<\|channel\|>final", re.I)
_MARK = re.compile(r"####|\\(?:boxed|fbox)(?![A-Za-z])\s*\{?")
_SAID = re.compile(r"\banswer(?: to (?:the|this|your) \w+)?[\s*]{0,9}(?:is|:|=)|^[#* ]*final answer[* ]*$", 10)  # I, M
_LABEL = re.compile(r"(?:[\s:=*]|\$\$|\\\[)*(?:(?:the |my )?(?:final )?answer\b(?: is)?(?:[\s:=*]|\$\$|\\\[)*)?", re.I)
_HEADING = re.compile(  # "#### Step 2" with more text below
    r"[ *]*(?:[0-9]{1,2}[.):] +)?(?!(?:the |my )?(?:final )?answer|[A-Z]{2,3} ?[0-9])[A-Z]{2,}.{0,200}\n\s*\S", re.I
)
_SENTENCE_END = re.compile(r"(?<!Rs)\.(?=\s|$)|;|,?\s(?:because|since|which|so|as|where|thus|hence|I)\b")
_SIGNS = {"−": "-", "–": "-", "⁄": "/", "÷": "/", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty "}
_SIGNS |= {"≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "∩": "\\cap ", "°": "^\\circ ", "√": "\\sqrt "}
_CURRENCY = r"[$£¥€\u20a0-\u20c0]"
_REWRITES = [
    (r"(?<!\\)\$+([^$]*)(?<!\\)\$+|(?<!\\)\\[()\[\]]", r"\1"),  # math delimiters
    (r"(?<![\w)])\*\*([^*]+)\*\*(?![\w(])|\*\*(?= [A-Za-z])", r"\1"),  # bold
    (r"(?<!\\)\\(?:(?:left|right|displaystyle|rm|bf|it)(?![A-Za-z])|! *|(?:text)?color\s*\{\w*\})", ""),
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z]))|~|\s+", " "),
    (r"\{\s*,\s*\}", ","),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:math(?:rm|it|bf)|operatorname)\s*\{\s*([A-Za-z])\s*\}", r" \1"),
    (r"\\(?:math(?:rm|it|bf)|text(?:rm|bf|it|normal)?|[mh]box|operatorname)\s*\{", r"\\text{"),
    (r",?\s*\\text\{\s*(?:and|or)\s*\}", ","),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])", r"\\text{ degree }"),
    (r"\\text\{\s*([0-9][0-9.,]*)\s*\}|^\s*(?:\\text(?=\{\s*[0-9]))?\{([^{}]*)\}\s*$|\\(?=[$%#&])", r"\1\2"),
    (r"\\sqrt(\[\w\] *| +)([0-9]+|[A-Za-z])", r"\\sqrt\1{\2}"),
    (rf"^\s*([+-]?) *({_CURRENCY}|(?:US\$|[A-Z]{{3}}|Rs\.?)(?=[ 0-9])) *([+-]?\.?[0-9].*)", r"\1\3 \2"),
    (r"  +", " "),
]
_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"([-+]?) ?(?:({_DECIMAL})(?: and)? (?={_DECIMAL} ?/))?({_DECIMAL})(?: ?/ ?({_DECIMAL})|[eE]([-+]?[0-9]{{1,2}}))?"
)
_FRACTION = re.compile(r"\\frac ?(?:\{ ?(-?)([0-9,.]+) ?\}|([0-9])) ?(?:\{ ?([0-9,.]+) ?\}|([0-9]))")
_REPEATING = re.compile(r"([-+]?)([0-9]*)\.([0-9]*)\\overline ?\{([0-9]+)\}")
_QUANTITY = re.compile(  # a core, and then only words
    r"(?P<core>(?!\\text).*?(?:[0-9)}\]]|\\pi|(?= ?\\text)))"
    rf"(?P<words>(?:\\text\{{[^{{}}^]*\}}|{_CURRENCY}|[A-Za-z'.,/() %¢-]|(?<=[A-Za-z}}])\^(?:[23]|\{{[23]\}}))*)"
)
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNITS = """cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|m meter metre|in inche inch|l liter
    |ft foot feet|mi mile|g gram|kg kilogram|lb pound|oz ounce|h hr hour|min minute|s sec second|am|pm|deg degree
    |% percent percentage|cent ¢|$ dollar usd|€ euro eur|£ gbp|₹ rs rupee inr|2 square sq|3 cubic cu|ml|mph|¥|₱"""
_SAME_UNIT = {word: words.split()[0] for words in _UNITS.split("|") for word in words.split()}
NUMBER_WORDS = (  # that change the number beside them
    r"plus|minus|times|squared|cubed|root|factorial|mod|modulo|choose|divided|multiplied|remainder|r(?!s)|zero|one|two"
    r"|half|halve|third|quarter|(?:three|four|fif|five|six|seven|eigh|eight|ni?ne?|ten|eleven|twelve|twelf|hundred"
    r"|thousand|\w+illion)(?:th)?|(?:twen|thir|four|for|fif|six|seven|eigh|nine)t(?:y|een|ieth|eenth)|lakh|crore|myriad"
    r"|dozen|score|gross|pair|couple|grand|double|twice|thrice|triple|fold|negative"
)
_NOT_UNITS = re.compile(  # these, and words that go on or deny
    rf"^ *and\b|\b(?:{NUMBER_WORDS}|or|but|not|no|over|by|power|pi|sqrt|log|base|bn|mn|mill?|ish|below|under|to|through"
    r"|until|versus|except|without|if|is|was|are|were|isn|would|could|should|might|inverse|wrong|incorrect|raised)s?\b"
)


def extract(completion: str) -> str | None:
    """The last answer that the completion states, tidied, or None: after `####` (unless that begins a heading) or in
    `\\boxed{}`, wherever one is, else after "the answer is". Thoughts (`<think>...</think>`) and all but the last
    50,000 characters are left out."""
    text = THOUGHT.split(THOUGHT_END.split(completion)[-1], maxsplit=1)[0][-50_000:]
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
    answer = re.sub("[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), answer)
    answer = answer.translate(str.maketrans(_SIGNS))
    for pattern, replacement in _REWRITES:
        answer = re.sub(pattern, replacement, answer)
    return answer.strip(" *`,:;").rstrip(" *`.,:;")


def number(text: str) -> Fraction | None:
    """The value of "-1,234.50", "1e3", "3/4", "2 3/4", "2\\frac{3}{4}" or "0.\\overline{3}"; None of anything else."""
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, period = match.groups()
        under = (10 ** len(period) - 1) * 10 ** len(fixed)
        text = f"{sign}{int(whole + fixed + period) - int(f'0{whole}{fixed}')}/{under}"
    match = _NUMBER.fullmatch(_FRACTION.sub(r" \1\2\3/\4\5", text).strip())
    if match is None:
        return None
    sign, whole, over, under, exponent = (part and part.replace(",", "") for part in match.groups())
    if Fraction(under or 1) == 0:
        return None
    value = (Fraction(whole or 0) + Fraction(over) / Fraction(under or 1)) * Fraction(10) ** int(exponent or 0)
    return -value if sign == "-" else value


def is_correct(completion: str, answer: str) -> bool:
    """Whether the last answer that the completion states is `answer`. Never raises on a completion, and takes bounded
    time: milliseconds, or a second of processor time and the start of a process.

    Numbers are equal when their values are; a percentage stands for its number or its hundredth. Units are compared
    where both answers have them. Anything else is equal when math-verify says so."""
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
    (core, scale, units), (other, other_scale, other_units) = map(_quantity, (given, right))
    if units and other_units and units != other_units:
        return False
    a, b = number(core), number(other)
    if a is not None and b is not None:
        a, b = a * scale, b * other_scale
        return a == b or a == b * Fraction(100) ** (("%" in units) - ("%" in other_units))
    if scale != other_scale or "%" in units | other_units:
        return False
    return core == other or verifier.verify(core, other)


def _plain(text: str) -> str:
    """A short form: braces about one character left out, and words without `\\text` in lower case."""
    text = re.sub(r"([_^]) ?\{(\w)\}", r"\1\2", text)
    words = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text).strip(" ().")
    return text if not re.fullmatch(r"[A-Za-z .'-]+", words) else words.casefold() if len(words) > 2 else words


def _quantity(text: str) -> tuple[str, int, frozenset[str]]:
    """An answer's core, scale (thousand, ...) and units; all of it as core where what follows a number is no unit."""
    nothing = text, 1, frozenset()
    if (match := _QUANTITY.fullmatch(text)) is None:
        return nothing
    tail = re.sub(r"\\text|\.", "", match["words"]).lower().replace("per cent", "%")
    words = [re.sub("(?<=..)s$", "", word) for word in re.findall(r"[a-z-]+|[^\sa-z',/(){}^-]", tail)]
    attached = tail[:1].isalpha() and not match["words"].startswith("\\")
    if (not words and tail.strip()) or (attached and (words[0] not in _SAME_UNIT or len(words[0]) < 2)):
        return nothing
    scale = 1
    while words and words[0] in _SCALES:
        scale *= _SCALES[words[0]]
        tail = tail.replace(words.pop(0), "", 1)
    letters = {w for i, w in enumerate(words) if len(w) < 2 and not (w in "acf" if i else w == "a" != words[-1])}
    if _NOT_UNITS.search(tail) or re.search(r"\bMM?\b", match["words"]) or letters - _SAME_UNIT.keys():
        return nothing
    return match["core"].strip(), scale, frozenset(_SAME_UNIT.get(word, word) for word in words)
