"""Drawn tokens: their law, their keys, greedy ties, whole steps against the recorded law."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from qstar.law import LawSettings, log_weights
from qstar.sampling import (
    DRAWS,
    NO_TOKEN,
    draw,
    greedy,
    log_probabilities,
    sample_key,
    token_keys,
)
from qstar.step import mix_step
from qstar.tilt import INVALID, AlphaSettings, tilt
from tests.qstar import plain

compiled_draw = jax.jit(draw, static_argnums=2)


def keys_of(count: int, seed: int = 0) -> jax.Array:
    """Keys of so many samples, first token."""
    keys = jax.vmap(lambda i: sample_key(seed, i, 0))(jnp.arange(count))
    return token_keys(keys, jnp.zeros(count, jnp.int32))


@pytest.mark.parametrize("method", DRAWS)
def test_law_of_the_draws(method: str) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=40).astype(np.float32) * 2
    weights[[0, 11, 39]] = -np.inf
    count = 20000
    drawn = compiled_draw(keys_of(count), jnp.broadcast_to(weights, (count, 40)), method)
    seen = np.bincount(np.asarray(drawn), minlength=40)
    expected = count * np.asarray(jax.nn.softmax(weights.astype(np.float64)))
    assert seen[expected == 0].sum() == 0
    frequent = expected > 5
    rest = [seen[~frequent].sum()], [expected[~frequent].sum()]
    observed = np.append(seen[frequent], rest[0])
    assert chisquare(observed, np.append(expected[frequent], rest[1])).pvalue > 1e-3


@pytest.mark.parametrize("method", DRAWS)
def test_a_rows_draw_does_not_depend_on_the_others(method: str) -> None:
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(8, 40)).astype(np.float32)
    keys = keys_of(8)
    whole = compiled_draw(keys, weights, method)
    order = np.array([5, 1, 7])
    np.testing.assert_array_equal(compiled_draw(keys[order], weights[order], method), whole[order])
    later = token_keys(jax.vmap(lambda i: sample_key(0, i, 0))(jnp.arange(8)), jnp.arange(8))
    assert jnp.any(jax.random.key_data(later) != jax.random.key_data(keys))


@pytest.mark.parametrize("method", DRAWS)
def test_nothing_to_draw(method: str) -> None:
    weights = jnp.array([[0.0, -jnp.inf], [-jnp.inf, -jnp.inf], [jnp.nan, 0.0], [-jnp.inf, -900.0]])
    drawn = compiled_draw(keys_of(4), weights, method)
    assert drawn.tolist() == [0, NO_TOKEN, NO_TOKEN, 1]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    # Half-precision logits tie often: alpha = 1 has to be pi_theta's own first maximum.
    rng = np.random.default_rng(2)
    x = np.round(rng.normal(size=(16, 50)) * 2).astype(np.float32)
    y = rng.normal(size=(16, 50)).astype(np.float32) * 7

    @jax.jit
    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        found = tilt(x, y, AlphaSettings("fixed", fixed=1.0), 0.0)
        return greedy(found, log_weights(found, LawSettings()))

    np.testing.assert_array_equal(run(x, y), x.argmax(-1))


def test_log_probabilities() -> None:
    rng = np.random.default_rng(3)
    x, y = plain.random_pairs(rng, 30, (1, 2, 3))
    found = tilt(jnp.asarray(x), jnp.asarray(y), AlphaSettings(), 0.7)
    token = jnp.array([4, 0, 29])
    log_q, log_theta, log_t = log_probabilities(found, log_weights(found, LawSettings()), token)
    for row, at in enumerate(token.tolist()):
        a, b = (plain.log_softmax(z[row].astype(np.float64) / 0.7) for z in (x, y))
        alpha = float(found.alpha[row])
        wanted = plain.log_softmax(alpha * a + (1 - alpha) * b)[at]
        got = [float(v[row]) for v in (log_q, log_theta, log_t)]
        np.testing.assert_allclose(got, [wanted, a[at], b[at]], rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnums=(3, 4))
def step(x: Any, y: Any, keys: Any, law: LawSettings, temperature: float) -> Any:
    return mix_step(x, y, keys, AlphaSettings(), law, temperature)


def test_a_whole_step() -> None:
    rng = np.random.default_rng(4)
    x, y = plain.random_pairs(rng, 30, (1, 2, 3, 4))
    y[2, 5] = np.nan
    got = step(x, y, keys_of(4), LawSettings(top_k=5, top_p=0.9), 0.7)
    good = np.array([True, True, False, True])
    assert np.all(np.asarray(got.token)[good] >= 0) and got.token[2] == NO_TOKEN
    assert got.diagnostics.flags.tolist() == [0, 0, INVALID, 0]
    assert np.all(np.isfinite(np.asarray(got.log_q)[good]))
    # Diagnostics are those of the unfiltered law.
    plainly = step(x, y, keys_of(4), LawSettings(), 0.7)
    for name in ("alpha", "ess_theta", "kl_t"):
        one, other = (np.asarray(getattr(s.diagnostics, name)) for s in (got, plainly))
        np.testing.assert_array_equal(one[good], other[good])
    again = step(x, y, keys_of(4), LawSettings(top_k=5, top_p=0.9), 0.7)
    np.testing.assert_array_equal(got.token, again.token)
