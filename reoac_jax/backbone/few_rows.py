"""The best token of a few states: the head's product and its summary with the vocabulary in front.

A tied head [V, D] times few states [D, R] takes the CPU up to a third less time than the states
[R, D] times the transposed head, as long as R is a small power of two (float32; measured with
R = 1 .. 64, D = 256 and 768). The scores [V, R] are then summarised as they lie, since transposing
them would cost what was won.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

MAX_ROWS = 32
_WAYS = 8
_SMALL = 256


def padded_rows(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


def best_tokens(
    table: jax.Array, states: jax.Array, suppress_id: int
) -> tuple[jax.Array, jax.Array]:
    """First token of highest score and its softmax probability.

    Args:
        table: [V, D] the head's matrix.
        states: [R, D]; fast for R a power of two up to `MAX_ROWS`, right for all.
        suppress_id: Token that counts as impossible; -1 = none.

    Returns:
        (token [R] int32, probability [R] float32), as `sampling.summarise_scores` gives them up
        to rounding.
    """
    scores = jnp.matmul(table, states.T, preferred_element_type=jnp.float32)  # [V, R]
    vocab = scores.shape[0]
    # Summaries must not be fused into the product, nor the product repeated in each of them.
    scores = jax.lax.optimization_barrier(scores)
    peak = _fold(scores, lambda x, _: x, jnp.maximum, -jnp.inf, suppress_id)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)

    def place(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.where(x == peak, index, vocab)

    best = _fold(scores, place, jnp.minimum, vocab, suppress_id)
    total = _fold(scores, lambda x, _: jnp.exp(x - peak), jnp.add, 0.0, suppress_id)
    return jnp.minimum(best, vocab - 1), 1.0 / jnp.maximum(total, 1e-30)


def _fold(
    scores: jax.Array,
    value: Callable[[jax.Array, jax.Array], jax.Array],
    join: Callable[[jax.Array, jax.Array], jax.Array],
    void: float,
    skip: int,
) -> jax.Array:
    """Joins value(score, row number) over the rows of [V, R] but row `skip` -> [R].

    Whole slices are joined element by element: that runs vectorised and on all threads, which a
    reduction over the leading axis does not.
    """

    def read(start: int, stop: int) -> jax.Array:
        index = jnp.arange(start, stop, dtype=jnp.int32)[:, None]
        part = value(scores[start:stop], index)
        return jnp.where(index == skip, void, part) if start <= skip < stop else part

    return _joined(read, scores.shape[0], join, void)


def _joined(
    read: Callable[[int, int], jax.Array],
    length: int,
    join: Callable[[jax.Array, jax.Array], jax.Array],
    void: float,
) -> jax.Array:
    """Joins the rows 0 .. length - 1 that `read(start, stop)` gives [stop - start, R] -> [R]."""
    if length <= _SMALL:
        rows = read(0, length)
        return jax.lax.reduce(rows, jnp.asarray(void, rows.dtype), join, (0,))
    size = length // _WAYS
    joined = read(0, size)
    for i in range(1, _WAYS):
        joined = join(joined, read(i * size, (i + 1) * size))
    joined = jnp.concatenate([joined, read(_WAYS * size, length)])
    joined = jax.lax.optimization_barrier(joined)
    return _joined(lambda start, stop: joined[start:stop], joined.shape[0], join, void)
