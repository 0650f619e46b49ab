r"""Strict grading of an answer to a task: where it stands, what it says, whether it is right.

Answer spans, in this order: the last balanced `\boxed{..}` if the prompt asks for a box or there is
no `####`; the rest of the last `####` line; the last "answer is" clause; and, only if the model
stopped by itself, the last number, letter or line. A span that says nothing the task can use passes
on to the next; an ambiguous one and an unclosed box end with no answer, which is wrong.
"""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from common.answers.choices import AMBIGUOUS, choice_letter, letter_of, yes_or_no
from common.answers.extract import MARKER, clean_text, last_box, numbers
from common.answers.legacy import grade_legacy
from common.answers.math_equal import Match, rational
from common.answers.math_text import answer_clause
from common.answers.math_values import Value, readings
from common.answers.mathematics import equal_answers
from common.answers.verdicts import Verdict
from common.errors import UserError

GRADERS = ("strict", "legacy")
NUMERIC, MATH, CHOICE, YES_NO = "numeric", "math", "choice", "yes_no"
TASK_KINDS = {
    "gsm8k": NUMERIC,
    "svamp": NUMERIC,
    "problems": NUMERIC,
    "aime_2024": NUMERIC,
    "aime25": NUMERIC,
    "amc23": NUMERIC,
    "math500": MATH,
    "math": MATH,
    "arc-c": CHOICE,
    "openbookqa": CHOICE,
    "commonsense_qa": CHOICE,
    "strategyqa": YES_NO,
}
_BOX_TASKS = ("math500", "math", "aime_2024", "aime25", "amc23")
_BOX_START = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LINE_LEAD = re.compile(
    r"^(?:(?:so|thus|hence|therefore|then|we|get|have|finally|is|are|it|follows|that|the|answer|value)"
    r"\b[\s,:]*)+",
    re.IGNORECASE,
)
_MAX_BITS = 8192  # of a number that is written out in a record
_START = re.compile(r"[\s$\u20ac\u00a3*(]*")


class _Reading(NamedTuple):
    """What a span says: text for the record, and the value that is compared."""

    text: str
    value: Fraction | str


def grade_task(
    task: str,
    response: str,
    gold_field: str,
    *,
    answer: str | None = None,
    template: str = "",
    finish_reason: str = "stop",
    grader: str = "strict",
) -> Verdict:
    """Grades the response of a model.

    Args:
        task: canonical name of a data set (`TASK_KINDS`).
        response: the text of the model.
        gold_field: the reference as its data set stores it (GSM8K: the worked solution; MATH: the
            solution with its box; choices: the label; yes/no: a word or a boolean).
        answer: the bare reference answer where the data set has one; goes before `gold_field`.
        template: id of the prompt; one that starts with "math" asks for a box. Empty takes what is
            usual for the task.
        finish_reason: "length" if the budget cut the response.
        grader: "strict", or "legacy" for the rules behind old tables.

    Returns:
        The verdict; its `error` says why there is no answer, and names a time-out of computer
        algebra, which counts as wrong.

    Raises:
        UserError: unknown task or grader.
    """
    kind = kind_of(task)
    if grader not in GRADERS:
        raise UserError(f"unknown grader {grader!r}; set eval.grader to {' or '.join(GRADERS)}")
    if grader == "legacy":
        return grade_legacy(kind, response, gold_field, from_solution=task in ("gsm8k", "problems"))
    wants_box = template.startswith("math") if template else task in _BOX_TASKS
    if kind == MATH:
        return _grade_math(response, gold_field, answer, wants_box, finish_reason)
    gold = _gold(kind, gold_field if answer is None else answer)
    if gold is None:
        return Verdict(None, None, False, "no_gold")
    reading = _find(kind, response, wants_box, finish_reason)
    if isinstance(reading, str):
        return Verdict(None, gold.text, False, reading)
    return Verdict(reading.text, gold.text, reading.value == gold.value, None)


def kind_of(task: str) -> str:
    """How a task is graded: "numeric", "math", "choice" or "yes_no".

    Raises:
        UserError: the task is unknown.
    """
    if task not in TASK_KINDS:
        raise UserError(f"no grader for task {task!r}; known are {', '.join(sorted(TASK_KINDS))}")
    return TASK_KINDS[task]


def answer_spans(text: str, wants_box: bool, finished: bool) -> Iterator[tuple[str, str]]:
    """Yields (rule, span) where an answer may stand, the most explicit place first.

    Rules: "box", "marker", "clause", "end" (the whole text), "unclosed" (a box without an end,
    after which nothing counts).
    """
    marked = MARKER in text
    if wants_box or not marked:
        starts = list(_BOX_START.finditer(text))
        if starts and last_box(text[starts[-1].start() :]) is None:
            yield "unclosed", ""
            return
        box = last_box(text)
        if box is not None:
            yield "box", box
    if marked:
        line = text.rpartition(MARKER)[2].split("\n", 1)[0].strip()
        if line:
            yield "marker", line
    clause = answer_clause(text)
    if clause:
        yield "clause", clause
    if finished:
        yield "end", text


def _find(kind: str, response: str, wants_box: bool, finish_reason: str) -> _Reading | str:
    """The first span that says something; else the reason why there is none."""
    text = clean_text(response)
    for rule, span in answer_spans(text, wants_box, finish_reason != "length"):
        if rule == "unclosed":
            return "unclosed_box"
        reading = _READERS[kind](span, rule)
        if reading is not None and reading.value == AMBIGUOUS:
            return "ambiguous"
        if reading is not None:
            return reading
    return "no_answer"


def _read_number(span: str, rule: str) -> _Reading | None:
    if rule == "end":
        literal = None
        for found in numbers(span):
            literal = found
        return None if literal is None else _number(literal.value)
    for value in readings(span):
        last = value.parts[-1] if value.kind == "relation" else value
        exact = rational(last) if last.kind == "scalar" else None
        if exact is not None and exact.numerator.bit_length() < _MAX_BITS:
            return _number(exact)
    literals = list(numbers(span))
    if not literals:
        return None
    start = _START.match(span)
    leads = start is not None and literals[0].start <= start.end()
    if leads or len(literals) == 1:
        return _number(literals[0].value)
    return None


def _number(value: Fraction) -> _Reading:
    return _Reading(number_text(value), value)


def number_text(value: Fraction) -> str:
    """An exact number as text: an integer, a terminating decimal, or a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    while rest % 10 == 0 or rest % 5 == 0 or rest % 2 == 0:
        rest //= 10 if rest % 10 == 0 else 5 if rest % 5 == 0 else 2
        places += 1
    if rest != 1 or places > 40:
        return f"{value.numerator}/{value.denominator}"
    digits = value * 10**places
    text = str(abs(digits.numerator)).rjust(places + 1, "0")
    decimal = f"{text[:-places]}.{text[-places:]}".rstrip("0")
    return f"-{decimal}" if value < 0 else decimal


def _read_choice(span: str, rule: str) -> _Reading | None:
    if rule == "end":
        lines = [line for line in span.splitlines() if line.strip() and MARKER not in line]
        span = lines[-1] if lines else ""
    letter = choice_letter(span)
    return None if letter is None else _Reading(letter, letter)


def _read_yes_no(span: str, rule: str) -> _Reading | None:
    word = yes_or_no(span)
    return None if word is None else _Reading(word, word)


_READERS: dict[str, Callable[[str, str], _Reading | None]] = {
    NUMERIC: _read_number,
    CHOICE: _read_choice,
    YES_NO: _read_yes_no,
}


def _gold(kind: str, field: str) -> _Reading | None:
    text = clean_text(str(field))
    if kind == CHOICE:
        letter = letter_of(text)
        return None if letter is None else _Reading(letter, letter)
    if kind == YES_NO:
        return _read_yes_no(text, "marker")
    if MARKER in text:
        text = text.rpartition(MARKER)[2]
    return _read_number(text, "marker")


def _grade_math(
    response: str, gold_field: str, answer: str | None, wants_box: bool, finish_reason: str
) -> Verdict:
    gold = answer if answer is not None else last_box(gold_field)
    if gold is None or not gold.strip():
        return Verdict(None, None, False, "no_gold")
    text = clean_text(response)
    for rule, span in answer_spans(text, wants_box, finish_reason != "length"):
        if rule == "unclosed":
            return Verdict(None, gold, False, "unclosed_box")
        if rule == "end":
            span = _last_line(span)
        if not _says_something(readings(span)):
            continue
        match, error = equal_answers(span, gold)
        return Verdict(span, gold, match is Match.EQUAL, error)
    return Verdict(None, gold, False, "no_answer")


def _says_something(values: tuple[Value, ...]) -> bool:
    first = values[0]
    return first.kind != "text" or bool(first.text and first.text not in ("\\boxed{}", "\\fbox{}"))


def _last_line(text: str) -> str:
    """The last line that is not blank, without the words that lead up to its formula."""
    text = text.rstrip()
    for opener, closer in (("\\[", "\\]"), ("$$", "$$")):
        # A displayed formula may take several lines.
        body = text.rstrip(".").removesuffix(closer)
        if body != text.rstrip(".") and opener in body:
            return body.rpartition(opener)[2]
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    formulas = re.findall(r"\$([^$]+)\$", lines[-1])
    return formulas[-1] if formulas else _LINE_LEAD.sub("", lines[-1].strip(" *`."))
