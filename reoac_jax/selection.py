"""Choosing positions by rank: the k best of a candidate set, with dynamic k per row."""

import jax
import jax.numpy as jnp


def descending_rank(score: jax.Array, candidates: jax.Array) -> jax.Array:
    """Rank [B, G] int32 of each candidate by score, 0 = best; ties go to the lower position.

    Non-candidates get ranks behind all candidates. Ranks come from pairwise comparison: for the
    few hundred positions of a canvas that is cheaper than a sort, and it fuses.

    Args:
      score: [B, G] float32.
      candidates: bool [B, G].
    """
    value = jnp.where(candidates, score, -jnp.inf)
    position = jnp.arange(score.shape[1])
    better = value[:, None, :] > value[:, :, None]
    tied = (value[:, None, :] == value[:, :, None]) & (position[None, :] < position[:, None])
    return jnp.sum(better | tied, axis=2, dtype=jnp.int32)  # [B, G]
