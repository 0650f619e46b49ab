"""Which masked positions a parallel decoder writes at once (Fast-dLLM, Wu et al., 2025).

Three rules, which may be joined: the n most confident positions; every position whose probability
reaches a threshold; the factor rule, the largest n with (n + 1)(1 - c_(n)) < f, where c_(n) is the
n-th largest probability. Writing n positions greedily at once gives the same tokens as one after
the other if (n + 1)(1 - c_(n)) <= 1, so f says how far that bound is trusted.
"""

import jax
import jax.numpy as jnp

from reoac_jax.selection import descending_rank


def unmask(
    confidence: jax.Array,
    candidates: jax.Array,
    at_least: jax.Array | int,
    *,
    threshold: float | None = None,
    factor: float | None = None,
) -> jax.Array:
    """bool [B, G]: candidates to be written.

    Args:
      confidence: [B, G] float32 probability of the best token.
      candidates: bool [B, G].
      at_least: [B] or scalar int32; the most confident ones that are written in any case.
      threshold: write every candidate of at least this probability; None = off.
      factor: f of the factor rule; None = off.
    """
    rank = descending_rank(confidence, candidates)
    count = jnp.broadcast_to(jnp.asarray(at_least, jnp.int32), rank.shape[:1])
    if factor is not None:
        number = rank + 1
        holds = candidates & ((number + 1) * (1.0 - confidence) < factor)
        count = jnp.maximum(count, jnp.max(jnp.where(holds, number, 0), axis=1))
    write = rank < count[:, None]
    if threshold is not None:
        write |= confidence >= threshold
    return candidates & write


def before_eos(gen_ids: jax.Array, eos_id: int) -> jax.Array:
    """bool [B, G]: positions up to and including the first written eos (all when there is none)."""
    is_eos = gen_ids == eos_id
    earlier = jnp.cumsum(is_eos, axis=1) - is_eos
    return earlier == 0
