"""Diagnostics and comparison tables against the recordings of the original."""

from typing import Any

import pytest

from esm.compare import compare, diagnose
from tests.parity import esm_cases

RUNS = esm_cases.read("online.json")["runs"]
CASES = [pytest.param(run, id=run["name"]) for run in RUNS]


def _assert_holds(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if isinstance(value, float):
            assert abs(actual[key] - value) < 1e-9, key
        else:
            assert actual[key] == value and type(actual[key]) is type(value), key


@pytest.mark.parametrize("run", CASES)
def test_diagnostics(run: dict[str, Any]) -> None:
    expected = run["diagnostics"]
    _assert_holds(diagnose("greedy", run["greedy"]), expected["greedy"])
    _assert_holds(diagnose("esm", run["rows"]), expected["esm"])


@pytest.mark.parametrize("run", CASES)
def test_comparison(run: dict[str, Any]) -> None:
    actual = compare(run["greedy"], run["rows"], run["T_max"], resamples=50)
    _assert_holds(actual, run["comparison"])
