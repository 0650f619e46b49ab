"""Number values across tokens: "Ġ12","34" is 1234 and "1",",","200" is 1200 (span numbers)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from reoac_jax.tables import Tables

# 10^32 is divisible by 2^32, so longer shifts are 0 in this arithmetic.
_POWERS = np.asarray([10**k % 2**32 for k in range(33)], np.uint32)
_DIVISORS = np.asarray([10**k for k in range(10)], np.uint32)


class NumberSpans(NamedTuple):
    """Number runs of token rows; value = mantissa / 10^scale, without trailing fraction zeros.

    Attributes:
        in_run: [B, N] bool, the token belongs to a number (joining "." and "," included).
        is_first: [B, N] bool, first token of a number.
        is_last: [B, N] bool, last token of a number.
        mantissa: [B, N] u32, modulo 2^32, the same on every token of the number, else 0.
        scale: [B, N] i32, digits after the decimal point, the same on every token, else 0.
    """

    in_run: jax.Array
    is_first: jax.Array
    is_last: jax.Array
    mantissa: jax.Array
    scale: jax.Array


def number_spans(tables: Tables, ids: jax.Array, valid: jax.Array) -> NumberSpans:
    """Joins digit tokens to numbers and values them exactly modulo 2^32 (span mode, spec 5.4).

    Digit segments are adjacent digit tokens without a space start. A glued "." joins two segments
    unless the left one was itself joined by "."; a glued "," joins them unless the left one was
    joined by "." or has more than 3 digits, and only if the right one has exactly 3.

    Args:
        tables: lookup tables.
        ids: [B, N] i32 token ids.
        valid: [B, N] bool; other tokens separate numbers.

    Returns:
        The number runs.
    """
    size = ids.shape[1]
    if size == 0:
        empty = jnp.zeros(ids.shape, bool)
        return NumberSpans(
            empty, empty, empty, jnp.zeros(ids.shape, jnp.uint32), jnp.zeros(ids.shape, jnp.int32)
        )
    index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), ids.shape)
    digit = _take(tables.is_digits, ids) & valid  # [B, N]
    space = _take(tables.starts_with_space, ids)
    dot = _take(tables.is_dot, ids) & valid
    comma = _take(tables.is_comma, ids) & valid
    count = jnp.where(digit, _take(tables.digit_count, ids), 0)
    ends = lax.cumsum(count, axis=1)  # digits up to and including this token

    starts_segment = digit & ~(_shift(digit) & ~space)
    ends_segment = digit & ~(_shift(digit & ~space, -1))
    segment_from = lax.cummax(jnp.where(starts_segment, index, -1), axis=1)
    segment_to = lax.cummin(jnp.where(ends_segment, index, size), axis=1, reverse=True)
    before = ends - count
    segment_digits = _at(ends, segment_to) - _at(before, segment_from)

    glued = starts_segment & ~space & _shift(digit, 2)  # a single token stands between
    by_dot = glued & _shift(dot)
    by_comma = glued & _shift(comma) & (_shift(segment_digits, 2) <= 3) & (segment_digits == 3)
    # "joined by a dot" alternates along a chain of dots and is cleared by any other boundary.
    dots = lax.cumsum(by_dot.astype(jnp.int32), axis=1)
    cleared = lax.cummax(jnp.where(starts_segment & ~by_dot, dots, 0), axis=1)
    dot_joined_start = by_dot & ((dots - cleared) % 2 == 1)
    left_dot_joined = _shift(_at(dot_joined_start, segment_from), 2)
    joined = dot_joined_start | (by_comma & ~left_dot_joined)

    in_run = digit | (_shift(joined, -1))
    is_first = starts_segment & ~joined
    is_last = ends_segment & ~_shift(joined, -2)
    run_from = lax.cummax(jnp.where(is_first, index, -1), axis=1)
    run_to = lax.cummin(jnp.where(is_last, index, size), axis=1, reverse=True)

    # Textual trailing zeros of the fraction are dropped, so that 3.50 equals 3.5 exactly.
    value = jnp.where(digit, _take(tables.digit_value, ids), 0)
    zeros = jnp.where(digit, _take(tables.digit_zeros, ids), 0)
    significant = lax.cummax(jnp.where(digit & (zeros < count), ends - zeros, 0), axis=1)
    total = _at(ends, run_to)
    last_from = _at(segment_from, run_to)
    fractional = _at(dot_joined_start, last_from)
    point = _at(before, last_from)  # digits before the decimal point, when there is one
    kept = jnp.where(fractional, jnp.maximum(_at(significant, run_to), point), total)
    scale = jnp.where(fractional, kept - point, 0)

    shift = kept - ends  # negative on tokens that reach into the dropped zeros
    term = value * jnp.take(jnp.asarray(_POWERS), jnp.clip(shift, 0, 32))
    term = jnp.where(
        shift < 0, value // jnp.take(jnp.asarray(_DIVISORS), jnp.clip(-shift, 0, 9)), term
    )
    summed = lax.cumsum(term, axis=1)
    mantissa = _at(summed, run_to) - _at(summed - term, run_from)
    return NumberSpans(
        in_run,
        is_first,
        is_last,
        jnp.where(in_run, mantissa, 0),
        jnp.where(in_run, scale, 0),
    )


def _take(table: object, ids: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(table), ids, axis=0, mode="clip")


def _shift(x: jax.Array, by: int = 1) -> jax.Array:
    """Moves columns right by `by` (left if negative), filling with zero."""
    width = x.shape[1]
    step = min(abs(by), width)
    pad = jnp.zeros((x.shape[0], step), x.dtype)
    if by > 0:
        return jnp.concatenate([pad, x[:, : width - step]], axis=1)
    return jnp.concatenate([x[:, step:], pad], axis=1)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, N] at index [B, N], clipped into the row."""
    return jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1), axis=1, mode="clip")
