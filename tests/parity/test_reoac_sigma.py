"""Noise schedule against the recorded levels."""

import json
from typing import Any

import pytest

from reoac_jax.schedule import sigma
from tests.parity.reoac_vocabulary import reoac_files

CASES = [
    case
    for path in reoac_files("sigma*.json")
    for case in json.loads(path.read_text(encoding="utf-8"))["cases"]
]


def test_cases_exist() -> None:
    assert CASES


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_level(case: dict[str, Any]) -> None:
    given = {}
    if not case.get("defaults"):
        given = {
            "num_steps": case["num_steps"],
            "sigma_min": case["sigma_min"],
            "sigma_max": case["sigma_max"],
            "schedule": case["sigma_schedule"],
        }
    assert float(sigma(case["step"], **given)) == pytest.approx(case["sigma"], abs=2e-6)
