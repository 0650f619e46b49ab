"""The GSM8K graders: extraction rules one by one, and properties that hold for any text."""

import subprocess
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.answers import grade_gsm8k
from common.answers.extract import clean_text, last_box, numbers
from common.answers.gsm8k import extract_answer
from common.errors import UserError

FAST = settings(max_examples=100, deadline=None)
# Plain text alone rarely reaches the number rules; this alphabet lives on their edges.
EDGY = st.text(
    alphabet="0123456789.,/^+-eE%$#: ()[]{}\\boxedfrac<>|\n\u00bd\u00b2\u2212*", max_size=60
)
ANY_TEXT = st.one_of(st.text(max_size=80), EDGY)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It costs 1,234,567.50 in all", Fraction("1234567.5")),
        ("1,2", 2),
        ("1,2345", 2345),
        ("0,500", 500),
        ("-$5", -5),
        ("$-5", -5),
        ("(-5)", -5),
        ("(3)-5", 5),
        ("x-5", 5),
        ("\u22125", -5),
        (".5", Fraction(1, 2)),
        ("That day.5 apples", 5),
        ("1.5e3", 1500),
        ("3em", 3),
        ("2^10", 1024),
        ("2**3", 8),
        ("2^{-2}", Fraction(1, 4)),
        ("**42**", 42),
        ("20 m^2", 20),
        ("20 m\u00b2", 20),
        ("2\u00b3", 8),
        ("-3/4", Fraction(-3, 4)),
        ("1.5/0.5", 3),
        ("2\u00bd", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("2 10/5", 2),
        ("2 3/2", Fraction(3, 2)),
        ("1/2/2020", None),
        ("4/0", None),
        ("42 at 3:30", 42),
        ("3:4", 4),
        ("0^-1", None),
        ("9^9^9", None),
        ("2^99999999999999999999", None),
        ("1e999999999", None),
        ("7" * 5000, None),
        ("\\frac{1}{2}", Fraction(1, 2)),
        ("2\\dfrac{1}{4}", Fraction(9, 4)),
        ("1{,}200", 1200),
        ("\u0664\u0662", 42),
        ("12<|endoftext|>34", 34),
        ("5<<5*1=5>>", 5),
        ("#### 5 or 6", 5),
        ("8\n#### none", None),
        ("\\boxed{3} of 9", 3),
        ("\\boxed 3 of 9", 3),
        ("\\boxed{x} then 9", None),
        ("\\boxed{\\text{about } 3} of 9", 3),
        ("\\boxed{7 and 9", 9),
        ("", None),
    ],
)
def test_stated_number(text: str, expected: int | Fraction | None) -> None:
    assert extract_answer(text).number == expected


def test_last_box_is_balanced() -> None:
    assert last_box(r"\boxed{1} and \fbox{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_box(r"\boxed{a\}b}") == r"a\}b"
    assert last_box(r"\boxed{1} and \boxed{2") == "1"
    assert last_box("no box") is None


def test_shaped_pays_closeness_only_to_numbers() -> None:
    assert grade_gsm8k("39", "#### 42", "shaped") == pytest.approx(39 / 42)
    assert grade_gsm8k("1000", "#### 42", "shaped") == 0.0
    assert grade_gsm8k("0.25", "#### 0.5", "shaped") == pytest.approx(0.75)
    assert grade_gsm8k("words", "#### 42", "shaped") == 0.0
    assert grade_gsm8k("same words", "same  words", "shaped") == 1.0
    assert grade_gsm8k("9" * 390, "#### 1", "shaped") == 0.0


def test_what_scores_nothing() -> None:
    for verifier in ("robust", "paper"):
        assert grade_gsm8k(None, "#### 1", verifier=verifier) == 0.0
        assert grade_gsm8k("1", None, verifier=verifier) == 0.0
    assert grade_gsm8k("", "") == 0.0
    assert grade_gsm8k("nan", "nan", "shaped", "paper") == 0.0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="robust, paper"):
        grade_gsm8k("1", "1", verifier="sympy")
    with pytest.raises(UserError, match="strict, shaped"):
        grade_gsm8k("1", "1", mode="soft")


@pytest.mark.parametrize(
    "unit",
    [
        *("\\boxed{", "1,111", "111,", "<<", "<|a", "1 ", "9", "1/", "2^", ".", "#", "\u00bd", "{"),
        *("1e1", "<<1>>", "1^{", "-", "111 ", "1:23"),
    ],
)
def test_hostile_texts_take_linear_time(unit: str) -> None:
    text = unit * (60_000 // len(unit))
    start = time.perf_counter()
    grade_gsm8k(text, "#### 5")
    # Linear scans need tens of milliseconds; anything quadratic needs minutes.
    assert time.perf_counter() - start < 10.0


def test_grading_needs_no_heavy_package() -> None:
    code = (
        "import sys, common.answers, common.answers.worker\n"
        "print([m for m in ('jax', 'torch', 'numpy', 'sympy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@FAST
@given(ANY_TEXT, ANY_TEXT)
def test_any_pair_of_texts_has_a_score(prediction: str, gold: str) -> None:
    for verifier in ("robust", "paper"):
        strict = grade_gsm8k(prediction, gold, "strict", verifier)
        shaped = grade_gsm8k(prediction, gold, "shaped", verifier)
        assert strict in (0.0, 1.0)
        assert 0.0 <= shaped <= 1.0
    assert grade_gsm8k(prediction, gold) == grade_gsm8k(gold, prediction)


@FAST
@given(ANY_TEXT)
def test_a_text_agrees_with_itself(text: str) -> None:
    answer = extract_answer(text)
    assert grade_gsm8k(text, text) == float(answer.number is not None or answer.text != "")
    assert clean_text(clean_text(text)) == clean_text(text) or "<" in text


@FAST
@given(st.integers(-(10**30), 10**30))
def test_thousands_separators_do_not_matter(value: int) -> None:
    assert grade_gsm8k(f"That makes ${value:,}.", f"#### {value}") == 1.0
    assert grade_gsm8k(f"#### {value:,} dollars (7 left)", f"{value:,}") == 1.0
    assert grade_gsm8k(f"#### {value + 1:,}", f"#### {value:,}") == 0.0


@FAST
@given(st.integers(-1000, 1000), st.integers(1, 1000), st.integers(1, 20))
def test_fractions_are_exact(top: int, bottom: int, factor: int) -> None:
    assert grade_gsm8k(f"{top * factor}/{bottom * factor}", f"#### {top}/{bottom}") == 1.0
    assert grade_gsm8k(f"{top}/{bottom}", f"#### {top + 1}/{bottom}") == 0.0


@FAST
@given(st.decimals(-(10**6), 10**6, places=4))
def test_trailing_zeros_do_not_matter(value: object) -> None:
    assert grade_gsm8k(f"{value}00", f"#### {value}") == 1.0


@FAST
@given(ANY_TEXT)
def test_literals_are_in_order(text: str) -> None:
    literals = list(numbers(clean_text(text)))
    ends = [0, *(literal.end for literal in literals)]
    for end, literal in zip(ends, literals, strict=False):
        assert end <= literal.start < literal.end
