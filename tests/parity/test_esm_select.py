"""The selection of the library against the recordings of the original."""

from typing import Any

import pytest

from esm.select import Rules, select_entries
from tests.parity import esm_cases

CONTENT = esm_cases.read("select.json")
ARRAYS = esm_cases.arrays("select.npz")


@pytest.mark.parametrize(
    "pool", sorted({case["pool"] for case in CONTENT["cases"]}), ids=lambda name: str(name)
)
def test_selection(pool: str) -> None:
    entries: list[dict[str, Any]] = CONTENT["pools"][pool]
    for case in (c for c in CONTENT["cases"] if c["pool"] == pool):
        config = case["config"]
        chosen = select_entries(
            ARRAYS[f"{pool}__keys"],
            [e["quality"] for e in entries],
            [e["control_point_m"] for e in entries],
            [e["layer"] for e in entries],
            Rules(
                size=config["B"],
                method=config["method"],
                diversity=config["lambda_diversity"],
                epsilon=config["epsilon"],
                min_per_point=config["min_per_control_point"],
                seed=config["random_seed"],
            ),
        )
        assert [entries[i]["tool_id"] for i in chosen] == case["chosen_tool_ids"], config
