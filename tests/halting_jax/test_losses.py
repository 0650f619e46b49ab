"""Masked losses against NumPy loops, and sums by difficulty."""

import jax
import jax.numpy as jnp
import numpy as np

from halting_jax import losses
from halting_jax.types import Ratio

RNG = np.random.default_rng(3)
MASK = RNG.random((5, 4, 3)) < 0.6


def test_cross_entropy_against_a_loop():
    logits = RNG.normal(size=(5, 4, 3, 7)).astype(np.float32)
    targets = RNG.integers(0, 7, size=(5, 4, 3)).astype(np.int32)
    got = losses.masked_cross_entropy(jnp.asarray(logits), targets, MASK)
    total, count = np.zeros(5), np.zeros(5)
    for b, t, k in np.argwhere(MASK):
        z = logits[b, t, k].astype(np.float64)
        total[b] -= np.log(np.exp(z[targets[b, t, k]]) / np.exp(z).sum())
        count[b] += 1
    np.testing.assert_allclose(got.total, total, rtol=1e-5)
    np.testing.assert_array_equal(got.count, count)


def test_binary_cross_entropy_against_a_loop():
    logits = RNG.normal(size=(5, 4, 3)).astype(np.float32) * 3
    targets = RNG.integers(0, 2, size=(5, 4, 3)).astype(np.int32)
    got = losses.masked_binary_cross_entropy(jnp.asarray(logits), targets, MASK)
    total = np.zeros(5)
    for index in np.argwhere(MASK):
        p = 1 / (1 + np.exp(-float(logits[tuple(index)])))
        total[index[0]] -= np.log(p if targets[tuple(index)] else 1 - p)
    np.testing.assert_allclose(got.total, total, rtol=1e-5)
    np.testing.assert_array_equal(got.count, MASK.sum((1, 2)))


def test_losses_of_extreme_logits_are_finite():
    logits = jnp.asarray([[1e4], [-1e4], [-200.0]])
    targets = np.array([[0], [1], [0]], np.int32)
    ones = np.ones((3, 1), bool)
    binary = losses.masked_binary_cross_entropy(logits, targets, ones)
    np.testing.assert_allclose(binary.total, [1e4, 1e4, 0.0])
    both = jnp.stack([jnp.zeros_like(logits), logits], axis=-1)
    np.testing.assert_allclose(losses.masked_cross_entropy(both, targets, ones).total, binary.total)


def test_a_large_wrong_class_does_not_overflow_the_gradient():
    grad = jax.grad(
        lambda z: losses.masked_cross_entropy(
            z, jnp.zeros((1,), jnp.int32), jnp.ones((1,), bool)
        ).total.sum()
    )(jnp.asarray([[-3e38, 3e38]]))
    np.testing.assert_array_equal(grad, [[-1.0, 1.0]])


def test_sequence_metrics_leave_rows_without_targets_out():
    correct = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    mask = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
    got = losses.sequence_metrics(correct, mask, "token", "row")
    assert {name: (float(r.total), float(r.count)) for name, r in got.items()} == {
        "token": (3.0, 4.0),
        "row": (1.0, 2.0),
        "sequence_error": (1.0, 2.0),
    }
    np.testing.assert_array_equal(losses.all_correct(correct, mask), [True, False, False])
    assert set(losses.sequence_metrics(correct, mask, "token")) == {"token", "sequence_error"}


def test_by_difficulty():
    values = jnp.asarray([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    difficulty = jnp.asarray([1, 3, 3, 0, 4, -1], jnp.int32)
    got = losses.by_difficulty(values, difficulty, 3)
    assert isinstance(got, Ratio)
    np.testing.assert_array_equal(got.total, [1, 0, 6])
    np.testing.assert_array_equal(got.count, [1, 0, 2])
    np.testing.assert_array_equal(got.value, [1, 0, 3])
    mask = jnp.asarray([False, True, False, True, True, True])
    masked = losses.by_difficulty(values.at[0].set(jnp.nan), difficulty, 3, mask)
    np.testing.assert_array_equal(masked.total, [0, 0, 2])
    np.testing.assert_array_equal(masked.count, [0, 0, 1])


def test_by_difficulty_counts_truths():
    got = losses.by_difficulty(jnp.asarray([True, False, True]), jnp.asarray([2, 2, 2]), 2)
    np.testing.assert_array_equal(got.total, [0, 2])
    np.testing.assert_array_equal(got.count, [0, 3])
    assert got.total.dtype == jnp.float32


def test_half_precision_is_summed_in_single():
    logits = jnp.zeros((2, 300, 5), jnp.bfloat16)
    targets, mask = jnp.zeros((2, 300), jnp.int32), jnp.ones((2, 300), bool)
    got = losses.masked_cross_entropy(logits, targets, mask)
    assert got.total.dtype == jnp.float32
    np.testing.assert_allclose(got.total, 300 * np.log(5), rtol=1e-5)
    bits = losses.masked_binary_cross_entropy(logits[..., 0], targets, mask)
    np.testing.assert_allclose(bits.total, 300 * np.log(2), rtol=1e-5)
