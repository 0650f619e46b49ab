"""Filters, special tokens, support and forced rows."""

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
from qstar.law import LawSettings, keep_target_mass, log_weights
from qstar.tilt import AlphaSettings, tilt
from tests.qstar import plain

ROWS, WIDTH = 4, 12
few = hypothesis.settings(max_examples=40, deadline=None)
logits = extra.arrays(np.float32, (ROWS, WIDTH), elements=st.floats(-12, 12, width=32))


@functools.cache
def law(settings: LawSettings) -> Any:
    def run(x: jax.Array, y: jax.Array, special: jax.Array, forced: jax.Array) -> jax.Array:
        found = tilt(x, y, AlphaSettings(), 1.0, forced)
        return jax.nn.softmax(log_weights(found, settings, special), axis=-1)

    return jax.jit(run)


def probabilities(
    x: np.ndarray,
    y: np.ndarray,
    settings: LawSettings,
    special: list[int] | None = None,
    forced: np.ndarray | None = None,
) -> np.ndarray:
    mask = np.isin(np.arange(x.shape[1]), special or [])
    given = np.zeros(len(x), bool) if forced is None else forced
    return np.asarray(law(settings)(x, y, mask, given))


@functools.cache
def weights_of(settings: LawSettings) -> Any:
    """Log weights of the law without and with its filters, made by one program."""

    def run(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = tilt(x, y, AlphaSettings(), 1.0)
        return log_weights(found, LawSettings()), log_weights(found, settings)

    return jax.jit(run)


def prefix_length(sorted_weights: np.ndarray, top_k: int, top_p: float) -> tuple[int, float]:
    """Tokens of the shortest prefix that reaches p of the k most probable.

    Also how close any prefix's mass comes to p: below rounding, either neighbour is right.
    """
    kept = sorted_weights[:top_k] if top_k > 0 else sorted_weights
    p = np.exp(kept.astype(np.float64) - kept[0])
    mass = np.cumsum(p) / p.sum()
    if top_p >= 1:
        return len(kept), np.inf
    return int(np.argmax(mass >= top_p)) + 1, float(np.abs(mass - top_p).min())


def nearly_tied() -> np.ndarray:
    """Zeros with a first column below them by less than any sum can show."""
    return np.where(np.arange(WIDTH) == 0, np.float32(-5.9e-38), np.zeros((ROWS, 1), np.float32))


@few
@hypothesis.given(logits, logits, st.sampled_from([(3, 1.0), (-1, 0.7), (5, 0.4), (1, 0.9)]))
@hypothesis.example(np.zeros((ROWS, WIDTH), np.float32), nearly_tied(), (1, 0.9))
def test_filters_against_sorting(x: np.ndarray, y: np.ndarray, cut: tuple[int, float]) -> None:
    # The law orders log weights: two that differ by less than a probability can resolve are no tie.
    full, got = map(np.asarray, weights_of(LawSettings(top_k=cut[0], top_p=cut[1]))(x, y))
    for row in range(ROWS):
        kept = got[row] > -np.inf
        np.testing.assert_array_equal(got[row][kept], full[row][kept])
        ordered = np.sort(full[row])[::-1]
        count, margin = prefix_length(ordered, *cut)
        found = int(kept.sum())
        assert found == count or (margin < 1e-5 and abs(found - count) == 1)
        np.testing.assert_array_equal(np.sort(full[row][kept])[::-1], ordered[:found])


@few
@hypothesis.given(logits)
def test_filters_are_idempotent(x: np.ndarray) -> None:
    settings = LawSettings(top_k=6, top_p=0.8)
    once = probabilities(x, x, settings)
    with np.errstate(divide="ignore"):
        again = np.log(once)
    # What is left has the mass 1 > 0.8 of itself; only the nucleus can shrink, top-k cannot.
    twice = probabilities(again, again, LawSettings(top_k=6))
    np.testing.assert_allclose(twice, once, rtol=1e-4, atol=1e-7)


def test_ties_go_to_the_lower_id() -> None:
    x = np.zeros((1, WIDTH), np.float32)
    x[0, [2, 5, 9]] = 1.0
    got = probabilities(x, x, LawSettings(top_k=2))
    assert np.flatnonzero(got[0]).tolist() == [2, 5]
    got = probabilities(x, x, LawSettings(top_k=5))
    assert np.flatnonzero(got[0]).tolist() == [0, 1, 2, 5, 9]


def test_forced_rows_are_the_target_unfiltered() -> None:
    rng = np.random.default_rng(0)
    x, y = plain.random_pairs(rng, WIDTH, (1, 2, 3, 4))
    x[0, 3] = -np.inf  # the target may draw what the other model forbids
    forced = np.array([True, False, True, False])
    settings = LawSettings("target_mass", "target", 2, 0.9, 3, 0.5)
    got = probabilities(x, y, settings, [0, 1], forced)
    np.testing.assert_allclose(got[forced], jax.nn.softmax(y[forced], axis=-1), rtol=1e-5)
    assert np.all((got[~forced] > 0).sum(-1) <= 3)


def test_support_keeps_the_targets_top_tokens() -> None:
    rng = np.random.default_rng(1)
    x, y = plain.random_pairs(rng, WIDTH, (1, 2, 3, 4))
    full = probabilities(x, y, LawSettings())
    got = probabilities(x, y, LawSettings(support="target", support_top_k=4))
    for row in range(ROWS):
        kept = np.sort(np.argsort(-y[row])[:4])
        assert np.flatnonzero(got[row]).tolist() == kept.tolist()
        np.testing.assert_allclose(got[row, kept], full[row, kept] / full[row, kept].sum(), 1e-5)


def test_special_tokens_keep_the_targets_mass() -> None:
    rng = np.random.default_rng(2)
    x, y = plain.random_pairs(rng, WIDTH, (1, 2, 3, 4))
    special = [0, 7]
    full = probabilities(x, y, LawSettings())
    got = probabilities(x, y, LawSettings("target_mass"), special)
    target = np.asarray(jax.nn.softmax(y, axis=-1))
    np.testing.assert_allclose(got[:, special], target[:, special], rtol=1e-4)
    others = np.setdiff1d(np.arange(WIDTH), special)
    left = 1 - target[:, special].sum(-1, keepdims=True)
    share = full[:, others] / full[:, others].sum(-1, keepdims=True)
    np.testing.assert_allclose(got[:, others], left * share, rtol=1e-4)


def test_special_tokens_may_be_all_there_is() -> None:
    weights = jnp.array([[-jnp.inf, -1.0, -jnp.inf]])
    log_t = jnp.array([[-2.0, -1.0, -jnp.inf]])
    got = keep_target_mass(weights, log_t, jnp.array([True, True, False]))
    np.testing.assert_array_equal(got, log_t)
    with pytest.raises(ValueError, match="special"):
        log_weights(tilt(log_t, log_t, AlphaSettings()), LawSettings("target_mass"))


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"special_tokens": "double"}, "q.special_tokens"),
        ({"support": "none"}, "q.support"),
        ({"support_top_p": 0.0}, "q.support_top_p"),
        ({"top_p": 1.5}, "sampling.top_p"),
    ],
)
def test_bad_settings_name_the_key(bad: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        LawSettings(**bad)
