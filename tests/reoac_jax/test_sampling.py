"""One-pass summaries of scores: exact where deterministic, right distribution where drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from reoac_jax import sampling
from reoac_jax.sampling import (
    best_of_rows,
    entropy_and_sample,
    logit_entropy,
    row_keys,
    sample_tokens,
    summarise_scores,
)


def reference(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shifted = scores - scores.max(-1, keepdims=True)
    weight = np.exp(shifted)
    return weight / weight.sum(-1, keepdims=True), np.log(weight.sum(-1)) + scores.max(-1)


@pytest.mark.parametrize(("width", "suppress"), [(7, -1), (33, 32), (100, 0), (1000, 517)])
@pytest.mark.parametrize("block", [2**19, 64, 1500])
def test_summary(width: int, suppress: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(width)
    scores = rng.normal(size=(3, 5, width)).astype(np.float32) * 4
    classes = rng.random((width, 2)) < 0.3
    # A suppressed token may tower above the rest without being noticed.
    if suppress >= 0:
        scores[:, :, suppress] = 300.0
    found = summarise_scores(
        jnp.asarray(scores), suppress_id=suppress, classes=jnp.asarray(classes)
    )
    allowed = scores.astype(np.float64)
    if suppress >= 0:
        allowed[:, :, suppress] = -1e9
    probability, log_norm = reference(allowed)
    entropy = -(probability * np.log(np.maximum(probability, 1e-300))).sum(-1) / np.log(width)
    np.testing.assert_array_equal(found.best, allowed.argmax(-1))
    np.testing.assert_array_equal(found.sampled, found.best)
    np.testing.assert_allclose(found.confidence, probability.max(-1), rtol=1e-5)
    np.testing.assert_allclose(found.entropy, entropy, atol=2e-6)
    np.testing.assert_allclose(found.log_norm, log_norm, rtol=1e-5)
    np.testing.assert_allclose(found.class_mass, probability @ classes, atol=1e-5)
    best, confidence = jax.jit(best_of_rows, static_argnums=1)(
        jnp.asarray(scores.reshape(15, width)), suppress
    )
    np.testing.assert_array_equal(best.reshape(3, 5), found.best)
    np.testing.assert_allclose(confidence.reshape(3, 5), probability.max(-1), rtol=1e-5)


def test_ties_go_to_the_first_token() -> None:
    scores = np.zeros((1, 4, 90), np.float32)
    scores[0, 1, [40, 80]] = 1.0
    scores[0, 2, [88, 89]] = 1.0
    assert summarise_scores(jnp.asarray(scores)).best[0].tolist() == [0, 40, 88, 0]
    assert best_of_rows(jnp.asarray(scores[0]))[0].tolist() == [0, 40, 88, 0]


@pytest.mark.parametrize("low", [-np.inf, -1e12])
def test_impossible_tokens(low: float) -> None:
    scores = np.full((1, 2, 50), low, np.float32)
    scores[0, 0, 7] = 0.0
    scores[0, 1, [3, 9]] = 2.0
    entropy = logit_entropy(jnp.asarray(scores))
    np.testing.assert_allclose(entropy, [[0.0, np.log(2) / np.log(50)]], atol=1e-6)
    np.testing.assert_allclose(best_of_rows(jnp.asarray(scores[0]))[1], [1.0, 0.5], atol=1e-6)
    keys = row_keys(jax.random.key(0), 0, jnp.arange(400))
    drawn = sample_tokens(keys, jnp.broadcast_to(scores, (400, 2, 50)), 5.0)
    assert set(np.asarray(drawn[:, 0])) == {7}
    assert set(np.asarray(drawn[:, 1])) == {3, 9}


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("width", [11, 300])
def test_draws_follow_the_softmax(width: int, temperature: float) -> None:
    rng = np.random.default_rng(3)
    scores = (rng.normal(size=width) * 1.5).astype(np.float32)
    suppress = int(scores.argmax())
    rows, columns = 250, 80
    keys = row_keys(jax.random.key(5), 1, jnp.arange(rows))
    drawn = sample_tokens(
        keys, jnp.broadcast_to(scores, (rows, columns, width)), temperature, suppress_id=suppress
    )
    expected = np.exp(scores.astype(np.float64) / temperature)
    expected[suppress] = 0.0
    expected *= rows * columns / expected.sum()
    counts = np.bincount(np.asarray(drawn).ravel(), minlength=width)
    assert counts[suppress] == 0
    rare = expected < 8
    bins = [*counts[~rare], counts[rare].sum()], [*expected[~rare], expected[rare].sum()]
    if bins[1][-1] == 0:
        bins = bins[0][:-1], bins[1][:-1]
    assert chisquare(*bins).pvalue > 1e-3


def test_rows_do_not_depend_on_the_batch() -> None:
    scores = jax.random.normal(jax.random.key(1), (6, 4, 60))
    rows = jnp.arange(6)
    entropy, drawn = entropy_and_sample(row_keys(jax.random.key(2), 3, rows), scores)
    part = jnp.asarray([4, 1])
    some_entropy, some = entropy_and_sample(
        row_keys(jax.random.key(2), 3, rows[part]), scores[part]
    )
    np.testing.assert_array_equal(drawn[part], some)
    np.testing.assert_allclose(entropy[part], some_entropy, rtol=1e-6)
    other = sample_tokens(row_keys(jax.random.key(2), 4, rows), scores)
    assert np.any(other != drawn)
