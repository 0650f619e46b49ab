"""Mixing exponents: the alpha at which two divergences balance.

Each solver takes a `Pair` and returns an exponent per row, alpha = the weight of pi_theta.
`kl_symmetric` finds the minimum of K(alpha) = log sum_v exp(b + alpha d), the Chernoff point. It
does not iterate on K' (a sigmoid where the models disagree) but on the almost linear

    g(alpha) = log P - log N,   P = sum_{d>0} e^{b + alpha d} d,
                                N = sum_{d<0} e^{b + alpha d} |d|,
    g' = P2 / P + N2 / N        (the same sums with d^2).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qstar.columns import fold_columns
from qstar.pair import Pair
from qstar.roots import Search, Value, bisect, find_root, start_search

_FAST_STEPS = 12
_MAX_STEPS = 64
HALVINGS = 20
# Rows whose Var_q(d) is below this get the exact normaliser (see `_refine`).
_CLOSE_VARIANCE = 1e-4
_FAR_MOVE = 0.01
RKL_BOUNDS = (0.1, 0.9)


class Exponent(NamedTuple):
    """What a solver found; all arrays [B].

    Attributes:
        alpha: weight of pi_theta in [0, 1].
        identical: bool, the models agree up to rounding; alpha is 0.5.
        boundary: bool, no root in [0, 1]; alpha is the nearer end. Only with partial overlap.
    """

    alpha: jax.Array
    identical: jax.Array
    boundary: jax.Array


def solver_tolerance(tol: float, dtype: jnp.dtype) -> float:
    """In float64 a solution is meant to use the digits it has."""
    return tol if dtype == jnp.float32 else min(tol, 1e-9)


def kl_symmetric(pair: Pair, tol: float = 1e-6, solver: str = "newton") -> Exponent:
    """Root of K'(alpha) = 0: D(q || pi_theta) = D(q || pi_t) (the Chernoff point).

    Args:
        pair: rows; invalid and empty ones get some finite alpha.
        tol: accuracy of the root ("newton").
        solver: "newton", or "bisection": 20 halvings of [0, 1] as in the original.
    """
    dtype = pair.x.dtype
    start = start_search(~pair.usable, dtype)
    if solver == "bisection":
        search, first = bisect(lambda alpha: _log_ratio_exact(pair, alpha), start, HALVINGS)
        return _one_sided(pair, search, first.spread)
    tol = solver_tolerance(tol, dtype)
    search = find_root(lambda alpha: _log_ratio(pair, alpha), start, tol, _FAST_STEPS)
    variance = search.spread
    # Rows whose weights underflow, whose ratio has one sign, or that have columns of -inf.
    left = ~search.done
    search = find_root(lambda alpha: _log_ratio_exact(pair, alpha), search, tol, _MAX_STEPS)
    found = _one_sided(pair, search, jnp.where(left, search.spread, 0.0))
    # Their variance is not known; the refinement finds out.

    def again(exact: Pair, rows: jax.Array) -> Search:
        start = start_search(~rows, dtype)
        return find_root(lambda alpha: _log_ratio(exact, alpha), start, tol, _FAST_STEPS)

    variance = jnp.where(left, 0.0, variance)
    return _refine(pair, found, variance, sign=1.0, third=24.0, again=again)


def _log_ratio(pair: Pair, alpha: jax.Array) -> Value:
    """g at alpha [B], scaled by a bound on the largest weight.

    Unusable where all weights are far below that bound, and where a logit is -inf (the sums are
    then NaN): checking every column would cost as much as a sum.
    `spread` is a lower bound on Var_q(d), sharp where the models are close.
    """
    dtype = pair.x.dtype

    def step(carry: tuple[jax.Array, ...], x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        raised, d = pair.finite_gap(x, y)
        weight = jnp.exp(pair.log_weight(y) + alpha[:, None] * raised)
        up, down = weight * jnp.maximum(d, 0), weight * jnp.minimum(d, 0)
        sums = (up, -down, up * d, down * d)
        return tuple(c + jnp.sum(s, axis=-1) for c, s in zip(carry, sums, strict=True))

    zero = jnp.zeros_like(alpha)
    p, n, p2, n2 = fold_columns(step, (zero,) * 4, pair.x, pair.y)
    value, slope = jnp.log(p) - jnp.log(n), p2 / p + n2 / n
    scale = jnp.exp(alpha * pair.norms.log_sum_x + (1 - alpha) * pair.norms.log_sum_y)
    tiny = jnp.finfo(dtype).tiny ** 0.6
    usable = (p > tiny) & (n > tiny) & jnp.isfinite(slope)
    return Value(value, slope, _noise(value, dtype), usable, (p2 + n2) / scale)


def _log_ratio_exact(pair: Pair, alpha: jax.Array) -> Value:
    """g at alpha [B] with an exact maximum for either sign of d.

    `spread` tells which signs occur: 0 both, 1 only d > 0, -1 only d < 0, 2 neither.
    """
    dtype = pair.x.dtype
    floor = jnp.finfo(dtype).min

    def step(carry: tuple[jax.Array, ...], x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        old_up, old_down, p, n, p2, n2 = carry
        _, raised, d = pair.gap(x, y)
        log_weight = pair.log_weight(y) + alpha[:, None] * raised
        positive, negative = d > 0, d < 0
        peak_up = jnp.maximum(old_up, jnp.max(jnp.where(positive, log_weight, floor), axis=-1))
        peak_down = jnp.maximum(old_down, jnp.max(jnp.where(negative, log_weight, floor), axis=-1))
        peak = jnp.where(positive, peak_up[:, None], peak_down[:, None])
        weight = jnp.exp(jnp.where(positive | negative, log_weight - peak, floor))
        up, down = weight * jnp.maximum(d, 0), weight * jnp.minimum(d, 0)
        keep_up, keep_down = jnp.exp(old_up - peak_up), jnp.exp(old_down - peak_down)
        return (
            peak_up,
            peak_down,
            p * keep_up + jnp.sum(up, axis=-1),
            n * keep_down - jnp.sum(down, axis=-1),
            p2 * keep_up + jnp.sum(up * d, axis=-1),
            n2 * keep_down + jnp.sum(down * d, axis=-1),
        )

    zero = jnp.zeros_like(alpha)
    start = (zero + floor,) * 2 + (zero,) * 4
    peak_up, peak_down, p, n, p2, n2 = fold_columns(step, start, pair.x, pair.y)
    value = (jnp.log(p) + peak_up) - (jnp.log(n) + peak_down)
    # Larger terms than the result were subtracted.
    noise = jnp.maximum(jnp.abs(peak_up), jnp.abs(peak_down))
    has_up, has_down = p > 0, n > 0
    side = jnp.where(has_up, jnp.where(has_down, 0.0, 1.0), jnp.where(has_down, -1.0, 2.0))
    both = side == 0.0
    value = jnp.where(both, value, jnp.where(side == 2.0, 0.0, side * jnp.inf))
    slope = jnp.where(both, p2 / p + n2 / n, 1.0)
    return Value(
        value,
        slope,
        _noise(noise, dtype),
        jnp.ones_like(both),
        side.astype(dtype),
    )


def _noise(size: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounding of a difference of logarithms of this size."""
    return 4 * jnp.finfo(dtype).eps * (1 + jnp.where(jnp.isfinite(size), jnp.abs(size), 0.0))


def _one_sided(pair: Pair, search: Search, side: jax.Array) -> Exponent:
    """The search's result, with the rows where d has only one sign put right.

    With full overlap both models integrate to 1, so one sign is rounding: identical. Otherwise
    K' has that sign everywhere and its root lies beyond the end.
    """
    valid = pair.usable
    single = valid & (side != 0)
    identical = single & ~pair.norms.partial
    alpha = jnp.where(side == 1, 0.0, jnp.where(side == -1, 1.0, 0.5))
    alpha = jnp.where(single & pair.norms.partial, alpha, search.point)
    alpha = jnp.where(identical | ~valid, 0.5, alpha)
    boundary = pair.norms.partial & ((single & (jnp.abs(side) == 1)) | search.outside)
    return Exponent(alpha, identical, valid & boundary)


def _refine(
    pair: Pair,
    found: Exponent,
    variance: jax.Array,
    sign: float,
    third: float,
    again: Callable[[Pair, jax.Array], Search] | None = None,
) -> Exponent:
    """Removes the error of the normalisers where the models nearly agree.

    An error e of d's constant moves the root by e / Var_q(d), so close pairs need the constant
    better than a difference of two logarithms gives it: e = log1p(sum e^b (e^d - 1)), a sum of
    small terms. Where even all |d| are small, the root is 1/2 + E[d^3] / (third E[d^2]) under
    e^{(a+b)/2}, up to terms of fifth order, whatever the constant. A root that moves far is found
    again with the exact constant: Var_q(d) changes on the way where some |d| is large.

    Args:
        variance: [B] Var_q(d) or a lower bound; rows above 1e-4 are left alone. 0 = not known:
            then only rows whose models are close in every column are touched.
        sign: of the root's reaction to e.
        third: 24 for K'(alpha) = 0, 8 for K(-alpha) = K(2 - alpha).
        again: (pair with the exact constant, [B] bool which rows) -> their search.
    """
    dtype = pair.x.dtype
    rows = pair.full & ~found.identical & (variance < _CLOSE_VARIANCE)
    small = 1 / 32 if dtype == jnp.float32 else 1e-3

    def step(carry: tuple[jax.Array, ...], x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        largest, *sums = carry
        _, _, d = pair.gap(x, y)
        # Square roots, so that their product does not underflow where one factor would.
        root_t = jnp.exp(0.5 * (pair.log_weight(y) - pair.norms.log_sum_y[:, None]))
        root_theta = jnp.exp(0.5 * (pair.log_weight_theta(x) - pair.norms.log_sum_x[:, None]))
        p_t, p_theta = jnp.square(root_t), jnp.square(root_theta)
        excess = jnp.where(jnp.abs(d) < 0.5, p_t * _expm1_series(d), p_theta - p_t)
        middle = root_t * root_theta
        square = middle * d * d
        terms = (excess, middle, square, square * d)
        largest = jnp.maximum(largest, jnp.max(jnp.abs(d), axis=-1))
        return (largest, *(c + jnp.sum(t, axis=-1) for c, t in zip(sums, terms, strict=True)))

    def close(alpha: jax.Array) -> jax.Array:
        zero = jnp.zeros_like(alpha)
        sums = fold_columns(step, (zero,) * 5, pair.x, pair.y)
        largest, excess, mass, second, cubic = sums
        shift = jnp.log1p(excess)
        near = (second < _CLOSE_VARIANCE * mass) & ((variance > 0) | (largest < 1))
        moved = jnp.where(near, alpha + sign * shift * mass / second, alpha)
        flat = largest < small
        moved = jnp.where(flat, 0.5 + cubic / (third * second), moved)
        moved = jnp.where(jnp.isfinite(moved), jnp.clip(moved, 0, 1), alpha)
        moved = jnp.where(rows, moved, alpha)
        far = rows & near & ~flat & (jnp.abs(moved - alpha) > _FAR_MOVE)
        if again is None:
            return moved
        norms = pair.norms._replace(remainder=pair.norms.remainder + shift)
        exact = Pair(pair.x, pair.y, norms)

        def settle(moved: jax.Array) -> jax.Array:
            search = again(exact, far)
            return jnp.where(far & search.done & ~search.outside, search.point, moved)

        return lax.cond(jnp.any(far), settle, lambda moved: moved, moved)

    alpha = lax.cond(jnp.any(rows), close, lambda alpha: alpha, found.alpha)
    return found._replace(alpha=alpha)


def _expm1_series(d: jax.Array) -> jax.Array:
    """e^d - 1 for |d| < 0.5: cheaper than the exact function, and as good there."""
    terms = 9 if d.dtype == jnp.float32 else 16
    total = jnp.ones_like(d)
    for k in range(terms, 1, -1):
        total = 1 + d * (1 / k) * total
    return d * total


def ess_balanced(pair: Pair, tol: float = 1e-6) -> Exponent:
    """Root of K(-alpha) = K(2 - alpha): equal effective sample sizes for both models.

    Args:
        pair: rows; invalid and empty ones get some finite alpha.
        tol: accuracy of the root.
    """
    dtype = pair.x.dtype
    tol = solver_tolerance(tol, dtype)
    has_up, has_down = signs(pair)
    single = ~(has_up & has_down)
    skip = ~pair.usable | (single & ~pair.norms.partial)
    search = find_root(
        lambda alpha: _ess_gap(pair, alpha), start_search(skip, dtype), tol, _MAX_STEPS
    )
    valid = pair.usable
    identical = valid & single & ~pair.norms.partial
    found = Exponent(
        jnp.where(skip, 0.5, search.point), identical, valid & pair.norms.partial & search.outside
    )
    return _refine(pair, found, jnp.where(skip, jnp.inf, search.spread), sign=-1.0, third=8.0)


def _ess_gap(pair: Pair, alpha: jax.Array) -> Value:
    """K(-alpha) - K(2 - alpha) and its slope at alpha [B]; `spread` is half the slope."""
    first, second = log_sums(pair, (-alpha, 2 - alpha), with_mean=True)
    value = first.log_z - second.log_z
    slope = second.mean - first.mean
    size = jnp.maximum(jnp.abs(first.log_z), jnp.abs(second.log_z))
    usable = jnp.ones_like(alpha, bool)
    return Value(value, slope, _noise(size, pair.x.dtype), usable, 0.5 * slope)


class LogSum(NamedTuple):
    """K(s) and K'(s) = E[d] at one exponent; arrays [B]."""

    log_z: jax.Array
    mean: jax.Array


def log_sums(
    pair: Pair, exponents: tuple[jax.Array, ...], with_mean: bool = False
) -> tuple[LogSum, ...]:
    """K and K' at several exponents in one pass, over the common columns.

    Args:
        exponents: each [B], any real numbers.
        with_mean: whether K' is wanted; otherwise it is 0.
    """
    floor = jnp.finfo(pair.x.dtype).min

    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        common, raised, d = pair.gap(x, y)
        base = jnp.where(common, pair.log_weight(y), floor)
        new = []
        for s, (old_peak, total, mean) in zip(exponents, carry, strict=True):
            term = base + s[:, None] * raised
            peak = jnp.maximum(old_peak, jnp.max(term, axis=-1))
            weight = jnp.exp(term - peak[:, None])
            keep = jnp.exp(old_peak - peak)
            total = total * keep + jnp.sum(weight, axis=-1)
            if with_mean:
                mean = mean * keep + jnp.sum(weight * d, axis=-1)
            new.append((peak, total, mean))
        return tuple(new)

    zero = jnp.zeros_like(exponents[0])
    start = tuple((zero + floor, zero, zero) for _ in exponents)
    sums = fold_columns(step, start, pair.x, pair.y)
    return tuple(
        LogSum(jnp.log(total) + peak - pair.log_scale(s), mean / total)
        for s, (peak, total, mean) in zip(exponents, sums, strict=True)
    )


def signs(pair: Pair) -> tuple[jax.Array, jax.Array]:
    """Whether d > 0 and whether d < 0 occurs among the common columns; bool [B] each."""

    def step(carry: tuple[jax.Array, ...], x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        _, _, d = pair.gap(x, y)
        return jnp.maximum(carry[0], jnp.max(d, axis=-1)), jnp.minimum(
            carry[1], jnp.min(d, axis=-1)
        )

    zero = jnp.zeros_like(pair.norms.offset)
    top, bottom = fold_columns(step, (zero, zero), pair.x, pair.y)
    return top > 0, bottom < 0


def entropies(pair: Pair) -> tuple[jax.Array, jax.Array]:
    """Entropies of pi_theta and pi_t in nats; [B] each.

    H = log S + sum w |z| / S with w = e^z, z = logit - peak and S = sum w. The peak's own weight is
    counted apart from the rest, so that the entropy of a nearly certain model keeps its digits.
    """

    def step(carry: tuple[jax.Array, ...], x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        terms = []
        for z in (pair.log_weight_theta(x), pair.log_weight(y)):
            weight = jnp.exp(z)
            rest = z < 0
            terms += [jnp.where(rest, weight, 0.0), jnp.where(rest, 0.0, 1.0)]
            terms += [jnp.where(weight > 0, -z * weight, 0.0)]
        return tuple(c + jnp.sum(v, axis=-1) for c, v in zip(carry, terms, strict=True))

    zero = jnp.zeros_like(pair.norms.offset)
    sums = fold_columns(step, (zero,) * 6, pair.x, pair.y)
    theta, t = (
        jnp.log(ties) + jnp.log1p(rest / ties) + weighted / (ties + rest)
        for rest, ties, weighted in (sums[:3], sums[3:])
    )
    return theta, t


def entropy_ratio(pair: Pair) -> Exponent:
    """alpha = H(pi_theta) / (H(pi_theta) + H(pi_t)); 0.5 where both are 0."""
    theta, t = entropies(pair)
    alpha = jnp.where(theta + t > 0, theta / jnp.where(theta + t > 0, theta + t, 1.0), 0.5)
    return _closed_form(pair, alpha)


def reverse_kl_symmetric(pair: Pair) -> Exponent:
    """alpha = (H(pi_theta) - H(pi_t) + D(pi_theta || pi_t)) / J, within [0.1, 0.9]; J = 0 -> 0.5.

    The numerator is sum (pi_t - pi_theta) b and J = sum (pi_theta - pi_t) d: at this alpha both
    models have the same cross entropy to q.
    """

    def step(carry: tuple[jax.Array, ...], x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        common, _, d = pair.gap(x, y)
        log_b = pair.log_weight(y) - pair.norms.log_sum_y[:, None]
        less = jnp.exp(pair.log_weight_theta(x) - pair.norms.log_sum_x[:, None]) - jnp.exp(log_b)
        terms = (jnp.where(common, less * log_b, 0.0), less * d)
        return tuple(c + jnp.sum(v, axis=-1) for c, v in zip(carry, terms, strict=True))

    zero = jnp.zeros_like(pair.norms.offset)
    cross, jeffreys = fold_columns(step, (zero,) * 2, pair.x, pair.y)
    safe = jeffreys > 0
    alpha = jnp.where(safe, -cross / jnp.where(safe, jeffreys, 1.0), 0.5)
    return _closed_form(pair, jnp.clip(alpha, *RKL_BOUNDS))


def _closed_form(pair: Pair, alpha: jax.Array) -> Exponent:
    """An exponent with the rows set to 0.5 where the models agree."""
    has_up, has_down = signs(pair)
    valid = pair.usable
    identical = valid & ~pair.norms.partial & ~(has_up & has_down)
    alpha = jnp.where(identical | ~valid, 0.5, alpha)
    return Exponent(alpha, identical, jnp.zeros_like(identical))
