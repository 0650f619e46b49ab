"""Required outcomes for identical, disjoint, masked, extreme and broken rows.

Cases of one temperature form one batch: their neighbours include broken rows, and they are padded
to one width with columns that are -inf in both models and so count for nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar.diagnostics import diagnose
from qstar.law import LawSettings, log_weights
from qstar.sampling import NO_TOKEN
from qstar.step import MixedToken, mix_step
from qstar.tilt import FLAG_NAMES, INVALID, AlphaSettings, tilt
from tests.parity import qstar_cases as cases

CASES = cases.read("edge_cases.json")["cases"]
WIDTH = max(len(case["logits_theta"]) for case in CASES)


def batch(group: list[dict[str, Any]], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    def padded(case: dict[str, Any], name: str) -> np.ndarray:
        row = cases.numbers(case[name])
        return np.pad(row, (0, WIDTH - len(row)), constant_values=-np.inf).astype(dtype)

    return tuple(np.stack([padded(c, k) for c in group]) for k in ("logits_theta", "logits_t"))


@functools.partial(jax.jit, static_argnums=2)
def outcome(x: jax.Array, y: jax.Array, temperature: float) -> tuple[MixedToken, jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(x))
    step = mix_step(x, y, keys, AlphaSettings(), LawSettings(), temperature)
    weights = log_weights(tilt(x, y, AlphaSettings(), temperature), LawSettings())
    return step, jax.nn.softmax(weights, axis=-1)


@functools.cache
def outcomes(temperature: float, double: bool) -> dict[str, tuple[Any, np.ndarray]]:
    group = [case for case in CASES if case["temperature"] == temperature]
    with jax.enable_x64(double):
        x, y = batch(group, np.float64 if double else np.float32)
        step, q = jax.device_get(outcome(jnp.asarray(x), jnp.asarray(y), temperature))
    row = [jax.tree.map(lambda a, i=i: a[i], step) for i in range(len(group))]
    return {case["name"]: (row[i], q[i]) for i, case in enumerate(group)}


def precisions() -> list[Any]:
    """Every case in float32; those at temperature 1, one compiled batch, in float64 as well."""
    found = []
    for case in CASES:
        found.append(pytest.param(case, False, id=f"{case['name']}-float32"))
        if case["temperature"] == 1.0:
            found.append(pytest.param(case, True, id=f"{case['name']}-float64"))
    return found


@pytest.mark.parametrize(("case", "double"), precisions())
def test_required_outcome(case: dict[str, Any], double: bool) -> None:
    required = case["required"]
    step, q = outcomes(case["temperature"], double)[case["name"]]
    got, flags = step.diagnostics, int(step.diagnostics.flags)
    if "error" in required:
        assert flags == INVALID and step.token == NO_TOKEN
        return
    assert not flags & INVALID
    assert step.token >= 0 and q[step.token] > 0
    if "alpha" in required:
        assert abs(float(got.alpha) - required["alpha"]) <= required["alpha_tol"]
    if "alpha_range" in required:
        low, high = required["alpha_range"]
        assert low <= got.alpha <= high
    if "q" in required:
        wanted = np.pad(required["q"], (0, WIDTH - len(required["q"])))
        np.testing.assert_allclose(q, wanted, rtol=0, atol=required.get("q_tol", 1e-5))
    for name in ("kl_theta", "kl_t", "ess_theta", "ess_t", "ess_ratio"):
        if name in required and required[name] is None:
            assert np.isnan(getattr(got, name))
        elif name in required:
            assert abs(getattr(got, name) - required[name]) <= 1e-5, name
    if "flag" in required:
        assert flags == (FLAG_NAMES[required["flag"]] if required["flag"] else 0)
    if required.get("finite"):
        for name, value in vars(got).items():
            assert np.isfinite(value), name
        assert np.all(np.isfinite(q)) and abs(q.sum() - 1) <= 1e-5
    if "token" in required:
        assert step.token == required["token"]


def test_neighbours_and_padding_change_nothing() -> None:
    group = [case for case in CASES if case["temperature"] == 1.0]
    assert any("error" in case["required"] for case in group)
    alone = jax.jit(lambda x, y: diagnose(tilt(x, y, AlphaSettings())))
    for case in group:
        if len(case["logits_theta"]) != WIDTH:
            continue
        x, y = batch([case], np.float32)
        wide = outcomes(1.0, False)[case["name"]][0].diagnostics
        for name, value in vars(jax.device_get(alone(x, y))).items():
            np.testing.assert_allclose(
                getattr(wide, name), value[0], rtol=2e-6, atol=1e-6, err_msg=case["name"]
            )


@pytest.mark.parametrize("method", ["entropy", "ess_balance", "reverse_kl_symmetry"])
def test_every_method_on_equal_models(method: str) -> None:
    group = [case for case in CASES if case["required"].get("flag") == "identical"]
    x, y = batch(group, np.float32)
    found = jax.jit(lambda x, y: tilt(x, y, AlphaSettings(method)))(x, y)
    assert np.all(found.alpha == 0.5) and np.all(found.flags == FLAG_NAMES["identical"])


def test_half_precision_logits() -> None:
    group = [case for case in CASES if case["name"] == "generic"]
    solve = jax.jit(lambda x, y: tilt(x, y, AlphaSettings()).alpha)
    for dtype in (jnp.float16, jnp.bfloat16):
        x, y = (jnp.asarray(z).astype(dtype) for z in batch(group, np.float32))
        half, full = solve(x, y), solve(x.astype(jnp.float32), y.astype(jnp.float32))
        assert half.dtype == jnp.float32
        assert half[0] == full[0]
        assert abs(float(half[0]) - group[0]["required"]["alpha"]) < 0.02
