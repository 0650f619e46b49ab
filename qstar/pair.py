"""Two rows of logits as a pair of distributions: normalisers, log ratios, validity.

With a = log pi_theta and b = log pi_t (logits divided by the temperature, full normalisers), every
quantity of this package is a sum over the vocabulary of exp(b + s d) for some s, d = a - b. The
log ratio d is formed from the raw logits, x - y, and its constant is kept as two numbers, so that
it is as exact as the logits where the models nearly agree. Nothing is clamped.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from qstar.columns import fold_columns


class Norms(NamedTuple):
    """What one pass over both models tells; all arrays [B].

    A column where only one model is -inf belongs to that model's normaliser alone; where both are
    -inf it counts for nothing. "Common" columns are finite in both.

    Attributes:
        peak_x, peak_y: maxima of the raw logits.
        log_sum_x, log_sum_y: log sum exp((x - peak_x) / T), likewise y.
        offset: peak_x - peak_y.
        remainder: what is missing in d = (x - y - offset) / T - remainder.
        partial: bool, some column is -inf in exactly one model.
        empty: bool, no common column.
        invalid: bool, a model has NaN, +inf or nothing but -inf; the rest of the row is junk.
        rate: 1 / T; None where T is 1.
    """

    peak_x: jax.Array
    peak_y: jax.Array
    log_sum_x: jax.Array
    log_sum_y: jax.Array
    offset: jax.Array
    remainder: jax.Array
    partial: jax.Array
    empty: jax.Array
    invalid: jax.Array
    rate: jax.Array | None


@flax.struct.dataclass
class Pair:
    """Logits of both models and their norms.

    Attributes:
        x, y: [B, V] raw logits of pi_theta and pi_t.
        norms: per row.
    """

    x: jax.Array
    y: jax.Array
    norms: Norms

    @property
    def full(self) -> jax.Array:
        """[B] bool, usable rows whose models allow the same columns."""
        return ~(self.norms.partial | self.norms.empty | self.norms.invalid)

    @property
    def usable(self) -> jax.Array:
        """[B] bool, rows with valid logits and some common column."""
        return ~(self.norms.empty | self.norms.invalid)

    def scale(self, z: jax.Array) -> jax.Array:
        """z / T for z [B] or [B, C]."""
        rate = self.norms.rate
        if rate is None:
            return z
        return z * (rate if z.ndim == 1 else rate[:, None])

    def log_weight(self, y: jax.Array) -> jax.Array:
        """b + log_sum_y of columns y [B, C]; at most 0."""
        return self.scale(y - self.norms.peak_y[:, None])

    def log_weight_theta(self, x: jax.Array) -> jax.Array:
        """a + log_sum_x of columns x [B, C]; at most 0."""
        return self.scale(x - self.norms.peak_x[:, None])

    def gap(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Log ratios of columns x, y [B, C].

        Returns:
            Which columns are common; d + remainder; d, which is 0 where a column is not common.
            log_weight + alpha * (d + remainder) is at most 0 for alpha in [0, 1].
        """
        raw = x - y
        common = jnp.abs(raw) < jnp.inf  # also false for the NaN of -inf - -inf
        raised = self.scale(raw - self.norms.offset[:, None])
        raised = jnp.where(common, raised, self.norms.remainder[:, None])
        return common, raised, raised - self.norms.remainder[:, None]

    def finite_gap(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The last two of `gap`, for columns without -inf: that makes +-inf or NaN here."""
        raised = self.scale(x - y - self.norms.offset[:, None])
        return raised, raised - self.norms.remainder[:, None]

    def log_scale(self, exponent: jax.Array | float) -> jax.Array:
        """log sum exp(log_weight + s (d + remainder)) minus this is K(s)."""
        return self.norms.log_sum_y + exponent * self.norms.remainder


def working_dtype(*arrays: jax.Array) -> jnp.dtype:
    """float32, or float64 where an input is."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def make_pair(x: jax.Array, y: jax.Array, temperature: float | jax.Array = 1.0) -> Pair:
    """Normalises both models.

    Args:
        x, y: [B, V] raw logits of pi_theta and pi_t over the same vocabulary; any float type.
        temperature: T > 0, or [B] or [] of them.
    """
    dtype = working_dtype(x, y)
    x, y = x.astype(dtype), y.astype(dtype)
    peak_x, peak_y = jnp.max(x, axis=-1), jnp.max(y, axis=-1)
    offset = peak_x - peak_y
    # The rounding error of the line above, exactly (two-sum).
    back = offset - peak_x
    lost = (peak_x - (offset - back)) - (peak_y + back)
    blank = jnp.zeros_like(offset)
    rate = None
    if not (isinstance(temperature, float) and temperature == 1.0):
        rate = jnp.broadcast_to(1 / jnp.asarray(temperature, dtype), offset.shape)
    norms = Norms(peak_x, peak_y, blank, blank, offset, blank, blank, blank, blank, rate)
    pair = Pair(x, y, norms)
    log_sum_x, log_sum_y = _log_sums(pair)
    bounded = jnp.isfinite(jnp.min(x, axis=-1)) & jnp.isfinite(jnp.min(y, axis=-1))
    partial, empty = lax.cond(
        jnp.all(bounded),
        lambda: (jnp.zeros_like(bounded), jnp.zeros_like(bounded)),
        lambda: _overlap(x, y),
    )
    norms = norms._replace(
        log_sum_x=log_sum_x,
        log_sum_y=log_sum_y,
        remainder=pair.scale(lost) + (log_sum_x - log_sum_y),
        partial=partial,
        empty=empty,
        # NaN and +inf are their row's maximum, and so is -inf where there is nothing else.
        invalid=~(jnp.isfinite(peak_x) & jnp.isfinite(peak_y)),
    )
    return Pair(pair.x, pair.y, norms)


def _log_sums(pair: Pair) -> tuple[jax.Array, jax.Array]:
    """log_sum_x and log_sum_y [B].

    The peaks are counted apart from the rest: added to 1, the tail of a nearly certain model would
    be lost, and with it the sign of its log ratios.
    """

    def step(carry: tuple[jax.Array, ...], x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        norms = pair.norms
        top_x, top_y = x == norms.peak_x[:, None], y == norms.peak_y[:, None]
        terms = (
            jnp.where(top_x, 0.0, jnp.exp(pair.log_weight_theta(x))),
            jnp.where(top_y, 0.0, jnp.exp(pair.log_weight(y))),
            top_x.astype(x.dtype),
            top_y.astype(y.dtype),
        )
        return tuple(c + jnp.sum(t, axis=-1) for c, t in zip(carry, terms, strict=True))

    zero = jnp.zeros_like(pair.norms.offset)
    rest_x, rest_y, ties_x, ties_y = fold_columns(step, (zero,) * 4, pair.x, pair.y)
    return (
        jnp.log(ties_x) + jnp.log1p(rest_x / ties_x),
        jnp.log(ties_y) + jnp.log1p(rest_y / ties_y),
    )


def _overlap(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per row: is some column impossible in just one model, and is no column possible in both."""
    raw = jnp.abs(x - y)
    kinds = jnp.where(raw < jnp.inf, jnp.int32(1), jnp.where(raw == jnp.inf, jnp.int32(2), 0))
    kinds = lax.reduce(kinds, jnp.int32(0), lax.bitwise_or, (1,))
    return (kinds & 2) != 0, (kinds & 1) == 0
