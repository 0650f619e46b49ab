"""Greedy picks of the determinantal process against the recordings of the original."""

from typing import Any

import jax
import numpy as np
import pytest

from esm.core.dpp import NONE, Picks, dpp_greedy
from esm.select import unit_keys
from tests.parity import esm_cases

CASES = esm_cases.read("dpp.json")
ARRAYS = esm_cases.arrays("dpp.npz")
# Exact duplicates under epsilon 0: their residual is rounding noise, which only double precision
# keeps below the threshold.
FLOAT32 = [case for case in CASES if case["epsilon"] > 0 or case["B"] == 0]

_dpp = jax.jit(dpp_greedy, static_argnames="size")


# One shape, hence one compilation, for all cases: padding must not matter, and the first picks do
# not depend on how many follow.
CAPACITY = max(case["N"] for case in CASES)
WIDTH = max(case["d"] for case in CASES)
SIZE = max(min(case["B"], case["N"]) for case in CASES)


def _picks(case: dict[str, Any], dtype: type) -> Picks:
    """The case's picks, behind them NONE."""
    keys = unit_keys(ARRAYS[f"{case['name']}__keys"]).astype(dtype)
    quality = ARRAYS[f"{case['name']}__quality"].astype(dtype)
    pad = CAPACITY - len(keys)
    picks = _dpp(
        np.pad(keys, ((0, pad), (0, WIDTH - keys.shape[1]))),
        np.pad(quality, (0, pad), constant_values=9.0),
        np.arange(CAPACITY) < len(keys),
        SIZE,
        case["lambda_diversity"],
        case["epsilon"],
    )
    return jax.tree.map(lambda x: np.asarray(x)[: case["B"]], picks)


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in CASES])
def test_double_precision(case: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        picks = _picks(case, np.float64)
    count = len(case["picked"])
    assert picks.entry[:count].tolist() == case["picked"]
    assert (picks.entry[count:] == NONE).all()
    np.testing.assert_allclose(picks.gain[:count], case["gains"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(picks.residual[:count], case["residual_var"], rtol=0, atol=1e-9)
    if case["objective"] is not None:
        np.testing.assert_allclose(picks.gain.sum(), case["objective"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in FLOAT32])
def test_single_precision(case: dict[str, Any]) -> None:
    picks = _picks(case, np.float32)
    assert picks.entry[: len(case["picked"])].tolist() == case["picked"]
