"""The step checker: what it reads in a text as an equation, and whether that holds."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp.tasks.steps import LONGEST, annotations, coverage, equations, without_annotations


def verdicts(text: str) -> list[bool]:
    return [equation.holds for equation in equations(text)]


@pytest.mark.parametrize(
    "text",
    [
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.",
        "48 / 2 = 24",
        "She pays $5 * 3 = $15.",
        "She pays 5 x $3 = $15, and that is all",
        "1,200 + 34.5 = 1,234.5",
        "(4 + 2) ÷ 3 = 2",
        "2(3 + 4) = 14",
        "[2 + 3] * 2 = 10",
        "20% * 50 = 10",
        "20% of 50 = 10",
        "20 % of 50 = 10",
        "2 / 3 = 67%",
        "1/4 of 60 = 15",
        "100% - 20% = 80%",
        "20 / 240 = 8.33%",
        "10 / 3 = 3.33",
        "20 / 3 = 6.67",
        "20 / 3 = 6.66",
        "10 / 3 ≈ 3",
        "-3 + 5 = 2",
        "5 * -2 = -10",
        "2^3 = 8",
        "2**3 = 8",
        "5 + 1 1/2 = 6.5",
        "60 / 3/4 = 80",
        "\\frac{1}{2} \\times 48 = 24",
        "\\( 48 \\div 2 = 24 \\text{ clips} \\)",
        "- 5 + 3 = 8",  # an item of a list
        "2. 5 + 3 = 8",
        "**5 + 3 = 8**",
        "60% are adults because 100 - 40 = 60",
        "a 5-minute pause and 2 * 3 = 6",
        "It is what remains, so that's 2 * 3 = 6 each",
        "A total of 5 + 3 = 8",
        "(5 + 3 = 8)",
        "$5.00*3=$15/box",
        "5 + 3 = 8 (with transport)",
        "-2^2 = -4",
        "2^3^2 = 512",
        "10^-2 = 0.01",
        "3^{2} -5 = 4",
        "1{,}200 - 200 = 1{,}000",
        "\\frac12 \\cdot 4 = 2",
        "1/2 = 50%",
        "10 / 4 = 2 1/2",
        "2 / 3 = 0.666",
        "2 / 3 = 0.667",
        "19 / 3 ≈ 6",
        "48 * 0.3333333333333333 = 16",  # printed by a program
        "0.1 + 0.2 = 0.30000000000000004",
    ],
)
def test_right_equations_are_read_and_hold(text):
    assert verdicts(text) == [True]


@pytest.mark.parametrize(
    "text",
    [
        "48 / 2 = 25",
        "48 / 2 = <<48/2=24>>25 clips",
        "10 - 2 + 3 = 5",  # no part of it will do
        "10 / 3 = 3",  # a whole number is exact
        "5 * 3 = $15.01",
        "20 / 3 = 6.65",
        "100% - 20% = 90%",
        "2(3 + 4) = 10",
        "5 + 3 = 8 + 2",
        "5 + 3 = -8",
        "20 + 2 = 23 (with transport)",
        "-2^2 = 4",
        "24+48 = \\boxed{73}",
        "10 / 3 = 3.34",
        "1.2 + 1.24 = 2.5",
        "19 / 3 ≈ 7",
        "20% of 50 = 11",
        "15 / 60 = 0.26%",
        "1 / 3 = 34%",
        "She pays 5 * 3 = $16, and that is all",
        "3 + 4 = 8; fine",
        "100 / 0.3 = 333.3334",
    ],
)
def test_wrong_equations_are_read_and_do_not_hold(text):
    assert verdicts(text) == [False]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no numbers",
        "x = 5",
        "2x = 10",
        "2x - 3 = 11",
        "x + 2 = 5",
        "5 + 3 = x",
        "5 * 4 = 2x",
        "1 hour = 60 minutes",
        "1/2 dollar = 50 cents",
        "3 million + 4 = 3,000,004",
        "the rest - 5 = 8",
        "6:00 + 18 = 24:00",
        "√(144) = 12",
        "f(2) = 7",
        "5 + 3 >= 9",
        "5 + 3 != 9",
        "1/0 = 5",
        "5 + = 5",
        "= 5",
        "5 =",
        "- = -",
        "16,0000/10 = 16000",
        "0900 - 0130 = 0730",
        "21/7 = 90/x",
        "3 * 30 = 30 + M trees",
        # units within
        "2 pizzas × 8 slices/pizza = 16 slices",
        "12 apples + his 4 pears = 16 pieces of fruit",
        "600 sq. ft. * 2 = 1200 sq. ft.",
        "70/month * 2 = 150/month",
        "2 hours + 30 minutes = 150 minutes",
        "3 * 7 days = 3 weeks",
        "$0.25/glass x 10 glasses = 250 cents",
        "0.25 * 10 = 250 cents",
        "10 am + 3 hours = 1 pm",
        "5 ft 6 in + 2 in = 5 ft 8 in",
        "1 hour 30 minutes + 45 minutes = 2 hours 15 minutes",
        # what follows changes the right side
        "17 / 5 = 3 remainder 2",
        "17 / 5 = 3 R2",
        "17 / 5 = 3 with 2 left over",
        "100 stickers / 3 friends = 33 stickers for each friend, with 1 remaining.",
        "150 / 60 = 2 hours 30 minutes",
        "10 / 4 = 2 and a half",
        "100 / 6 = 16 and (2/3)",
        "100 * 50 = 5 thousand",
        "12 * 5 = 14 (mod 23)",
        "2 * 5 = 4²",
        "10 / 4 = 2½",
        "1/3 = 0.33…",
        "5 + 3 = 8!",
        "60 / 4 = 3:5",
        "10 - 3 = 4 boxes * 2",
        "100 / 3 = 33 each, leaving 1",
        "17 ÷ 5 = 3, remainder 2",
        "17 / 5 = 3 full boxes and 2 extra",
        "17 / 5 = 3 (rounded down)",
        "150 / 60 = 2 hours with 30 minutes",
        "150 / 60 = 2 hours and a half",
        "5 * 1,000,000 = 5 M",
        "5 * 1000 = 5 grand",
        "5 + 3 = 11 in base 7",
        # what stands before changes the left side
        "5 squared + 3 = 28",
        "50 * 20 percent = 10",
        "half of 10 + 3 = 8",
        "2 thirds * 9 = 6",
        "17 mod 5 + 1 = 3",
        "5 choose 2 + 1 = 11",
        "10 minus 3 + 1 = 8",
        "twice 5 + 3 = 13",
        "thrice 5 + 3 = 18",
        "the square root of 16 + 1 = 5",
        "1 and 1/4 * 4 = 5",
        "two and 1/4 * 4 = 9",
        "the difference between 10 and 3 - 1 = 7",
        "10 take away 3 + 1 = 8",
        "the average of 5 + 7 = 6",
        "chapters 2-4 = 90",
        "50 + 20% = 60",
        "120 - 15% = 102",
        "7 // 2 = 3",
        "C(5,2) + 1 = 11",
        "1e3 + 5 = 1005",
        "a_1 + 3 = 5",
        "\\log_{2} 8 + 1 = 4",
        "\\sqrt 9 + 1 = 4",
        "3² + 4² = 25",
        "2½ * 10 = 25",
        "3.5e2 + 50 = 400",
        "80 000 x 20/100 = 16 000",
        "5! + 3 = 123",
        "|-5| + 3 = 8",
        "17 % 5 = 2",
        ".8 + . 84 + .82 = 2.46",
        "Step 1 - 5 + 3 = 8",
        "Lot 1 - 5 + 3 = 8",
        "Subtract Weeks 3-4 from Weeks 1-2 = 96",
        "1st day + 2nd day = 30 + 20",
        "$80,000 (purchase) + $50,000 (repairs) = $140,000 total invested",
        # a percent sign on one side alone
        "20% of 50 = 1000",
        "15 / 60 = 0.25%",
        "100 - 20 = 80%",
        "50% + 20% = 70",
    ],
)
def test_what_is_not_arithmetic_is_not_judged(text):
    assert verdicts(text) == []


def test_a_chain_is_judged_link_by_link():
    assert verdicts("2 * 3 + 1 = 6 + 1 = 7 apples") == [True, True]
    assert verdicts("2 * 3 + 1 = 6 + 2 = 8") == [False, True]
    assert verdicts("5+3 = 8 = 9") == [True, False]
    assert verdicts("x = 5+3 = 8") == [True]
    assert verdicts("Subtract Weeks 3-4 from Weeks 1-2 = 96 - 70 = 26") == [True]
    assert verdicts("This leaves 3/3 - 2/3 = 1/3 of $150 = $50") == [True]
    assert verdicts("(5/4)x\n200(4/5)=160=x apples") == [True]


def test_it_says_how_much_it_reads():
    assert coverage("5 + 3 = 8, half of 10 + 3 = 8 and x = 5.\n2 apples + 1 = 3 apples = 3.") == (1, 4)
    assert coverage("48/2 = <<48/2=24>>24 clips.\n30 >= 24") == (1, 0)
    assert coverage("no numbers") == (0, 0)


def test_annotations_are_judged_apart_from_the_text():
    text = "48/2 = <<48/2=24>>24, 5+3 = <<5+3=9>>8 <<x>> and 5-1 = <<+5-1=4>>4"
    found = annotations(text)
    assert [e if isinstance(e, str) else e.holds for e in found] == [True, False, "x", "+5-1=4"]
    assert without_annotations(text) == "48/2 = 24, 5+3 = 8  and 5-1 = 4"
    assert verdicts(text) == [True, True, True]


def expressions() -> st.SearchStrategy[tuple[str, Fraction]]:
    """Texts with their values, which Fraction's own operators gave: no parser is involved."""

    def join(left, operator, right):
        (a, x), (b, y) = left, right
        if operator == "/" and y == 0:
            operator = "+"
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else 0}[operator]
        return f"({a} {operator} {b})", Fraction(value)

    leaves = st.integers(0, 99).map(lambda n: (str(n), Fraction(n)))
    return st.recursive(leaves, lambda inner: st.builds(join, inner, st.sampled_from("+-*/"), inner), max_leaves=8)


@given(expressions(), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_values_are_those_of_exact_arithmetic(expression, off):
    text, value = expression
    if max(abs(value.numerator), value.denominator) > 10**12 or not text.startswith("("):
        return
    result = f"{value.numerator} / {value.denominator}"
    assert verdicts(f"{text[1:-1]} = {result}") == [True]
    assert verdicts(f"{text[1:-1]} = {result} + {off}") == [False]


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.sampled_from("+-*"), st.sampled_from("+-*"))
def test_precedence_is_pythons(a, b, c, first, second):
    apply = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}
    right_first = second == "*" and first != "*"
    value = apply[first](a, b * c) if right_first else apply[second](apply[first](a, b), c)
    assert verdicts(f"{a} {first} {b} {second} {c} = {value}") == [True]


@given(st.text(alphabet="0123456789+-*/=()%$.,x^ \n≈<>abof", max_size=60))
@settings(max_examples=400, deadline=None)
def test_no_text_makes_it_raise(text):
    equations(text)
    annotations(text)


@pytest.mark.parametrize(
    "text",
    [
        "9^9^9^9 = 1",
        "9^(9^9) = 1",
        "9^60*9^60 = 1",
        "(" * 5000 + "1" + ")" * 5000 + " = 1",
        "9" * 19_000 + " = 1",
        "1+" * 9000 + "1 = 1",
        "1=" * 10_000,
        "1 + 1 = 2\n" * 2000,
        "\n" * 20_000,
        ". " * 10_000,
        "1 plus " * 3000,
        "word " * 4000 + "= 5",
        "\\frac{" * 3000,
        "1,111" * 4000 + " = 1",
        "٣ + ٤ = ٧",
        "5 + 3 = 8\x00",
        "1" * 19_000 + "a = 5",
        "5 + 3 = " + "1" * 19_000 + "a",
        "5 + 3 = 8 a " + "1 " * 9_000,
        "5 + 3 = 8 apples " + "1" * 19_000,
        "1" * 9_000 + " a" * 5_000 + " 5 + 3 = 8",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_hostile_texts_take_bounded_time(text):
    start = time.perf_counter()
    equations(text)
    annotations(text * 100)
    assert time.perf_counter() - start < 4.0


def test_only_so_much_of_a_text_is_read():
    assert equations(" " * LONGEST + "1 + 1 = 3") == []
