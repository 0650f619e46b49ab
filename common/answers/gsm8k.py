"""The two verifiers of GSM8K answers: `robust` (exact) and `paper` (as published)."""

import math
import re
from fractions import Fraction
from typing import NamedTuple

from common.answers.extract import after_marker, clean_text, last_box, numbers
from common.errors import UserError

VERIFIERS = ("robust", "paper")
MODES = ("strict", "shaped")


class Answer(NamedTuple):
    """What a text states as its answer.

    Attributes:
        number: the exact value, None where the answer part holds no number.
        text: the answer part itself, blanks collapsed.
    """

    number: Fraction | None
    text: str


def grade_gsm8k(
    prediction: str | None, gold: str | None, mode: str = "strict", verifier: str = "robust"
) -> float:
    """Scores a prediction against the reference answer of a GSM8K problem.

    strict pays 1 for equal answers and 0 otherwise. shaped also pays numeric closeness,
    max(0, 1 - |p - g| / max(|g|, 1)), to two different numbers.

    Args:
        prediction: the text of the model; None counts as empty.
        gold: the reference text; None (missing) scores 0.
        mode: "strict" or "shaped".
        verifier: "robust" (exact rationals) or "paper" (the published rules, kept for parity).

    Returns:
        A score in [0, 1].

    Raises:
        UserError: if `mode` or `verifier` is unknown.
    """
    if verifier not in VERIFIERS:
        raise UserError(f"unknown verifier {verifier!r}; use one of {', '.join(VERIFIERS)}")
    if mode not in MODES:
        raise UserError(f"unknown reward mode {mode!r}; use one of {', '.join(MODES)}")
    if gold is None:
        return 0.0
    grade = _grade_robust if verifier == "robust" else _grade_paper
    return grade(prediction or "", gold, mode == "shaped")


def extract_answer(text: str) -> Answer:
    r"""Finds the stated answer of a text (robust verifier, GSM8K extraction).

    After the last `####` the first number; else the first number of the last balanced box; else
    the last number of the text. A marker or box without a number states no number: other numbers
    of the text are no substitute for it.

    Args:
        text: a prediction or a reference.

    Returns:
        The answer.
    """
    text = clean_text(text)
    part = after_marker(text)
    if part is None:
        part = last_box(text)
    if part is not None:
        found = next(numbers(part), None)
    else:
        part = text
        found = None
        for literal in numbers(part):
            found = literal
    return Answer(found.value if found else None, " ".join(part.split()))


def _grade_robust(prediction: str, gold: str, shaped: bool) -> float:
    answer, truth = extract_answer(prediction), extract_answer(gold)
    if answer.number is None or truth.number is None:
        # Closeness has no meaning here, and texts without numbers earn nothing for being texts.
        both_words = answer.number is None and truth.number is None
        return float(both_words and answer.text == truth.text and answer.text != "")
    if answer.number == truth.number:
        return 1.0
    if not shaped:
        return 0.0
    distance = abs(answer.number - truth.number) / max(abs(truth.number), Fraction(1))
    # Rounding must not lift two huge neighbours to the score of equal answers.
    return min(float(1 - distance), math.nextafter(1.0, 0.0)) if distance < 1 else 0.0


_PAPER_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:/\d+(?:\.\d+)?)?")
_PAPER_TOLERANCE = 1e-4


def paper_extract(text: str) -> str:
    """Finds the answer of a text as published (paper verifier, GSM8K extraction).

    Args:
        text: a prediction or a reference.

    Returns:
        The last number literal after the last `####` (or of the whole text), else that text.
    """
    part = after_marker(text)
    part = text if part is None else part
    found = _PAPER_NUMBER.findall(part)
    return found[-1] if found else part.strip()


def _paper_number(text: str) -> float | None:
    try:
        if "/" in text and not text.endswith("/"):
            top, bottom = text.split("/")
            return float(Fraction(int(top), int(bottom)))
        return float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def _grade_paper(prediction: str, gold: str, shaped: bool) -> float:
    answer, truth = paper_extract(prediction), paper_extract(gold)
    value, target = _paper_number(answer), _paper_number(truth)
    if value is None or target is None:
        if not shaped:
            return float(answer.strip() == truth.strip())
        return 0.05 if _PAPER_NUMBER.search(prediction) else 0.0
    distance = abs(value - target)
    if distance < _PAPER_TOLERANCE:
        return 1.0
    if not shaped:
        return 0.0
    closeness = 1.0 - distance / max(abs(target), 1.0)
    # "nan" and "inf" parse as numbers here; what they give is no score.
    return max(0.0, closeness) if math.isfinite(closeness) else 0.0
