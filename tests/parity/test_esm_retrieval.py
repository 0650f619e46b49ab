"""Cosine retrieval, its gates and reasons against the recordings of the original."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import pytest

from esm.core.retrieval import ANY_POINT, NO_LAYER, PADDING, REASONS, Entries, retrieve, unit
from tests.parity import esm_cases

CONTENT = esm_cases.read("retrieval.json")
ARRAYS = esm_cases.arrays("retrieval.npz")
TOLERANCE = 1e-5
CAPACITY = 64
BATCH = 4

_retrieve = jax.jit(retrieve, static_argnames="k")


def _entries(memory: str, layers: list[int]) -> Entries:
    rows = CONTENT["memories"][memory]
    keys = np.asarray(unit(ARRAYS[f"{memory}__keys"].astype(np.float32)))
    pad = max(0, CAPACITY - len(rows))

    def column(values: Iterable[Any], dtype: type, empty: Any) -> np.ndarray:
        return np.asarray([*values, *([empty] * pad)], dtype)

    slots = (layers.index(r["layer"]) if r["layer"] in layers else NO_LAYER for r in rows)
    return Entries(
        keys=np.pad(keys, ((0, pad), (0, 0))),
        layer=column(slots, np.int32, NO_LAYER),
        point=column((r["control_point_m"] for r in rows), np.int32, PADDING),
        quality=column((r["quality"] for r in rows), np.float32, 0),
        is_null=column((r["is_null"] for r in rows), bool, False),
    )


def _separated(sims: list[float]) -> list[bool]:
    """Whether each place is apart from its neighbours, so that its index is decided."""
    gaps = [abs(a - b) > TOLERANCE for a, b in zip(sims, sims[1:], strict=False)]
    return [left and right for left, right in zip([True, *gaps], [*gaps, True], strict=True)]


@pytest.mark.parametrize("memory", sorted(CONTENT["memories"]))
def test_retrieval(memory: str) -> None:
    for case in (c for c in CONTENT["cases"] if c["memory"] == memory):
        layers = case["query_layers"]
        states = [ARRAYS[f"{case['query']}__L{layer}"] for layer in layers]
        hidden = ARRAYS[f"{memory}__keys"].shape[1]
        query = np.zeros((BATCH, len(layers), hidden), np.float32)
        query[1] = np.asarray(states).reshape(len(layers), hidden)  # the other rows: another query
        point = ANY_POINT if case["control_point_m"] is None else case["control_point_m"]
        found = jax.device_get(
            _retrieve(
                _entries(memory, layers),
                query,
                np.asarray([1, point, 2, ANY_POINT], np.int32),
                k=case["k"],
                min_sim=-np.inf if case["min_sim"] is None else case["min_sim"],
                min_entries=case["min_entries"],
            )
        )
        row = jax.tree.map(lambda x: x[1], found)
        assert REASONS[row.reason] == case["reason"], case
        assert row.num_entries == case["n_entries_m"], case
        assert row.used == case["k_used"], case
        if case["top_sim"] is None:
            assert np.isnan(row.top_sim)
        else:
            assert abs(row.top_sim - case["top_sim"]) < TOLERANCE
        assert row.valid.sum() == len(case["idx"]), case
        np.testing.assert_allclose(row.sim[row.valid], case["sim"], rtol=0, atol=TOLERANCE)
        for place, decided in enumerate(_separated(case["sim"]) if case["sim"] else []):
            # With fewer kept than there are, the last one may be tied with one left out.
            if decided and place < max(1, len(case["sim"]) - 1):
                assert row.entry[place] == case["idx"][place], case
