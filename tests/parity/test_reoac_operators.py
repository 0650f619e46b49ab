"""Operators against the recorded decisions and costs."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from reoac_jax.operators import (
    OperatorParams,
    operator_costs,
    operator_masks,
    operator_params,
    select_and_fallback,
)
from reoac_jax.types import OPERATORS
from tests.parity.reoac_vocabulary import load_tables, reoac_files

RECORDS = [json.loads(p.read_text(encoding="utf-8")) for p in reoac_files("operators*.json")]
CASES = [case for record in RECORDS for case in record["cases"]]
COSTS = [row for record in RECORDS for row in record["costs"]]


def limit(name: str, params: dict[str, Any]) -> int:
    key = "max_tokens" if name in ("O_NUM", "O_OP") else "scope_len"
    return int(params.get(key, 1))


def params_of(*pairs: tuple[str, dict[str, Any]]) -> OperatorParams:
    return operator_params([{"id": name, "params": given} for name, given in pairs])


def masks_of(case: dict[str, Any], params: OperatorParams) -> np.ndarray:
    """Masks [A, G] of one case."""
    gen = case["token_ids"][case["prompt_len"] :]
    found = operator_masks(load_tables(), jnp.asarray([gen]), params, case["use_strings"])
    return np.asarray(found)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_decision(case: dict[str, Any]) -> None:
    name, given = case["operator"], case["params"]
    if limit(name, given) < 1:
        with pytest.raises(UserError):
            params_of((name, given))
        return
    params = params_of((name, given))
    mask = masks_of(case, params)[0]
    positions = (np.flatnonzero(mask) + case["prompt_len"]).tolist()
    assert positions == case["decision"]["update_positions"]
    assert params.specs[0].cost == pytest.approx(case["decision"]["cost"])
    if "ensure_update" not in case:
        return
    second = case["ensure_update"]
    others = [(second["fallback_operator"], second["params"])]
    if others[0][0] == name:
        both, fallback = params, 0
    else:
        both, fallback = params_of((name, given), *others), 1
    masks = jnp.asarray(masks_of(case, both))[None]
    executed = select_and_fallback(
        masks, operator_costs(both), jnp.zeros(1, jnp.int32), fallback, True
    )
    wanted = second["decision"]
    assert both.ids[int(executed.operator[0])] == wanted["operator_id"]
    found = (np.flatnonzero(executed.mask[0]) + case["prompt_len"]).tolist()
    assert found == wanted["update_positions"]
    assert float(executed.cost[0]) == pytest.approx(wanted["cost"])
    assert bool(executed.fell_back[0])


@pytest.mark.parametrize("row", COSTS, ids=range(len(COSTS)))
def test_cost(row: dict[str, Any]) -> None:
    params = params_of((row["operator"], row["params"]))
    assert float(operator_costs(params)[0]) == pytest.approx(row["cost"])


@pytest.mark.parametrize("record", RECORDS)
def test_defaults(record: dict[str, Any]) -> None:
    params = operator_params()
    assert params.ids == OPERATORS
    for spec in params.specs:
        assert spec == params_of((spec.name, record["default_params"][spec.name])).specs[0]


def test_one_compilation() -> None:
    """Different tokens of one shape share a compiled call and give the single results."""
    tables, params, traces = load_tables(), operator_params(), []
    shortest = min(len(case["token_ids"]) for case in CASES)

    @jax.jit
    def step(ids: jax.Array) -> jax.Array:
        traces.append(1)
        return operator_masks(tables, ids, params)

    rows = jnp.asarray([case["token_ids"][-shortest:] for case in CASES])
    batched = operator_masks(tables, rows, params)
    for row, masks in zip(rows[:6], batched[:6], strict=True):
        np.testing.assert_array_equal(step(row[None])[0], masks)
    assert len(traces) == 1
