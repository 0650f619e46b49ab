r"""Strict grading of tasks: where an answer may stand, and what counts as none."""

import pytest

from common.answers import grade_task
from common.answers.choices import AMBIGUOUS, choice_letter, yes_or_no
from common.answers.tasks import TASK_KINDS, number_text
from common.errors import UserError


@pytest.mark.parametrize(
    ("span", "letter"),
    [
        ("C", "C"),
        ("(c)", "C"),
        ("**B.**", "B"),
        ("$\\text{(D)}$", "D"),
        ("B: evaporation", "B"),
        ("Answer: C", "C"),
        ("the answer is option b", "B"),
        ("The correct choice is (E) for two reasons", "E"),
        ("option A or option B", AMBIGUOUS),
        ("A or B", AMBIGUOUS),
        ("A plant makes it", None),
        ("Cannot be determined", None),
        ("Because of gravity, C", "C"),
        ("A quick check gives D", "D"),
        ("2", "B"),
        ("7", None),
        ("", None),
    ],
)
def test_choice_letter(span, letter):
    assert choice_letter(span) == letter


@pytest.mark.parametrize(
    ("span", "word"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("**True**", "Yes"),
        ("False", "No"),
        ("Yes/No", AMBIGUOUS),
        ("Not sure", None),
        ("None", None),
        ("Nobody knows", None),
    ],
)
def test_yes_or_no(span, word):
    assert yes_or_no(span) == word


@pytest.mark.parametrize(
    ("response", "pred"),
    [
        ("#### 18", "18"),
        ("So 3 + 4 = 7.\n#### 3 + 4 = 7", "7"),
        ("#### about 72 apples", "72"),
        ("#### \\frac{1}{8}", "0.125"),
        ("#### 1/3", "1/3"),
        ("#### -0.50", "-0.5"),
        ("The answer is 9.\nThat took 3 steps.", "9"),
        ("We get 5, then 6", "6"),
        ("\\boxed{12} and #### 13", "13"),
    ],
)
def test_numbers(response, pred):
    verdict = grade_task("gsm8k", response, "#### 1")
    assert (verdict.pred, verdict.error) == (pred, None)


def test_a_box_goes_first_only_where_it_was_asked_for():
    response = "\\boxed{12} #### 13"
    assert grade_task("aime25", response, "12").correct
    assert grade_task("gsm8k", response, "#### 13").correct
    assert grade_task("gsm8k", response, "#### 12", template="math_0shot").correct


@pytest.mark.parametrize(
    ("task", "response", "reason"),
    [
        ("gsm8k", "16 - 3 = 13, so", "no_answer"),
        ("aime25", "So \\boxed{5", "unclosed_box"),
        ("aime25", "First \\boxed{5}, then \\boxed{6", "unclosed_box"),
        ("arc-c", "#### A or B", "ambiguous"),
        ("strategyqa", "#### Yes/No", "ambiguous"),
    ],
)
def test_no_answer_has_a_reason(task, response, reason):
    gold = {"arc-c": "A", "strategyqa": "Yes"}.get(task, "13")
    verdict = grade_task(task, response, gold, finish_reason="length")
    assert verdict == (None, verdict.gold, False, reason)


@pytest.mark.parametrize(
    "response",
    [
        "So x = 7.",
        "Therefore, the value is $7$.",
        "The answer is therefore $x = 7$",
        "I get\n\\[\nx = 7\n\\]",
        "I get\n\n$$x = 7$$.",
        "Final Answer:\n$7$",
        "#### 7",
    ],
)
def test_math_without_a_box(response):
    assert grade_task("math500", response, "$\\boxed{7}$").correct
    assert grade_task("math500", response, "$\\boxed{8}$").error is None


def test_gold_from_the_bare_answer_goes_first():
    assert grade_task("math500", "\\boxed{7}", "no box here", answer="7").correct
    assert grade_task("math500", "\\boxed{7}", "no box here").error == "no_gold"
    assert grade_task("commonsense_qa", "#### A", "").error == "no_gold"


def test_boolean_and_numeric_labels():
    assert grade_task("strategyqa", "#### yes", "True").correct
    assert grade_task("arc-c", "#### B", "2").correct
    assert grade_task("amc23", "\\boxed{27}", "27.0").correct


@pytest.mark.parametrize("task", sorted(TASK_KINDS))
@pytest.mark.parametrize("grader", ["strict", "legacy"])
def test_every_task_has_both_graders(task, grader):
    gold = {"choice": "A", "yes_no": "Yes", "math": "\\boxed{3}"}.get(TASK_KINDS[task], "#### 3")
    gold = gold.removeprefix("#### ") if task not in ("gsm8k", "problems") else gold
    answer = gold if TASK_KINDS[task] == "math" else f"#### {gold.removeprefix('#### ')}"
    assert grade_task(task, answer, gold, grader=grader).correct
    assert not grade_task(task, "", gold, grader=grader).correct


def test_unknown_task_and_grader_are_user_errors():
    with pytest.raises(UserError, match="mmlu"):
        grade_task("mmlu", "A", "A")
    with pytest.raises(UserError, match="kind"):
        grade_task("gsm8k", "1", "1", grader="kind")


def test_number_text_is_canonical():
    from fractions import Fraction

    assert [number_text(Fraction(t)) for t in ("7", "-5/4", "1/3", "1/40", "100")] == [
        "7",
        "-1.25",
        "1/3",
        "0.025",
        "100",
    ]
