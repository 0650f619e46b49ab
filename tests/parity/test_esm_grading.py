"""Graders of the steering tasks against judged and recorded verdicts."""

import json
from typing import Any

import pytest

from common.answers import grade_task
from common.answers.legacy import normalize_label, normalize_number
from tests.parity.fixtures import fixture_root

ROOT = fixture_root() / "esm"
GRADED = [
    pytest.param(line, id=f"{path.stem}-{line['id']}")
    for path in sorted(ROOT.glob("grading*.jsonl"))
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())
]
NORMALIZED = [
    pytest.param(kind, case, id=f"{path.stem}-{kind}-{index}")
    for path in sorted(ROOT.glob("normalizers*.json"))
    for kind, cases in json.loads(path.read_text(encoding="utf-8")).items()
    for index, case in enumerate(cases)
]


def test_cases_were_found() -> None:
    assert GRADED and NORMALIZED


def _grade(line: dict[str, Any], grader: str) -> Any:
    return grade_task(
        line["task"],
        line["response"],
        line["gold_field"],
        finish_reason=line["finish_reason"],
        grader=grader,
    )


@pytest.mark.parametrize("line", GRADED)
def test_strict_reproduces_the_judged_verdict(line: dict[str, Any]) -> None:
    verdict = _grade(line, "strict")
    assert verdict.correct == line["correct"], verdict


@pytest.mark.parametrize("line", GRADED)
def test_legacy_reproduces_the_original(line: dict[str, Any]) -> None:
    original = line["original"]
    verdict = _grade(line, "legacy")
    assert (verdict.pred, verdict.gold, verdict.correct, verdict.error) == (
        original["pred"],
        original["gold"],
        original["correct"],
        original["error"],
    )


@pytest.mark.parametrize(("kind", "case"), NORMALIZED)
def test_normal_forms(kind: str, case: dict[str, str]) -> None:
    normalize = {"number": normalize_number, "label": normalize_label}[kind]
    assert normalize(case["input"]) == case["output"]
