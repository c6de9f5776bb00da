"""Final answers: found in text, compared, and hostile ones survived."""

import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp.tasks.answers import extract, is_correct, number
from cmdp.tasks.verifier import verifier

SLOWEST = 15.0  # seconds: 1 of processor time and the start of a process, on a machine that does other things too


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so #### 18", "18"),
        ("####18\n\n", "18"),
        ("#### **18**", "18"),
        ("#### $1,234.50.", "1234.5"),
        ("#### \\$18", "18"),
        ("#### 18 dollars", "18"),
        ("#### $18/hour", "18"),
        ("#### £18", "18"),
        ("#### 18€", "18"),
        ("#### -3", "-3"),
        ("#### −3", "-3"),
        ("#### 50%", "50"),
        ("#### 50%", "0.5"),
        ("#### 1/2", "0.5"),
        ("#### 3 1/2", "3.5"),
        ("#### .5", "1/2"),
        ("#### 1\nno: #### 18", "18"),
        ("#### \\boxed{18}", "18"),
        ("The answer is $18.", "18"),
        ("The final answer is: 18. I hope so.", "18"),
        ("**Answer:** 18", "18"),
        ("#### 18\nThe answer is clear", "18"),
        ("\\boxed{18} or so", "18"),
        ("\\boxed{1} and \\boxed{18}", "18"),
        ("\\boxed{10,080}", "10080"),
        ("\\boxed{\\dfrac{1}{2}}", "\\frac12"),
        ("\\boxed{3\\frac{1}{2}}", "7/2"),
        ("\\boxed{-\\frac{3}{4}}", "-0.75"),
        ("\\boxed{\\frac{\\sqrt{3}}{2}}", "\\frac{\\sqrt3}{2}"),
        ("\\boxed{x^2+2x+1}", "(x+1)^2"),
        ("\\boxed{(1,2)}", "(1, 2)"),
        ("\\boxed{[0,\\infty)}", "[0, \\infty)"),
        ("\\boxed{\\{1,2\\}}", "\\{2,1\\}"),
        ("\\boxed{\\text{Evelyn}}", "Evelyn"),
        ("\\boxed{5\\text{ cm}}", "5"),
        ("\\boxed{90^\\circ}", "90"),
        ("\\boxed{x=3}", "3"),
        ("\\boxed{6 - 5i}", "6-5i"),
        # on the line after its marker, with a label, below headings
        ("####\n18", "18"),
        ("**Final Answer:**\n18", "18"),
        ("The final answer is:\n\n18", "18"),
        ("The answer is:\n\\[\n18\n\\]", "18"),
        ("The answer is:\n\n$$\n18\n$$\n", "18"),
        ("#### Answer: 18", "18"),
        ("#### The answer is 18", "18"),
        ("#### Final Answer\n18", "18"),
        ("\\boxed{Answer: 18}", "18"),
        ("**Answer**: 18", "18"),
        ("#### Step 1\n5+3=8\n#### Step 2\n8+10=18\nThe answer is 18.", "18"),
        ("#### 1. Add\n5+3=8\n#### 2. Multiply\nThe answer is 16", "16"),
        ("#### Part 1\n1+2=3\n#### 18", "18"),
        ("#### 18\n\nI hope this helps", "18"),
        ("#### USD 500\nbye", "500"),
        # what is thought is not said
        ("<think>Is it \\boxed{5}? No.</think>\nThe answer is 18.", "18"),
        ("[THINK]Is it \\boxed{5}?[/THINK]The answer to the question is 18", "18"),
        ("Is it \\boxed{5}?</think>\nThe answer is 18", "18"),
        # units and words
        ("The answer is 18 dollars.", "18"),
        ("The answer is $18$ dollars.", "18"),
        ("The answer is **18** dollars.", "18"),
        ("The answer is 18 because 9+9 = 18.", "18"),
        ("The answer is 10,080, which is a lot.", "10080"),
        ("\\boxed{18 dollars}", "18"),
        ("#### 18 miles per hour", "18"),
        ("#### 18 square feet", "18"),
        ("#### 18 sq. ft.", "18"),
        ("#### 24 months", "24"),
        ("#### 18cm", "18"),
        ("#### 30 L", "30"),
        ("#### 18 T-shirts", "18"),
        ("#### 18 boys and girls", "18"),
        ("#### 72, altogether", "72"),
        ("#### 1/2 cup", "0.5"),
        ("#### 3/4 of a mile", "0.75"),
        ("#### 2 1/2 hours", "2.5"),
        ("#### 2 and 1/2 hours", "2.5"),
        ("#### -3°C", "-3"),
        ("#### 7 p.m.", "7"),
        ("\\boxed{5\\,\\mathrm{cm}}", "5"),
        ("\\boxed{5\\text{ cm}}", "5\\text{ centimeters}"),
        ("\\boxed{15\\mbox{ cm}^2}", "15\\text{ square cm}"),
        ("\\boxed{\\frac{\\sqrt3}{2}\\text{ cm}}", "\\frac{\\sqrt{3}}{2}"),
        ("\\boxed{2\\pi\\text{ cm}}", "2\\pi"),
        ("\\boxed{10:45\\text{ a.m.}}", "10:45\\text{ am}"),
        # words that are a part of the number
        ("#### 5 thousand", "5000"),
        ("#### 5 hundred thousand", "500000"),
        ("#### $2.5 million", "2500000"),
        ("#### 2 dozen", "24"),
        ("\\boxed{5\\text{ million}}", "5000000"),
        ("\\boxed{28\\text{ percent}}", "28\\%"),
        ("#### 50 percent", "0.5"),
        ("#### 5 per cent", "5\\%"),
        ("#### 18 a day", "18"),
        ("#### ₱500", "500"),
        ("#### 18ml", "18"),
        ("\\boxed{\\text{18 dollars}}", "18"),
        # other ways to write it
        ("#### = 18", "18"),
        ("## **Final Answer**\n18", "18"),
        ("\\boxed{11,\\! 111}", "11111"),
        ("\\boxed{\\sqrt[3]4}", "\\sqrt[3]{4}"),
        ("\\boxed{\\text{Yes}}", "\\text{yes}"),
        ("#### 1e3", "1000"),
        ("#### ₹500", "500"),
        ("#### USD 500", "500"),
        ("#### Rs. 500", "500"),
        ("#### `18`", "18"),
        ("so it is $\\boxed 5$.", "5"),
        ("so \\boxed 52$", "52"),
        ("\\boxed{2~\\frac{1}{2}}", "\\frac52"),
        ("\\boxed{2\\frac12}", "2.5"),
        ("\\boxed{1-\\frac{1}{\\mathrm{e}}}", "1-\\frac{1}{e}"),
        ("\\boxed{\\color{red}{18}}", "18"),
        ("\\boxed{\\textcolor{blue}{18}}", "18"),
        ("\\boxed{\\textbf{18}}", "18"),
        ("\\boxed{0.\\overline{3}}", "\\frac{1}{3}"),
        ("\\boxed{0.1\\overline{6}}", "1/6"),
        ("\\boxed{10{,}080}", "10080"),
        ("\\boxed{√2}", "\\sqrt{2}"),
        ("\\boxed{√12}", "2\\sqrt3"),
        ("\\boxed{2π}", "2\\pi"),
        ("\\boxed{x²}", "x^2"),
        ("\\boxed{10⁻²}", "0.01"),
        ("#### 2½", "2.5"),
        ("\\boxed{90°}", "90"),
        ("\\boxed{52_{8}}", "52_8"),
        ("\\boxed{1\\text{ and }-2}", "-2, 1"),
        ("\\boxed{\\frac{1}{2^{99}}}", "2^{-99}"),
        ("\\boxed{\\text{(C)}}", "C"),
        ("The answer is (1, 2).", "(1,2)"),
        ("#### Evelyn", "Evelyn"),
    ],
)
def test_right_answers_are_recognised_however_they_are_written(completion, answer):
    assert is_correct(completion, answer)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("", "18"),
        ("18", "18"),  # no answer is stated
        ("####", "18"),
        ("#### ", "18"),
        ("#### 18 19", "18"),
        ("#### 18 #### 19", "18"),
        ("#### 18\n#### 19", "18"),
        ("#### 180", "18"),
        ("#### 1,8", "18"),
        ("#### 18", "-18"),
        ("#### 0.5", "50"),
        ("#### 12 pi", "12"),
        ("#### 2**3", "23"),
        ("#### ١٨", "18"),
        ("#### 18\x00", "18"),
        ("#### 18", ""),
        ("\\boxed{18", "18"),
        ("\\boxed{}", "18"),
        ("\\boxed{(2,1)}", "(1,2)"),
        ("\\boxed{(0,1)}", "[0,1]"),
        ("\\boxed{x^2}", "x^3"),
        ("The answer is not 18", "18"),
        ("#### 1/0", "0"),
        # words that change the number, or that are not understood
        ("#### 5 thousand", "5"),
        ("#### 5 million", "5"),
        ("#### 2 dozen", "2"),
        ("#### 5 score", "5"),
        ("#### 2 pairs", "2"),
        ("#### 5 and a half", "5"),
        ("#### 5 halves", "5"),
        ("#### 5 tenths", "5"),
        ("#### 2 twenty-fifths", "2"),
        ("#### 5 squared", "5"),
        ("#### 5 plus two", "5"),
        ("#### 5 minus two", "5"),
        ("#### 5 point two", "5"),
        ("#### 5 or six", "5"),
        ("#### 5 to 7", "5"),
        ("#### 5-6", "5"),
        ("#### 5, 6", "5"),
        ("#### 5 modulo 7", "5"),
        ("#### 5 r 2", "5"),
        ("#### 5k", "5"),
        ("#### 5x", "5"),
        ("#### 5 pi", "5"),
        ("#### 5 a", "5"),
        ("#### 5²", "5"),
        ("#### 5!", "5"),
        ("#### 5 -", "5"),
        ("#### negative 5", "5"),
        ("#### 5 degrees below zero", "5"),
        ("#### 12 thousand 300", "12000"),
        ("The answer is 5 or six.", "5"),
        ("The answer is 5, 6.", "5"),
        ("The answer is 5 is wrong", "5"),
        ("\\boxed{5\\text{ million}}", "5"),
        ("\\boxed{2\\text{ dozen}}", "2"),
        ("\\boxed{5 \\text{ or six}}", "5"),
        ("#### 5 M", "5"),
        ("#### 5 mn", "5"),
        ("#### 5 grand", "5"),
        ("#### 5 under par", "5"),
        ("\\boxed{5\\text{^2}}", "5"),
        ("\\boxed{\\text{5 or 6}}", "5"),
        # two units, other units
        ("\\boxed{2\\text{ hours }30\\text{ minutes}}", "2"),
        ("\\boxed{5\\text{ ft }6\\text{ in}}", "5"),
        ("#### 5 feet 6 inches", "5"),
        ("#### 5 hours thirty minutes", "5"),
        ("\\boxed{10:45\\text{ a.m.}}", "10:45\\text{ p.m.}"),
        ("\\boxed{5\\text{ cm}}", "5\\text{ m}"),
        ("\\boxed{5\\text{ cm}^2}", "5\\text{ cm}"),
        ("\\boxed{€5}", "\\$5"),
        ("\\boxed{5\\text{ cents}}", "\\$5"),
        ("#### 0.5%", "50%"),
        # bases
        ("\\boxed{52_8}", "52_7"),
        ("\\boxed{1011_2}", "1011_3"),
        ("\\boxed{5_8}", "5"),
        ("\\boxed{(52)_8}", "(52)_7"),
        ("\\boxed{(52)_{8}}", "(52)_{7}"),
        # tiny values
        ("#### 0.0000001", "0.0000002"),
        ("\\boxed{\\frac{1}{2^{99}}}", "\\frac{1}{2^{98}}"),
        ("\\boxed{\\frac{3}{2^{99}}}", "\\frac{5}{2^{99}}"),
        ("\\boxed{10^{-20}}", "10^{-21}"),
        ("\\boxed{10^{-30}}", "0"),
        ("\\boxed{e^{-40}}", "e^{-41}"),
        ("\\boxed{(10^{-20},1)}", "(10^{-21},1)"),
        ("\\boxed{10^{-20}x}", "10^{-21}x"),
        ("\\boxed{\\begin{pmatrix}10^{-20}\\\\2\\end{pmatrix}}", "\\begin{pmatrix}10^{-21}\\\\2\\end{pmatrix}"),
        # thoughts
        ("<think>Is it \\boxed{5}? No.</think>\nThe answer is 18.", "5"),
        ("<think>I could say \\boxed{18}, let me check", "18"),
        ("<THINKING>#### 18", "18"),
        ("<think >\\boxed{18}", "18"),
        ("<thoughts>\\boxed{18}</thoughts>", "18"),
        ("<|begin_of_thought|>\\boxed{18}<|end_of_thought|> no", "18"),
        ("◁think▷\\boxed{18}◁/think▷ no", "18"),
        ("<|channel|>analysis<|message|>\\boxed{18}<|channel|>final<|message|>no", "18"),
        ("\\boxed{1 8}", "18"),
    ],
)
def test_wrong_and_unstated_answers_are_refused(completion, answer):
    assert not is_correct(completion, answer)


def test_an_answer_in_a_box_is_found_through_nested_braces():
    assert extract("\\boxed{\\frac{\\sqrt{a_{1}}}{\\text{b{c}}}} trailing}") == "\\frac{\\sqrt{a_{1}}}{\\text{b{c}}}"


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_a_number_is_read_back_from_every_way_to_write_it(value, zeros):
    for written in (str(value), f"{value:,}", f"{value:,}." + "0" * zeros, f"{2 * value}/2", f"\\frac{{{value}}}{{1}}"):
        assert number(written) == value
        assert is_correct(f"#### {written}", str(value))
        assert not is_correct(f"#### {written}", str(value + 1))


@given(st.text(max_size=80), st.sampled_from(["#### ", "\\boxed{", "the answer is ", ""]))
@settings(max_examples=150, deadline=None)
def test_no_text_makes_it_raise_or_pass(text, marker):
    assert not is_correct(f"{marker}{text}", "8128.25")


HOSTILE = [
    "9**9**9**9",
    "9^{9^{9^9}}",
    "10^{10^{10}}",
    "10^10^10",
    "2^{3^{4^{5}}}",
    "((10^{9999})^{9999})^{9999}",
    "9^{9 \\times 9 \\times 9 \\times 9 \\times 9 \\times 9 \\times 9 \\times 9 \\times 9 \\times 9}",
    "9" * 399,
    "1e999999999",
    "999999999!",
    "((9!)!)!",
    "\\binom{999999999}{99999999}",
    "\\sum_{n=1}^{9999}n^{9999}",
    "(a+b+c+d+e)^{99}-(e+d+c)^{99}",
    "\\int \\int \\int e^{x^{x}} dx dy dz",
    "x^{" * 60 + "}" * 60,
    "(" * 199 + ")" * 199,
    "\\sqrt{" * 40 + "}" * 40,
    "\\frac{1}{0}",
    "\x00" * 300,
    "__import__('os').system('true')",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: answer[:16])
def test_what_cannot_be_computed_is_refused_in_bounded_time(answer):
    start = time.perf_counter()
    assert not is_correct(f"\\boxed{{{answer}}}", "x^2+\\sqrt{3}")
    assert time.perf_counter() - start < SLOWEST


def test_without_math_verify_every_comparison_that_needs_it_says_so(monkeypatch):
    verifier.stop()
    monkeypatch.setattr("sys.executable", "/bin/false")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="pip install math-verify"):
            is_correct("\\boxed{x^2+38x+361}", "(x+19)^2")
    monkeypatch.undo()
    assert is_correct("\\boxed{x^2+38x+361}", "(x+19)^2")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_its_own_and_leaves_the_parents_alone():
    assert is_correct("\\boxed{x^2+42x+441}", "(x+21)^2")
    process = verifier.process
    child = os.fork()
    if child == 0:
        own = is_correct("\\boxed{x^2+44x+484}", "(x+22)^2") and verifier.process is not process
        verifier.stop()
        os._exit(not own)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_correct("\\boxed{x^2+46x+529}", "(x+23)^2")
    assert verifier.process is process


@pytest.mark.parametrize(
    "completion",
    [
        "#" * 10**7,
        "#### " * 10**6,
        "\\boxed{" * 10**6,
        "\\boxed{" + "{" * 10**7,
        ("\\boxed" + " " * 999) * 10**3,
        "#### " + "9" * 10**7,
        "answer is " * 10**6,
        "answer" + " " * 10**6,
        "#### " + "1 " * 10**6,
        "\x00" * 10**7,
        "\n" * 10**7,
    ],
    ids=lambda completion: repr(completion[:12]),
)
def test_megabytes_are_refused_at_once(completion):
    start = time.perf_counter()
    assert not is_correct(completion, "18")
    assert time.perf_counter() - start < 1.0
