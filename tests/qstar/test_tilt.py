"""Exponents: closed forms, an independent slow version, symmetries, extremes."""

import functools
from typing import Any

import hypothesis
import hypothesis.extra.numpy as extra
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from qstar import columns, solvers
from qstar.diagnostics import diagnose
from qstar.pair import make_pair
from qstar.tilt import (
    BOUNDARY,
    CLAMPED,
    FORCED,
    IDENTICAL,
    INVALID,
    METHODS,
    NO_OVERLAP,
    AlphaSettings,
    solve,
    tilt,
)
from tests.qstar import plain

ROWS, WIDTH = 4, 24
KL = AlphaSettings()


@functools.cache
def compiled(settings: AlphaSettings, temperature: float = 1.0) -> Any:
    return jax.jit(lambda x, y: solve(x, y, settings, temperature))


def alphas(x: Any, y: Any, settings: AlphaSettings = KL, temperature: float = 1.0) -> Any:
    """Alphas and flags of rows, padded to one compiled shape with inert columns."""
    x, y = (np.atleast_2d(np.asarray(z, np.float32)) for z in (x, y))
    room = ((0, -len(x) % ROWS), (0, -x.shape[1] % WIDTH))
    x, y = (np.pad(z, room, constant_values=-np.inf) for z in (x, y))
    pairs = [(x[i : i + ROWS], y[i : i + ROWS]) for i in range(0, len(x), ROWS)]
    found = [compiled(settings, temperature)(*pair) for pair in pairs]
    count = len(x) - room[0][1]
    return tuple(np.concatenate([np.asarray(f[i]) for f in found])[:count] for i in (0, 1))


def check(x: np.ndarray, y: np.ndarray, alpha: np.ndarray, method: str, temperature: float) -> None:
    """The stated tolerance against the slow version."""
    for row, (p, q) in enumerate(zip(x, y, strict=True)):
        b, d = plain.pair(p, q, temperature)
        wanted = {"kl": plain.kl_alpha, "ess": plain.ess_alpha}[method](b, d)
        jeffreys = plain.mean_d(b, d, 1.0) - plain.mean_d(b, d, 0.0)
        error = abs(float(alpha[row]) - wanted)
        if jeffreys >= 0.1:
            assert error <= 1e-5, (row, alpha[row], wanted)
        else:
            assert error * np.sqrt(plain.variance_d(b, d, wanted)) <= 2e-4, (row, alpha[row])


@pytest.mark.parametrize("temperature", [0.05, 0.6, 1.0, 8.0])
@pytest.mark.parametrize("method", ["kl_symmetry", "ess_balance"])
def test_against_the_slow_version(method: str, temperature: float) -> None:
    rng = np.random.default_rng(0)
    scales = [(1e-4, 3.0), (1e-3, 8.0), (0.02, 3.0), (0.3, 1.0), (1.0, 3.0), (5.0, 5.0)]
    scales += [(20.0, 1.0), (0.5, 30.0)]
    rows = [plain.random_pair(rng, 23, *scale) for scale in scales]
    x, y = (np.stack([row[i] for row in rows]) for i in (0, 1))
    alpha, flags = alphas(x, y, AlphaSettings(method), temperature)
    check(x, y, alpha, method[: method.index("_")], temperature)
    assert not np.any(flags & ~IDENTICAL)


def test_two_tokens_have_a_closed_form() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 32, 2)).astype(np.float32) * rng.choice([1, 10, 80], (32, 1))
    alpha, _ = alphas(x, y)
    for row in range(len(x)):
        b, d = plain.pair(x[row], y[row])
        wanted = (np.log(-d[1] / d[0]) - (b[0] - b[1])) / (d[0] - d[1])
        jeffreys = plain.mean_d(b, d, 1.0) - plain.mean_d(b, d, 0.0)
        if jeffreys >= 0.1:
            assert abs(alpha[row] - wanted) <= 1e-5


def test_more_iterations_than_needed() -> None:
    rng = np.random.default_rng(2)
    x, y = plain.random_pairs(rng, 24, (0.5, 1, 3, 9))
    usual, _ = alphas(x, y)
    for settings in (AlphaSettings(tol=1e-30), AlphaSettings("ess_balance", tol=1e-30)):
        if settings.method == "ess_balance":
            usual, _ = alphas(x, y, AlphaSettings("ess_balance"))
        stubborn, _ = alphas(x, y, settings)
        np.testing.assert_allclose(stubborn, usual, rtol=0, atol=2e-6)


def test_bisection_agrees_to_its_resolution() -> None:
    rng = np.random.default_rng(3)
    x, y = plain.random_pairs(rng, 24, (0.5, 1, 3, 9))
    newton, _ = alphas(x, y)
    halved, _ = alphas(x, y, AlphaSettings(solver="bisection"))
    np.testing.assert_allclose(halved, newton, rtol=0, atol=3e-6)


def test_entropy_and_reverse_kl_formulas() -> None:
    rng = np.random.default_rng(4)
    x, y = plain.random_pairs(rng, 24, (0.5, 1, 3, 9))
    a = np.stack([plain.log_softmax(r.astype(np.float64)) for r in x])
    b = np.stack([plain.log_softmax(r.astype(np.float64)) for r in y])
    p, q = np.exp(a), np.exp(b)
    h_theta, h_t = -np.sum(p * a, -1), -np.sum(q * b, -1)
    there, back = np.sum(p * (a - b), -1), np.sum(q * (b - a), -1)
    found, _ = alphas(x, y, AlphaSettings("entropy"))
    np.testing.assert_allclose(found, h_theta / (h_theta + h_t), atol=1e-6)
    found, _ = alphas(x, y, AlphaSettings("reverse_kl_symmetry"))
    wanted = np.clip((h_theta - h_t + there) / (there + back), 0.1, 0.9)
    np.testing.assert_allclose(found, wanted, atol=5e-6)


# ------------------------------------------------------------------------------------ properties
finite = st.floats(-40, 40, width=32)
entry = st.one_of(finite, finite, finite, st.just(-np.inf))
logits = extra.arrays(np.float32, (ROWS, WIDTH), elements=entry)
dense = extra.arrays(np.float32, (ROWS, WIDTH), elements=finite)
few = hypothesis.settings(max_examples=40, deadline=None)


@functools.cache
def everything() -> Any:
    def run(x: jax.Array, y: jax.Array) -> Any:
        found = tilt(x, y, KL)
        return diagnose(found)

    return jax.jit(run)


@few
@hypothesis.given(logits, logits)
def test_ranges(x: np.ndarray, y: np.ndarray) -> None:
    got = jax.device_get(everything()(x, y))
    for row in range(ROWS):
        flags = int(got.flags[row])
        if not (np.isfinite(x[row]).any() and np.isfinite(y[row]).any()):
            assert flags == INVALID
            continue
        assert not flags & INVALID
        alone = not (np.isfinite(x[row]) & np.isfinite(y[row])).any()
        assert bool(flags & NO_OVERLAP) == alone
        assert 0 <= got.alpha[row] <= 1
        assert 0 <= got.ess_theta[row] <= 1 and 0 <= got.ess_t[row] <= 1
        assert got.kl_t[row] >= 0 and (alone or got.kl_theta[row] >= 0)
        assert got.entropy_q[row] <= np.log(WIDTH) + 1e-5
        if not flags:
            b, d = plain.pair(x[row], y[row])
            # The root's residual: both divergences agree.
            largest = 1 + np.abs(d).max()
            assert got.kl_diff[row] <= 1e-4 * largest, got.kl_diff[row]
            assert abs(got.log_z[row] - plain.log_z(b, d, float(got.alpha[row]))) <= 1e-5 * largest


@few
@hypothesis.given(dense, dense, st.floats(-20, 20, width=32), st.integers(0, 2**31))
def test_symmetries(x: np.ndarray, y: np.ndarray, shift: float, seed: int) -> None:
    alpha, _ = compiled(KL)(x, y)
    swapped, _ = compiled(KL)(y, x)
    shifted, _ = compiled(KL)(x + np.float32(shift), y)
    order = np.random.default_rng(seed).permutation(WIDTH)
    permuted, _ = compiled(KL)(x[:, order], y[:, order])
    for row in range(ROWS):
        b, d = plain.pair(x[row], y[row])
        sd = np.sqrt(plain.variance_d(b, d, float(alpha[row])))
        jeffreys = plain.mean_d(b, d, 1.0) - plain.mean_d(b, d, 0.0)
        for other in (1 - swapped[row], shifted[row], permuted[row]):
            error = abs(float(alpha[row]) - float(other))
            # A shift rounds the logits themselves: 4e-6 of noise on each.
            assert error <= 2e-5 + 4e-5 / sd if jeffreys >= 0.1 else error * sd <= 4e-4


def test_log_z_is_convex_and_vanishes_at_the_models() -> None:
    rng = np.random.default_rng(5)
    x, y = plain.random_pair(rng, 500, 2.0)
    pair = make_pair(jnp.asarray(x)[None], jnp.asarray(y)[None], 0.7)
    grid = tuple(jnp.array([s], jnp.float32) for s in np.linspace(-1, 2, 13))
    found = jax.jit(lambda pair: solvers.log_sums(pair, grid, with_mean=True))(pair)
    k = np.array([float(f.log_z[0]) for f in found])
    slope = np.array([float(f.mean[0]) for f in found])
    assert abs(k[4]) < 1e-6 and abs(k[8]) < 1e-6
    assert np.all(np.diff(k, 2) > 0) and np.all(np.diff(slope) > 0)
    b, d = plain.pair(x, y, 0.7)
    wanted = [plain.log_z(b, d, s) for s in np.linspace(-1, 2, 13)]
    np.testing.assert_allclose(k, wanted, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ edge cases
def test_one_hot_models() -> None:
    hot = np.full(WIDTH, -np.inf)
    hot[3] = 0.0
    flat = np.zeros(WIDTH)
    x, y = np.stack([hot, flat, hot]), np.stack([flat, hot, np.roll(hot, 1)])
    alpha, flags = alphas(x, y)
    assert alpha.tolist() == [0.0, 1.0, 0.0]
    assert flags.tolist() == [BOUNDARY, BOUNDARY, NO_OVERLAP]
    same, flags = alphas(hot[None], hot[None])
    assert same[0] == 0.5 and flags[0] == IDENTICAL


def test_models_that_hardly_overlap_numerically() -> None:
    # Probabilities underflow a thousand times over; the exponents are still exact.
    x = np.array([[0.0, -3e4, -2e4], [0.0, -500.0, -700.0], [3e4, 0.0, -3e4]], np.float32)
    y = np.array([[-3e4, 0.0, -1e4], [-400.0, 0.0, -100.0], [0.0, 3e4, 1e4]], np.float32)
    alpha, flags = alphas(x, y)
    for row in range(3):
        assert abs(alpha[row] - plain.kl_alpha(*plain.pair(x[row], y[row]))) <= 1e-5
    assert not flags.any()


def test_rounding_noise_counts_as_identical_or_is_harmless() -> None:
    rng = np.random.default_rng(6)
    y = rng.normal(size=(8, WIDTH)).astype(np.float32)
    x = (y + np.float32(37.25)).astype(np.float32)
    alpha, flags = alphas(x, y)
    assert np.all(np.abs(alpha - 0.5) <= 1e-3)
    exact, flags = alphas(y, y)
    assert np.all(exact == 0.5) and np.all(flags == IDENTICAL)


def test_forced_and_clamped_rows() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32) * 4
    forced = np.array([True, False, False, True])
    settings = AlphaSettings(min=0.999)
    found = jax.jit(lambda x, y: tilt(x, y, settings, 1.0, jnp.asarray(forced)))(x, y)
    assert found.flags.tolist() == [FORCED, CLAMPED, CLAMPED, FORCED]
    np.testing.assert_allclose(found.alpha, [0, 0.999, 0.999, 0], rtol=1e-6)
    free, flags = alphas(x, y, AlphaSettings("fixed", fixed=0.3, min=0.9))
    assert np.all(free == np.float32(0.3)) and not flags.any()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_survives_bad_rows(method: str) -> None:
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    x[1, 4], y[2, 0], x[3] = np.nan, np.inf, -np.inf
    alpha, flags = alphas(x, y, AlphaSettings(method))
    assert flags[1:].tolist() == [INVALID] * 3 and flags[0] == 0
    assert np.isfinite(alpha).all()
    alone, _ = alphas(x[:1], y[:1], AlphaSettings(method))
    assert alpha[0] == alone[0]


# --------------------------------------------------------------------------------- compiled form
def test_rows_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    x, y = plain.random_pairs(rng, 50, (1.5,) * 11)

    def run() -> Any:
        return jax.jit(lambda x, y: diagnose(tilt(x, y, KL, 0.9)))(x, y)

    monkeypatch.setattr(columns, "ROWS", 100)
    whole = run()
    monkeypatch.setattr(columns, "ROWS", 4)
    monkeypatch.setattr(columns, "COLUMNS", 7)
    parts = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), whole, parts)
    mapped = jax.jit(jax.vmap(lambda p, q: solve(p[None], q[None], KL, 0.9)[0][0]))(x, y)
    np.testing.assert_allclose(mapped, whole.alpha, rtol=0, atol=2e-6)


def test_one_trace_and_no_temporary_of_the_vocabularys_size() -> None:
    traces = 0

    @jax.jit
    def run(x: jax.Array, y: jax.Array) -> Any:
        nonlocal traces
        traces += 1
        return solve(x, y, KL)

    rng = np.random.default_rng(10)
    for _ in range(2):
        run(*(rng.normal(size=(2, 3, 40)).astype(np.float32)))
    assert traces == 1
    rows, width = 2, 40 * columns.COLUMNS
    shape = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    pair = jax.eval_shape(lambda x, y: make_pair(x, y, 1.0), shape, shape)
    point = jax.ShapeDtypeStruct((rows,), jnp.float32)
    for one in (solvers._log_ratio, solvers._log_ratio_exact, solvers._ess_gap):
        memory = jax.jit(one).lower(pair, point).compile().memory_analysis()
        if jax.default_backend() == "cpu":
            assert memory.temp_size_in_bytes < rows * width * 4 / 2, one.__name__


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"method": "best"}, "alpha.method"),
        ({"solver": "secant"}, "alpha.solver"),
        ({"method": "entropy", "solver": "bisection"}, "alpha.solver"),
        ({"fixed": 1.5}, "alpha.fixed"),
        ({"tol": 0.0}, "alpha.tol"),
        ({"min": 0.6, "max": 0.5}, "alpha.min"),
    ],
)
def test_bad_settings_name_the_key(bad: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        AlphaSettings(**bad)
    assert AlphaSettings("fixed", fixed=1.5, extrapolate=True).fixed == 1.5
    with pytest.raises(UserError, match="temperature"):
        tilt(jnp.zeros((1, 2)), jnp.zeros((1, 2)), KL, -1.0)
