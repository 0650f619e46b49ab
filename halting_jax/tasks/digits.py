"""Decimal numbers as arrays of digits, so that sums of any length stay exact in int32."""

import jax
import jax.numpy as jnp

# Carries of short sums become straight code; longer ones stay a loop of such blocks.
_UNROLL = 8


def places_of_sum(max_digits: int, terms: int) -> int:
    """Decimal places that hold any sum of that many numbers: max_digits + ceil(log10 terms)."""
    return max_digits + (len(str(terms - 1)) if terms > 1 else 0)


def least_significant_first(digits: jax.Array, counts: jax.Array, places: int) -> jax.Array:
    """Turns left-aligned numbers, most significant digit first, into columns of one value each.

    Args:
      digits: int32 [..., D], the first `counts` of them are the number, the rest is ignored.
      counts: int32 [...], 1..D.
      places: K >= D.

    Returns:
      int32 [..., K], the digit of 10^k at k, zero beyond the number.
    """
    column = jnp.arange(digits.shape[-1], dtype=jnp.int32)
    index = counts[..., None] - 1 - column  # [..., D]
    values = jnp.take_along_axis(digits, jnp.maximum(index, 0), axis=-1)
    values = jnp.where(index >= 0, values, 0)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, places - digits.shape[-1])]
    return jnp.pad(values, padding)


def carry(columns: jax.Array) -> jax.Array:
    """Carries column sums into decimal digits.

    Args:
      columns: int32 [..., K], any sums >= 0 whose value fits K places, least significant first.

    Returns:
      int32 [..., K], digits 0..9.
    """

    def step(held: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = column + held
        return total // 10, total % 10

    start = jnp.zeros_like(columns[..., 0])
    unroll = min(_UNROLL, columns.shape[-1])
    _, result = jax.lax.scan(step, start, jnp.moveaxis(columns, -1, 0), unroll=unroll)
    return jnp.moveaxis(result, 0, -1)


def most_significant_first(digits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Left-aligns numbers without leading zeros; zero keeps one digit.

    Args:
      digits: int32 [..., K], least significant first.

    Returns:
      int32 [..., K], most significant digit first, arbitrary beyond the number, and int32 [...],
      how many digits the number has.
    """
    column = jnp.arange(digits.shape[-1], dtype=jnp.int32)
    counts = jnp.max(jnp.where(digits > 0, column + 1, 1), axis=-1)  # [...]
    index = jnp.maximum(counts[..., None] - 1 - column, 0)
    return jnp.take_along_axis(digits, index, axis=-1), counts
