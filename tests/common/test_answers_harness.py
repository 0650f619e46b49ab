"""The harness's two GSM8K scores, on answers whose verdicts its documentation implies."""

import pytest

from common.answers.harness import flexible_extract, harness_scores, strict_match

GOLD = "He has 1,200 dollars.\n#### 1,200"


@pytest.mark.parametrize(
    ("prediction", "strict", "flexible"),
    [
        ("#### 1200", True, True),
        ("#### 1,200.", True, True),
        ("#### $1200", False, True),
        ("so 1200", False, True),
        ("#### 1200 or 7", True, False),
        ("#### 7\n#### 1200", False, True),
        ("#### 1200.0", False, False),
        ("none", False, False),
        ("####1200", False, True),
    ],
)
def test_verdicts(prediction: str, strict: bool, flexible: bool) -> None:
    assert strict_match(prediction, GOLD) is strict
    assert flexible_extract(prediction, GOLD) is flexible


def test_shares() -> None:
    found = harness_scores(["#### 1200", "1200", "x", "#### 3"], [GOLD] * 4)
    assert found.strict_match == 0.25 and found.flexible_extract == 0.5
