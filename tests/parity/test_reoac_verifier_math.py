"""MATH verifiers against the recorded verdicts: `paper` as published, `robust` as judged."""

import json
from typing import Any

import pytest

from common.answers import grade_math
from common.answers.paper_parsers import missing_parsers
from common.answers.pool import GradingPool
from tests.parity.fixtures import fixture_root

FILES = sorted((fixture_root() / "reoac").glob("verifier_math*.json"))
CASES = [
    pytest.param(case, id=f"{path.stem}-{case.get('id', index)}")
    for path in FILES
    for index, case in enumerate(json.loads(path.read_text(encoding="utf-8"))["cases"])
]
# Where the original hung: ours is ended by the clock, and that is a verdict of its own.
LIMIT_S = 20.0


def test_cases_were_found() -> None:
    assert FILES and CASES


@pytest.mark.parametrize("case", CASES)
def test_robust_reproduces_the_judged_answer(case: dict[str, Any]) -> None:
    prediction, gold = case["prediction"], case["target_answer"]
    strict = grade_math(prediction, gold)
    assert strict in (0.0, 1.0)
    assert strict == grade_math(gold, prediction)
    assert strict == grade_math(prediction, gold, "shaped")
    if not case.get("debatable"):
        assert bool(strict) == case["correct"]


def _check_paper(parser: str) -> None:
    missing = missing_parsers(parser)
    if missing and parser != "auto":
        pytest.skip(missing[0])
    cases = [case.values[0] for case in CASES]
    timed = [case for case in cases if not case["original"][parser].get("error")]
    items = [
        (case["prediction"], case["target_answer"], {"mode": mode, "parser": parser})
        for case in timed
        for mode in ("strict", "shaped")
    ]
    with GradingPool(1, LIMIT_S, "common.answers.paper_math:paper_score") as pool:
        verdicts = iter(pool.submit(items).result())
    wrong = []
    for case in timed:
        for mode in ("strict", "shaped"):
            verdict, recorded = next(verdicts), case["original"][parser][mode]
            if verdict.score != pytest.approx(recorded) or verdict.crashed or verdict.timed_out:
                wrong.append((case["id"], mode, verdict, recorded))
    assert timed and not wrong


def test_paper_with_sympy_reproduces_the_original() -> None:
    _check_paper("sympy")


@pytest.mark.slow
@pytest.mark.parametrize("parser", ["latex2sympy2", "sympy_latex"])
def test_paper_with_latex_parsers_reproduces_the_original(parser: str) -> None:
    _check_paper(parser)


@pytest.mark.slow
def test_paper_auto_reproduces_the_original() -> None:
    # The recordings had latex2sympy2, which shuts out the second parser.
    if any("latex2sympy2" in reason for reason in missing_parsers("auto")):
        pytest.skip(missing_parsers("auto")[0])
    _check_paper("auto")


@pytest.mark.parametrize("case", CASES)
def test_paper_extraction(case: dict[str, Any]) -> None:
    from common.answers.paper_text import paper_answer

    assert paper_answer(case["prediction"]) == case["original_pred_extracted"]
    assert paper_answer(case["target_answer"]) == case["original_target_extracted"]
