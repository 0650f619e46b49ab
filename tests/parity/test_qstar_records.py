"""Adapters, per-sample records and the analysis of diagnostics files against the recordings."""

from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from qstar.adapters import RowError, make_adapter
from qstar.analyze import STATISTICS, analyze
from qstar.records import sample_record
from tests.parity import qstar_cases as cases

ADAPTERS = cases.read("adapters.json")["cases"]


@pytest.mark.parametrize("case", ADAPTERS, ids=lambda case: case["name"])
def test_adapters(case: dict[str, Any]) -> None:
    rows, required = case["rows"], case["required"]
    if required[0].get("error") == "config":
        with pytest.raises(UserError) as refused:
            make_adapter(rows, case["adapter"], **case["args"])
        for word in required[0]["mentions"]:
            assert word in str(refused.value)
        return
    adapter = make_adapter(rows, case["adapter"], **case["args"])
    assert len(adapter) == len(required)
    for index, wanted in enumerate(required):
        if wanted.get("error") == "row":
            with pytest.raises(RowError):
                adapter.sample(index)
            continue
        sample = adapter.sample(index)
        assert sample.prompt == wanted["prompt"]
        assert list(sample.messages) == wanted["messages"]
        assert sample.response == wanted["response"]
        assert dict(sample.metadata) == wanted["metadata"]


def test_records() -> None:
    for case in cases.read("diagnostics_records.json")["cases"]:
        wanted = case["expected"]
        per_token = {k: np.asarray(v) for k, v in case["per_token"].items()}
        got = sample_record(
            wanted["sample_idx"], per_token, case["n_forced"], case["finish_reason"]
        )
        assert set(got) == set(wanted)
        for key, value in wanted.items():
            if isinstance(value, float):
                assert abs(got[key] - value) <= 1e-9, key
            else:
                assert got[key] == value, key


def test_analysis() -> None:
    wanted = cases.read("analyze_expected.json")
    report = analyze(cases.ROOT / wanted["file"])
    assert report["file"] == wanted["file"]
    assert set(report["statistics"]) == set(wanted["statistics"])
    for name, values in wanted["statistics"].items():
        for statistic in STATISTICS:
            assert abs(report["statistics"][name][statistic] - values[statistic]) <= 1e-12
    for name, value in wanted["checks"].items():
        if isinstance(value, bool):
            assert report["checks"][name] is value
        else:
            assert abs(report["checks"][name] - value) <= 1e-12
