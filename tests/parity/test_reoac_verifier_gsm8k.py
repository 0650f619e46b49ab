"""GSM8K verifiers against the recorded verdicts: `paper` as published, `robust` as judged."""

import json
from typing import Any

import pytest

from common.answers import grade_gsm8k
from common.answers.gsm8k import extract_answer, paper_extract
from tests.parity.fixtures import fixture_root

FILES = sorted((fixture_root() / "reoac").glob("verifier_gsm8k*.json"))


def _rows(key: str) -> list[Any]:
    rows = []
    for path in FILES:
        for index, case in enumerate(json.loads(path.read_text(encoding="utf-8")).get(key, [])):
            name = f"{path.stem}-{case.get('id', index)}"
            rows.append(pytest.param(case, id=name))
    return rows


CASES = _rows("cases")


def test_cases_were_found() -> None:
    assert FILES and CASES


@pytest.mark.parametrize("case", CASES)
def test_paper_reproduces_the_original(case: dict[str, Any]) -> None:
    prediction, gold, original = case["prediction"], case["target_answer"], case["original"]
    assert paper_extract(prediction) == original["pred_extracted"]
    assert paper_extract(gold) == original["target_extracted"]
    for mode in ("strict", "shaped"):
        score = grade_gsm8k(prediction, gold, mode, verifier="paper")
        assert score == pytest.approx(original[mode], abs=1e-8, rel=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_robust_reproduces_the_judged_answer(case: dict[str, Any]) -> None:
    prediction, gold = case["prediction"], case["target_answer"]
    strict = grade_gsm8k(prediction, gold)
    assert strict in (0.0, 1.0)
    assert strict == grade_gsm8k(gold, prediction)
    if not case.get("debatable"):
        assert bool(strict) == case["correct"], (extract_answer(prediction), extract_answer(gold))
    shaped = grade_gsm8k(prediction, gold, "shaped")
    assert strict <= shaped <= 1.0
    assert (shaped == 1.0) == (strict == 1.0)


@pytest.mark.parametrize("verifier", ["robust", "paper"])
@pytest.mark.parametrize("case", _rows("missing_gold"))
def test_missing_gold(case: dict[str, Any], verifier: str) -> None:
    for mode in ("strict", "shaped"):
        score = grade_gsm8k(case["prediction"], case["target_answer"], mode, verifier)
        assert score == case["strict"]
