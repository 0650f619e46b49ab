"""Root of an increasing function on [0, 1], one per row, with few evaluations.

A safeguarded Newton iteration. From the second evaluation on, the next point comes from the cubic
Hermite interpolation of the inverse function, which needs nothing new. A bracket holds every point;
it is closed, so that a converged iterate on its edge is not thrown back into the middle, and a row
whose step is below the tolerance stays where it is however long the other rows take.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Value(NamedTuple):
    """An increasing function g at one point per row; all arrays [B].

    Attributes:
        value, slope: g and g' >= 0; +-inf allowed.
        noise: |g| up to which the sign of g is rounding.
        usable: bool; a row that is not is left where it stands (see `find_root`).
        spread: anything the caller wants back from the last evaluation.
    """

    value: jax.Array
    slope: jax.Array
    noise: jax.Array
    usable: jax.Array
    spread: jax.Array


class Search(NamedTuple):
    """State of the search; all arrays [B].

    Attributes:
        point: where to evaluate next, or the result where `done`.
        low, high: bracket.
        low_known, high_known: bool, whether the bracket's ends were evaluated.
        last_point, last_value, last_slope: previous evaluation; NaN = none.
        done: bool, converged.
        stuck: bool, `usable` was false at `point`.
        outside: bool, g has no root in [0, 1]; `point` is the nearer end.
        spread: of the last evaluation.
    """

    point: jax.Array
    low: jax.Array
    high: jax.Array
    low_known: jax.Array
    high_known: jax.Array
    last_point: jax.Array
    last_value: jax.Array
    last_slope: jax.Array
    done: jax.Array
    stuck: jax.Array
    outside: jax.Array
    spread: jax.Array


def start_search(skip: jax.Array, dtype: jnp.dtype) -> Search:
    """All rows at 0.5; rows in `skip` ([B] bool) count as done."""
    half = jnp.full(skip.shape, 0.5, dtype)
    none, no = jnp.full_like(half, jnp.nan), jnp.zeros_like(skip)
    zero, one = jnp.zeros_like(half), jnp.ones_like(half)
    return Search(half, zero, one, no, no, none, none, none, skip, no, no, none)


def find_root(
    evaluate: Callable[[jax.Array], Value], search: Search, tol: float, steps: int
) -> Search:
    """Continues a search until every row is done or stuck, or for so many evaluations.

    Args:
        evaluate: points [B] -> Value.
        search: from `start_search`, or an earlier search; stuck rows are tried again.
        tol: wanted accuracy of the root.
        steps: most evaluations.
    """

    def pending(carry: tuple[jax.Array, Search]) -> jax.Array:
        count, search = carry
        return (count < steps) & jnp.any(~search.done & ~search.stuck)

    def step(carry: tuple[jax.Array, Search]) -> tuple[jax.Array, Search]:
        count, search = carry
        return count + 1, advance(search, evaluate(search.point), tol)

    search = search._replace(stuck=jnp.zeros_like(search.stuck))
    return lax.while_loop(pending, step, (jnp.int32(0), search))[1]


def advance(search: Search, at: Value, tol: float) -> Search:
    """One step: narrows the bracket around the root and chooses the next point."""
    point, value, slope = search.point, at.value, at.slope
    active = ~search.done & at.usable
    rises, falls = value >= 0, value <= 0
    high = jnp.where(rises, point, search.high)
    low = jnp.where(falls, point, search.low)
    high_known, low_known = search.high_known | rises, search.low_known | falls

    newton = -value / slope
    jump, weight = _inverse_hermite(search, at)
    # The interpolation is only trusted well inside its reach.
    trusted = jnp.abs(weight) <= 0.5
    wanted = point + jnp.where(trusted, jump, newton)
    middle = 0.5 * (low + high)
    below, above = wanted < low, wanted > high
    inside = (wanted >= low) & (wanted <= high)
    following = jnp.where(inside, wanted, middle)
    following = jnp.where(below & ~low_known, low, following)
    following = jnp.where(above & ~high_known, high, following)

    move = jnp.abs(following - point)
    # Newton's error after this step, from the change of the slope. The interpolation's is smaller
    # by the square of the distance between its points, in units of the function's own scale.
    apart = jnp.abs(point - search.last_point)
    bend = 0.5 * jnp.abs(slope - search.last_slope) / (apart * slope)
    error = bend * jnp.square(move)
    finer = jnp.square(2 * (1 + bend) * apart) * jnp.abs(jump - newton)
    error = jnp.where(trusted, jnp.minimum(error, finer), error)
    outside = ((value > 0) & (point <= 0)) | ((value < 0) & (point >= 1))
    found = jnp.abs(value) <= at.noise
    # A halving says nothing about the distance to the root: its step alone is no convergence.
    close = inside & (move <= 0.05) & (error <= 0.25 * tol)
    done = outside | found | (move <= tol) | close
    following = jnp.where(outside | (found & ~jnp.isfinite(wanted)), point, following)

    def update(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(active, new, old)

    return Search(
        point=update(following, point),
        low=update(low, search.low),
        high=update(high, search.high),
        low_known=update(low_known, search.low_known),
        high_known=update(high_known, search.high_known),
        last_point=update(point, search.last_point),
        last_value=update(value, search.last_value),
        last_slope=update(slope, search.last_slope),
        done=search.done | (active & done),
        stuck=~search.done & ~at.usable,
        outside=update(outside, search.outside),
        spread=update(at.spread, search.spread),
    )


def _inverse_hermite(search: Search, at: Value) -> tuple[jax.Array, jax.Array]:
    """Step [B] to the zero of the cubic through the last two points, as a function of g.

    Also how far it reaches: the weight of the older point, t = g / (g - g_old). NaN without one.
    """
    rise = at.value - search.last_value
    t = at.value / rise
    own = at.value / at.slope
    older = rise / search.last_slope
    jump = t * t * (3 - 2 * t) * (search.last_point - search.point)
    jump = jump + (1 - t) * (t * t * older - (1 - t) * own)
    return jump, t


def bisect(
    evaluate: Callable[[jax.Array], Value], search: Search, halvings: int
) -> tuple[Search, Value]:
    """Halves [0, 1] so often; `point` is the middle of what is left. Also the first evaluation."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        right = evaluate(middle).value < 0
        return jnp.where(right, middle, low), jnp.where(right, high, middle)

    first = evaluate(search.point)
    low, high = lax.fori_loop(0, halvings, halve, (search.low, search.high))
    return search._replace(point=jnp.where(search.done, search.point, 0.5 * (low + high))), first
