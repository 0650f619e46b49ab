"""Operator configuration, paper masks against plain Python, and the operators of plus."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import plain_python_reoac as plain
from common.errors import UserError
from reoac_jax.operators import (
    operator_costs,
    operator_masks,
    operator_params,
    plus_operator_masks,
    select_and_fallback,
)
from reoac_jax.tables import Tables, build_tables
from reoac_jax.types import OPERATORS, SpecialIds

STRINGS = ["Ġapples", "12", "Ġ3x", "+", "Ġ=", "word", "a_b", "<eos>", "<|mask|>"]
SPECIAL = SpecialIds(7, 7, 7, 8)
WORD, DIGIT, PLUS, MASK = 5, 1, 3, 8
plus_masks = jax.jit(
    plus_operator_masks, static_argnames=("params", "remask_ratio", "branching")
)  # fmt: skip


@pytest.fixture(scope="module")
def tables() -> Tables:
    return build_tables(STRINGS, SPECIAL)


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"id": "O_NONE"}, "O_NONE"),
        ({"id": "O_NUM", "params": {"max_tokens": 0}}, "max_tokens"),
        ({"id": "O_FAST", "params": {"scope_len": -2}}, "scope_len"),
        ({"id": "O_SCOPE", "params": {"scope_len": 2.5}}, "scope_len"),
        ({"id": "O_BRANCH", "params": {"branch_depth": -1}}, "branch_depth"),
        ({"id": "O_NUM", "params": {"scale": 1}}, "scale"),
        ({"id": "O_NUM", "params": {"step_scale": 0.0}}, "step_scale"),
        ({"id": "O_NUM", "params": {"step_scale": -1.0, "factor": 1.0}}, "step_scale"),
        ({"id": "O_NUM", "params": {"threshold": 1.5}}, "threshold"),
        ({"id": "O_NUM", "params": {"factor": -0.5}}, "factor"),
    ],
)
def test_bad_entries(entry: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        operator_params([entry])


def test_repeated_entry_and_missing_fallback() -> None:
    with pytest.raises(UserError, match="twice"):
        operator_params(["O_NUM", "O_NUM"])
    some = operator_params(["O_NUM", "O_FAST"])
    assert some.fallback_index("O_FAST") == 1
    with pytest.raises(UserError, match="fallback"):
        some.fallback_index("NO_SUCH")
    assert operator_params().fallback_index("NO_SUCH") == OPERATORS.index("O_SCOPE")
    assert hash(some) == hash(operator_params(["O_NUM", "O_FAST"]))


def test_plain_python_agrees(tables: Tables) -> None:
    params = operator_params(
        [{"id": "O_FAST", "params": {"scope_len": 7}}, {"id": "O_NUM", "params": {"max_tokens": 3}}]
        + [{"id": "O_OP", "params": {"max_tokens": 4}}, "O_SCOPE"]
    )
    vocabulary = plain.PlainVocabulary(STRINGS, SPECIAL.eos_id, frozenset(SPECIAL))
    gen = np.random.default_rng(0).integers(0, len(STRINGS), (9, 13)).astype(np.int32)
    found = operator_masks(tables, jnp.asarray(gen), params)
    for row in range(len(gen)):
        for index, spec in enumerate(params.specs):
            wanted = plain.operator_positions(spec.name, spec.limit, gen[row].tolist(), vocabulary)
            assert np.flatnonzero(found[row, index]).tolist() == wanted


def test_fallback_keeps_its_cost_even_when_void() -> None:
    params = operator_params()
    masks = jnp.zeros((2, 5, 4), bool).at[1, 2].set(True)
    chosen = jnp.zeros(2, jnp.int32)
    found = select_and_fallback(masks, operator_costs(params), chosen, 2, True)
    assert found.operator.tolist() == [2, 2]
    assert found.cost.tolist() == [1.0, 1.0]
    assert found.mask.sum(axis=1).tolist() == [0, 4]
    kept = select_and_fallback(masks, operator_costs(params), chosen, 2, False)
    assert kept.operator.tolist() == [0, 0] and not kept.fell_back.any()


def slow_plus(
    tables: Tables,
    pred: np.ndarray,
    confidence: np.ndarray,
    mass: tuple[np.ndarray, np.ndarray],
    masked: np.ndarray,
    pace: int,
    params: Any,
    ratio: float,
    active: np.ndarray,
) -> tuple[list[set[int]], list[set[int]]]:
    """One row, one position at a time."""
    waiting = [j for j in range(len(pred)) if masked[j] and active[j]]
    candidates = waiting or [j for j in range(len(pred)) if active[j] and not masked[j]]
    best_first = sorted(candidates, key=lambda j: (-confidence[j], j))
    writes: list[set[int]] = []
    remasks: list[set[int]] = []
    for spec in params.specs:
        if spec.name == "O_BRANCH":
            chosen = []
        elif spec.name == "O_SCOPE":
            chosen = candidates[: spec.scope_len]
        elif spec.name == "O_FAST":
            chosen = best_first[: spec.scope_len]
        else:
            table = tables.has_digit if spec.name == "O_NUM" else tables.op_char
            share = mass[0] if spec.name == "O_NUM" else mass[1]
            chosen = [
                j
                for j in candidates
                if share[j] >= 0.5 or (pred[j] != MASK and np.asarray(table)[pred[j]])
            ]
        order = [j for j in best_first if j in chosen]
        if waiting:
            due = max(1, math.ceil(pace * spec.step_scale - 1e-4))
            if spec.threshold:
                due = max(due, sum(confidence[j] >= spec.threshold for j in order))
            if spec.factor:
                sure = [
                    n for n, j in enumerate(order, 1) if (n + 1) * (1 - confidence[j]) < spec.factor
                ]
                due = max(due, *sure, 0)
            writes.append(set(order[:due]))
            remasks.append(set())
        else:
            number = math.ceil(len(order) * ratio - 1e-4)
            writes.append(set())
            remasks.append(set(order[len(order) - number :]))
    return writes, remasks


BY_PACE: dict[str, dict[str, float]] = {
    "O_NUM": {},
    "O_OP": {"step_scale": 2.0},
    "O_SCOPE": {"scope_len": 5},
    "O_BRANCH": {},
    "O_FAST": {"scope_len": 4, "step_scale": 1.5},
}
BY_CONFIDENCE: dict[str, dict[str, float]] = {
    "O_NUM": {"step_scale": 0.0, "threshold": 0.6},
    "O_OP": {"threshold": 0.4, "factor": 0.8},
    "O_SCOPE": {"scope_len": 9, "step_scale": 0.0, "factor": 1.7},
    "O_BRANCH": {},
    "O_FAST": {"scope_len": 4, "step_scale": 0.0, "threshold": 0.8},
}


@pytest.mark.parametrize("given", [BY_PACE, BY_CONFIDENCE], ids=["pace", "confidence"])
def test_plus_masks_against_positions_one_by_one(
    tables: Tables, given: dict[str, dict[str, float]]
) -> None:
    rng = np.random.default_rng(4)
    params = operator_params([{"id": name, "params": given[name]} for name in given])
    batch, length = 40, 12
    pred = rng.integers(0, len(STRINGS), (batch, length)).astype(np.int32)
    confidence = rng.integers(0, 5, (batch, length)).astype(np.float32) / 5  # many ties
    mass = tuple(rng.random((batch, length)).astype(np.float32) * 0.7 for _ in range(2))
    masked = rng.random((batch, length)) < rng.choice([0.0, 0.4, 1.0], (batch, 1))
    active = rng.random((batch, length)) < 0.8
    pace = rng.integers(1, 6, batch).astype(np.int32)
    found = plus_masks(
        *(tables, pred, confidence, mass, masked, pace),
        params=params,
        remask_ratio=0.3,
        active=active,
    )
    for row in range(batch):
        writes, remasks = slow_plus(
            *(tables, pred[row], confidence[row], (mass[0][row], mass[1][row])),
            *(masked[row], int(pace[row]), params, 0.3, active[row]),
        )
        for index in range(len(params.specs)):
            assert set(np.flatnonzero(found.write[row, index])) == writes[index]
            assert set(np.flatnonzero(found.remask[row, index])) == remasks[index]
            assert bool(found.valid[row, index]) == bool(writes[index] or remasks[index])
    assert found.write.any() and found.remask.any()
    assert not (found.write & ~(masked & active)[:, None]).any()
    assert not (found.remask & masked[:, None]).any()


def test_branch_needs_branching(tables: Tables) -> None:
    pred = np.full((1, 4), WORD, np.int32)
    arguments = (tables, pred, np.ones((1, 4), np.float32), None, np.ones((1, 4), bool))
    pace, params = np.asarray([2], np.int32), operator_params()
    without = plus_masks(*arguments, pace, params=params, remask_ratio=0.1)
    having = plus_masks(*arguments, pace, params=params, remask_ratio=0.1, branching=True)
    assert without.valid[0].tolist() == [False, False, True, False, True]
    assert having.valid[0].tolist() == [False, False, True, True, True]
    assert having.write[0, 3].tolist() == [True, True, False, False]


def test_a_mask_is_no_operator_character(tables: Tables) -> None:
    """The mask string contains one, but a predicted mask is of no class in plus."""
    pred = np.asarray([[MASK, PLUS, DIGIT, WORD]], np.int32)
    found = plus_masks(
        *(tables, pred, np.ones((1, 4), np.float32), None, np.ones((1, 4), bool)),
        np.asarray([4], np.int32),
        params=operator_params(),
        remask_ratio=0.1,
    )
    assert found.write[0, 0].tolist() == [False, False, True, False]
    assert found.write[0, 1].tolist() == [False, True, False, False]
