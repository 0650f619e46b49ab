"""Exponents, divergences, effective sample sizes and laws against the recorded references."""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from qstar.diagnostics import TokenDiagnostics, diagnose
from qstar.law import LawSettings, log_weights
from qstar.pair import make_pair
from qstar.solvers import RKL_BOUNDS
from qstar.tilt import AlphaSettings, Tilt, tilt
from tests.parity import qstar_cases as cases

METHODS = {"kl_symmetry": "kl", "entropy": "entropy", "ess_balance": "ess"}
DOUBLE = pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])


@functools.cache
def solver(settings: AlphaSettings) -> Any:
    return jax.jit(lambda x, y, temperature: tilt(x, y, settings, temperature))


@jax.jit
def describe(
    x: jax.Array, y: jax.Array, temperature: jax.Array, alpha: jax.Array
) -> tuple[TokenDiagnostics, jax.Array]:
    """Diagnostics and normalised log q at given exponents."""
    found = Tilt(make_pair(x, y, temperature), alpha, jnp.zeros(alpha.shape, jnp.int32))
    return diagnose(found), jax.nn.log_softmax(log_weights(found, LawSettings()), axis=-1)


def arrays(pairs: Any, temperature: float, dtype: Any) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(z, dtype) for z in (pairs.theta, pairs.t, temperature))


def solve(pairs: Any, settings: AlphaSettings, temperature: float, double: bool) -> Tilt:
    dtype = np.float64 if double else np.float32
    with jax.enable_x64(double):
        found = jax.device_get(solver(settings)(*arrays(pairs, temperature, dtype)))
    assert found.alpha.dtype == dtype
    return found


def diagnostics(
    pairs: Any, alpha: np.ndarray, temperature: float, double: bool
) -> tuple[TokenDiagnostics, np.ndarray]:
    dtype = np.float64 if double else np.float32
    with jax.enable_x64(double):
        rows = arrays(pairs, temperature, dtype)
        return jax.device_get(describe(*rows, jnp.asarray(alpha, dtype)))


def wanted_alpha(pairs: cases.SmallPairs, name: str, index: int) -> np.ndarray:
    return pairs.get(f"ref_alpha_{name}")[index]


@DOUBLE
@pytest.mark.parametrize("method", [*METHODS, "reverse_kl_symmetry"])
@pytest.mark.parametrize("size", cases.small_sizes())
def test_exponents(size: int, method: str, double: bool) -> None:
    pairs = cases.SmallPairs(size)
    for index, temperature in enumerate(cases.temperatures()):
        found = solve(pairs, AlphaSettings(method), temperature, double)
        if method == "reverse_kl_symmetry":
            wanted = np.clip(wanted_alpha(pairs, "rkl_raw", index), *RKL_BOUNDS)
        else:
            wanted = wanted_alpha(pairs, METHODS[method], index)
        jeffreys, sd = pairs.get("ref_jeffreys")[index], pairs.get("ref_sd_at_alpha")[index]
        noise = 0.0
        if method == "entropy":
            # A nearly certain model's entropy is the sum of p log p with p rounded to 1.
            noise = 1e-14 / (pairs.get("ref_entropy_theta") + pairs.get("ref_entropy_t"))[index]
        where = f"{method} T={temperature}"
        cases.check_alpha(found.alpha, wanted, jeffreys, sd, double, where, noise)
        assert not np.any(found.flags)


@DOUBLE
@pytest.mark.parametrize("size", cases.two_token_sizes())
def test_closed_form_of_two_tokens(size: int, double: bool) -> None:
    pairs = cases.SmallPairs(size)
    found = solve(pairs, AlphaSettings(), 1.0, double)
    a, b = (log_softmax(z, axis=-1) for z in (pairs.theta, pairs.t))
    jeffreys = np.sum((np.exp(a) - np.exp(b)) * (a - b), axis=-1)
    error = np.abs(found.alpha - pairs.get("ref_alpha_kl"))
    apart = jeffreys >= (1e-3 if double else 0.1)
    assert apart.any()
    assert np.all(error[apart] <= (1e-9 if double else 1e-5)), error[apart].max()


@pytest.mark.parametrize("size", cases.small_sizes())
def test_bisection_repeats_the_original(size: int) -> None:
    pairs = cases.SmallPairs(size)
    compared = 0
    for index, temperature in enumerate(cases.temperatures()):
        found = solve(pairs, AlphaSettings(solver="bisection"), temperature, True)
        logits = np.stack([pairs.theta, pairs.t]).astype(np.float64) / temperature
        least = np.exp(log_softmax(logits, axis=-1)).min(axis=(0, -1))
        clean = (least > 1e-8) & (pairs.get("ref_jeffreys")[index] >= 1e-3)
        error = np.abs(found.alpha - pairs.get("orig64_alpha_kl")[index])
        assert np.all(error[clean] <= 1e-6), error[clean].max()
        compared += int(clean.sum())
    assert compared > 0


@DOUBLE
@pytest.mark.parametrize("size", cases.small_sizes())
def test_diagnostics(size: int, double: bool) -> None:
    pairs = cases.SmallPairs(size)
    rate = 1e-9 if double else 1e-5
    for fixed in (None, *pairs.fixed_alphas()):
        prefix = "ref_" if fixed is None else f"ref_fixed{fixed}_"
        for index, temperature in enumerate(cases.temperatures()):
            wanted_at = wanted_alpha(pairs, "kl", index)
            alpha = wanted_at if fixed is None else np.full_like(wanted_at, fixed)
            got, _ = diagnostics(pairs, alpha, temperature, double)
            where = (fixed, temperature)
            # A difference of two divergences: as exact as these are.
            delta = got.kl_theta.astype(np.float64) - got.kl_t
            error = np.abs(delta - pairs.get(prefix + "delta")[index])
            assert np.all(error <= rate * (1 + got.kl_theta + got.kl_t)), where
            for name, value in (
                ("log_z", got.log_z),
                ("kl_theta", got.kl_theta),
                ("kl_t", got.kl_t),
                ("entropy_q", got.entropy_q),
            ):
                cases.close(value, pairs.get(prefix + name)[index], rate, (name, *where))
            for name in ("log_ess_theta", "log_ess_t"):
                wanted = pairs.get(prefix + name)[index]
                cases.close(getattr(got, name), wanted, 10 * rate, (name, *where))
                size_of = np.exp(np.asarray(getattr(got, name), np.float64))
                cases.close(getattr(got, name.removeprefix("log_")), size_of, rate, where)
            ratio = np.exp(got.log_ess_theta - got.log_ess_t)
            np.testing.assert_allclose(got.ess_ratio, ratio, rtol=1e-5)
            np.testing.assert_allclose(got.kl_diff, np.abs(delta), atol=1e-6)


@DOUBLE
def test_log_q(double: bool) -> None:
    seen = 0
    for size in cases.small_sizes():
        pairs = cases.SmallPairs(size)
        whole, single = pairs.has("ref_log_q"), pairs.has("ref_log_q_T1")
        for index, temperature in enumerate(cases.temperatures()):
            if not whole and not (single and temperature == 1.0):
                continue
            wanted = pairs.get("ref_log_q")[index] if whole else pairs.get("ref_log_q_T1")
            found = solve(pairs, AlphaSettings(), temperature, double)
            _, log_q = diagnostics(pairs, found.alpha, temperature, double)
            cases.close(log_q, wanted, 1e-7 if double else 1e-4, (size, temperature))
            seen += 1
    assert seen


@functools.cache
def large_pair(seed: int) -> cases.Pairs:
    row = next(row for row in cases.large_rows() if row["seed"] == seed)
    pairs = cases.generate_row(row)
    for logits, name in ((pairs.theta, "theta"), (pairs.t, "t")):
        digest = hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest()
        assert digest == row[f"sha256_{name}_f32le"], "the recipe is not reproduced"
    return pairs


LARGE = pytest.mark.parametrize(
    "row", cases.large_rows(), ids=lambda row: f"{row['seed']}-{row['V']}"
)


@LARGE
def test_large_vocabularies(row: dict[str, Any]) -> None:
    pairs = large_pair(row["seed"])
    for temperature, wanted in row["expected"].items():
        found = solve(pairs, AlphaSettings(), float(temperature), False)
        check_large_alpha(found.alpha, wanted, "kl")
        got, log_q = diagnostics(pairs, found.alpha, float(temperature), False)
        for key in ("log_z", "kl_theta", "kl_t", "entropy_q"):
            cases.close(getattr(got, key)[0], wanted[key], 1e-5, (key, temperature))
        for key in ("log_ess_theta", "log_ess_t"):
            cases.close(getattr(got, key)[0], wanted[key], 1e-4, (key, temperature))
        for part in ("top16", "probe"):
            ids = wanted[f"q_{part}_ids"]
            cases.close(log_q[0, ids], wanted[f"q_{part}_logprob"], 1e-4, (part, temperature))
        assert set(np.argsort(-log_q[0])[:16]) == set(wanted["q_top16_ids"])
        mass = np.sum(np.exp(2 * log_q[0].astype(np.float64)))
        cases.close(mass, wanted["sum_q_sq"], 1e-4, "sum of squares")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["entropy", "ess_balance", "reverse_kl_symmetry"])
@LARGE
def test_other_methods_on_large_vocabularies(row: dict[str, Any], method: str) -> None:
    for temperature, wanted in row["expected"].items():
        found = solve(large_pair(row["seed"]), AlphaSettings(method), float(temperature), False)
        check_large_alpha(found.alpha, wanted, METHODS.get(method, "rkl_raw"))


def check_large_alpha(alpha: np.ndarray, wanted: dict[str, Any], name: str) -> None:
    target = np.array([wanted[f"alpha_{name}"]])
    if name == "rkl_raw":
        target = np.clip(target, *RKL_BOUNDS)
    jeffreys, sd = np.array([wanted["jeffreys"]]), np.array([wanted["sd_at_alpha"]])
    cases.check_alpha(alpha, target, jeffreys, sd, False, name)
