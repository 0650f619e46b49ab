"""The root search: order of convergence, closed brackets, frozen rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar.roots import Search, Value, bisect, find_root, start_search

SLOPES = jnp.array([0.3, 3.0, 40.0])
ROOTS = jnp.array([0.2, 0.61803, 0.999])
CLOSE = 4e-7  # a row stops once its error is estimated at a quarter of the tolerance of 1e-6


def evaluator(
    g: Callable[[jax.Array], jax.Array], log: list[np.ndarray] | None = None
) -> Callable[[jax.Array], Value]:
    def evaluate(point: jax.Array) -> Value:
        if log is not None:
            jax.debug.callback(lambda p: log.append(np.asarray(p)), point, ordered=True)
        value, slope = jax.jvp(g, (point,), (jnp.ones_like(point),))
        return Value(value, slope, jnp.full_like(point, 1e-7), point == point, point)

    return evaluate


def bent(point: jax.Array) -> jax.Array:
    """Increasing, curved either way, with the roots ROOTS."""
    far = point - ROOTS
    return SLOPES * far + 0.4 * SLOPES * far**2 + far**3


def start() -> Search:
    return start_search(jnp.zeros(3, bool), jnp.float32)


def test_reaches_the_root_in_few_evaluations() -> None:
    log: list[np.ndarray] = []
    search = find_root(evaluator(bent, log), start(), 1e-6, 40)
    jax.effects_barrier()
    np.testing.assert_allclose(search.point, ROOTS, rtol=0, atol=CLOSE)
    assert bool(jnp.all(search.done)) and not bool(jnp.any(search.outside))
    assert len(log) <= 5


@pytest.mark.parametrize("tol", [1e-3, 1e-30])
def test_more_evaluations_than_needed_do_no_harm(tol: float) -> None:
    # A tolerance below the resolution never stops a row by its step: the iterate then sits on the
    # edge of its bracket at machine precision and must stay there.
    for steps in (5, 64):
        search = find_root(evaluator(bent), start(), tol, steps)
        np.testing.assert_allclose(search.point, ROOTS, rtol=0, atol=max(CLOSE, 0.25 * tol))


def test_a_done_row_stays_while_others_go_on() -> None:
    first = find_root(evaluator(bent), start(), 1e-6, 3)
    frozen = first._replace(done=jnp.array([True, False, True]))
    later = find_root(evaluator(lambda p: p - 0.4), frozen, 1e-6, 30)
    assert later.point[0] == first.point[0] and later.point[2] == first.point[2]


def test_unusable_rows_stop_where_they_stand() -> None:
    def evaluate(point: jax.Array) -> Value:
        value = evaluator(bent)(point)
        return value._replace(usable=jnp.array([True, False, True]))

    search = find_root(evaluate, start(), 1e-6, 30)
    assert search.stuck.tolist() == [False, True, False] and search.point[1] == 0.5
    again = find_root(evaluator(bent), search, 1e-6, 30)
    np.testing.assert_allclose(again.point, ROOTS, rtol=0, atol=CLOSE)


def test_no_root_inside_gives_the_nearer_end() -> None:
    shift = jnp.array([-0.3, 1.4, 0.5])
    search = find_root(evaluator(lambda p: 2 * (p - shift)), start(), 1e-6, 30)
    np.testing.assert_allclose(search.point, [0.0, 1.0, 0.5], rtol=0, atol=1e-7)
    assert search.outside.tolist() == [True, True, False]


def test_steep_and_flat_functions_fall_back_to_halving() -> None:
    def stiff(point: jax.Array) -> jax.Array:
        return jnp.tanh(300 * (point - ROOTS)) + 1e-3 * (point - ROOTS)

    search = find_root(evaluator(stiff), start(), 1e-6, 64)
    np.testing.assert_allclose(search.point, ROOTS, rtol=0, atol=1e-6)


def test_bisection_is_the_middle_of_twenty_halvings() -> None:
    search, first = bisect(evaluator(bent), start(), 20)
    assert np.all(np.abs(search.point - ROOTS) <= 2**-21 + 1e-7)
    np.testing.assert_allclose(first.value, bent(jnp.full(3, 0.5)), rtol=1e-6)
