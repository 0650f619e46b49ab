"""From the states of chosen answers to keys and correction vectors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

QUALITIES = ("reward_gap", "separation")


class Contrast(NamedTuple):
    """Every control point and layer of one question.

    Attributes:
        right: [M, LQ, H] float32, mean state of the positives.
        wrong: [M, LQ, H] float32, mean state of the negatives.
        vector: [M, LQ, H] float32, right - wrong.
        quality: [M, LQ], what a pair is ranked by.
        reward_pos: [M], mean reward of the positives.
        reward_neg: [M].
        finite: [M, LQ] bool, the vector holds numbers.
    """

    right: jax.Array
    wrong: jax.Array
    vector: jax.Array
    quality: jax.Array
    reward_pos: jax.Array
    reward_neg: jax.Array
    finite: jax.Array


def contrast(
    states: jax.Array,
    pos: jax.Array,
    neg: jax.Array,
    reward: jax.Array,
    quality: str = "reward_gap",
) -> Contrast:
    """Means of both sets at every control point, their difference and its quality.

    The quality is the gap of the mean rewards. Under "separation" it is multiplied by
    |v|^2 / (|v|^2 + s), where s is the mean squared distance of the answers to their set's mean:
    1 where the sets are points, near 0 where they overlap.

    Args:
        states: [K, M, LQ, H] float32, zeros where an answer was not chosen.
        pos: [M, K] bool.
        neg: [M, K] bool.
        reward: [K].
        quality: one of QUALITIES; static.
    """
    right, reward_pos = _mean(states, pos), _mean_reward(reward, pos)
    wrong, reward_neg = _mean(states, neg), _mean_reward(reward, neg)
    vector = right - wrong
    gap = jnp.broadcast_to((reward_pos - reward_neg)[:, None], vector.shape[:2])
    if quality == "separation":
        distance = jnp.sum(vector**2, axis=-1)
        spread = _spread(states, right, pos) + _spread(states, wrong, neg)
        gap = gap * distance / jnp.maximum(distance + spread, 1e-12)
    return Contrast(
        right=right,
        wrong=wrong,
        vector=vector,
        quality=gap,
        reward_pos=reward_pos,
        reward_neg=reward_neg,
        finite=jnp.isfinite(vector).all(axis=-1),
    )


def _mean(states: jax.Array, chosen: jax.Array) -> jax.Array:
    weights = chosen.astype(states.dtype)
    total = jnp.einsum("mk,kmlh->mlh", weights, states, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(weights.sum(axis=1), 1)[:, None, None]


def _mean_reward(reward: jax.Array, chosen: jax.Array) -> jax.Array:
    return jnp.where(chosen, reward, 0).sum(axis=1) / jnp.maximum(chosen.sum(axis=1), 1)


def _spread(states: jax.Array, mean: jax.Array, chosen: jax.Array) -> jax.Array:
    """[M, LQ] mean squared distance to the mean."""
    squared = jnp.sum((states - mean[None]) ** 2, axis=-1)  # [K, M, LQ]
    weights = chosen.astype(states.dtype)
    return jnp.einsum("mk,kml->ml", weights, squared) / jnp.maximum(weights.sum(axis=1), 1)[:, None]
