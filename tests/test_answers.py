"""Final answers: found in text, compared, and hostile ones survived."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp.tasks import answers
from cmdp.tasks.answers import extract, is_correct, number

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
    answers._worker.process.kill()
    assert not is_correct("\\boxed{x^2+81}", "(x+9)^2")  # an answer may be lost with the process, but no more
    assert is_correct("\\boxed{x^2+14x+49}", "(x+7)^2")
