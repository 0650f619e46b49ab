"""Generated MATH-style problems: purity, disjoint splits, every form of answer graded right."""

from collections import Counter

import pytest

from common.answers import grade_math
from common.answers.math_values import readings
from common.errors import UserError
from common.problems_math import SUBJECTS, MathProblemSet, generate_math, math_split_of


@pytest.fixture(scope="module")
def records():
    return MathProblemSet("train", 700, seed=2)[:]


def test_pure_and_a_sequence(records):
    assert records[3] == generate_math("train", 3, seed=2)
    assert MathProblemSet("train", 5, seed=2)[-1] == records[4]
    assert generate_math("train", 3, seed=1)["prompt"] != records[3]["prompt"]
    with pytest.raises(IndexError):
        MathProblemSet("train", 5)[5]


def test_splits_share_no_question(records):
    test = MathProblemSet("test", 210, seed=9)[:]
    assert {math_split_of(r["prompt"]) for r in test} == {"test"}
    assert {math_split_of(r["prompt"]) for r in records} == {"train"}


def test_subjects_take_turns_and_levels_vary(records):
    assert Counter(r["metadata"]["subject"] for r in records) == dict.fromkeys(SUBJECTS, 100)
    levels = Counter(r["metadata"]["level"] for r in records)
    assert set(levels) == {f"Level {n}" for n in range(1, 6)} and min(levels.values()) > 50


def test_targets_are_graded_right_and_neighbours_wrong(records):
    kinds = set()
    for record, other in zip(records, records[7:], strict=False):
        answer = record["metadata"]["answer"]
        assert grade_math(record["target_answer"], record["target_answer"]) == 1.0
        assert grade_math(f"so \\boxed{{{answer}}}", record["target_answer"]) == 1.0
        if other["metadata"]["answer"] != answer:
            assert grade_math(other["target_answer"], record["target_answer"]) == 0.0
        kinds.add(readings(answer)[0].kind)
    assert kinds == {"scalar", "tuple", "list"}


def test_bad_arguments_are_user_errors():
    for call in (
        lambda: generate_math("dev", 0),
        lambda: generate_math("train", -1),
        lambda: MathProblemSet("dev", 1),
        lambda: MathProblemSet("train", -1),
    ):
        with pytest.raises(UserError):
            call()
