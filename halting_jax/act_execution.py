"""Three ways to repeat the inner step until every row has halted; equal values and gradients.

`scan` makes all M steps, `chunked` skips chunks in which nobody runs, `while` stops when nobody
runs. A while loop has no reverse mode of its own: it keeps what each step started from, and its
backward pass is a second loop from the executed count down that replays one step at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from halting_jax.act_step import (
    ActCarry,
    ActSettings,
    LoopWeights,
    absorb,
    cell_step,
    halting_logit,
    inner_step,
    start_carry,
)
from halting_jax.cells import State


class Run(NamedTuple):
    """What an execution returns: see ActCarry and ActResult."""

    mixed: State
    remainder: jax.Array
    steps: jax.Array
    forced: jax.Array
    mass: jax.Array
    executed: jax.Array


def _ended(carry: ActCarry, mass: jax.Array, executed: jax.Array | int) -> Run:
    return Run(
        carry.mixed,
        carry.remainder,
        carry.steps,
        carry.forced,
        lax.stop_gradient(mass),
        jnp.asarray(executed, jnp.int32),
    )


def _steps(
    settings: ActSettings,
    weights: LoopWeights,
    product: jax.Array,
    carry: ActCarry,
    count: int,
) -> tuple[ActCarry, jax.Array]:
    """`count` inner steps; the carry after them and the summed mass after each [count]."""

    def body(carry: ActCarry, _: None) -> tuple[ActCarry, jax.Array]:
        carry = inner_step(settings, weights, product, carry)
        return carry, jnp.sum(carry.mass)

    return lax.scan(body, carry, None, length=count)


def _run_scan(
    settings: ActSettings,
    weights: LoopWeights,
    product: jax.Array,
    state: State,
    valid: jax.Array,
) -> Run:
    start = start_carry(settings, state, valid)
    carry, mass = _steps(settings, weights, product, start, settings.time_limit)
    return _ended(carry, mass, settings.time_limit)


def _run_chunked(
    settings: ActSettings,
    weights: LoopWeights,
    product: jax.Array,
    state: State,
    valid: jax.Array,
) -> Run:
    size, limit = min(settings.chunk, settings.time_limit), settings.time_limit

    def make(count: int) -> Any:
        @jax.checkpoint
        def compute(
            weights: LoopWeights, product: jax.Array, carry: ActCarry
        ) -> tuple[ActCarry, jax.Array]:
            return _steps(settings, weights, product, carry, count)

        def skip(
            weights: LoopWeights, product: jax.Array, carry: ActCarry
        ) -> tuple[ActCarry, jax.Array]:
            return carry, jnp.full((count,), jnp.sum(carry.mass))

        def chunk(
            loop: tuple[ActCarry, jax.Array], _: None
        ) -> tuple[tuple[ActCarry, jax.Array], jax.Array]:
            carry, executed = loop
            anyone = jnp.any(carry.running)
            carry, mass = lax.cond(anyone, compute, skip, weights, product, carry)
            return (carry, executed + jnp.where(anyone, count, 0)), mass

        return chunk

    loop = start_carry(settings, state, valid), jnp.int32(0)
    loop, mass = lax.scan(make(size), loop, None, length=limit // size)
    mass = mass.reshape(-1)
    if limit % size:
        loop, tail = make(limit % size)(loop, None)
        mass = jnp.concatenate([mass, tail])
    return _ended(loop[0], mass, loop[1])


# ------------------------------------------------------------------------------------- while
def _loop(
    settings: ActSettings,
    weights: LoopWeights,
    product: jax.Array,
    state: State,
    valid: jax.Array,
    trail: Any,
) -> tuple[Run, Any]:
    """Inner steps until nobody runs.

    Args:
      trail: () or buffers (state entries [M, B, H], mass [M, B]) that receive what each step
        started from.
    """

    def go_on(loop: tuple[jax.Array, ActCarry, jax.Array, Any]) -> jax.Array:
        return jnp.any(loop[1].running)  # the limit stops every row, so no bound is needed

    def body(loop: tuple[jax.Array, ActCarry, jax.Array, Any]) -> Any:
        i, carry, mass, trail = loop
        if trail:
            trail = jax.tree.map(
                lambda buffer, value: lax.dynamic_update_index_in_dim(buffer, value, i, 0),
                trail,
                (carry.state, carry.mass),
            )
        carry = inner_step(settings, weights, product, carry)
        mass = lax.dynamic_update_index_in_dim(mass, jnp.sum(carry.mass), i, 0)
        return i + 1, carry, mass, trail

    start = start_carry(settings, state, valid)
    curve = jnp.zeros((settings.time_limit,), start.mass.dtype)
    count, carry, curve, trail = lax.while_loop(go_on, body, (jnp.int32(0), start, curve, trail))
    curve = jnp.where(jnp.arange(settings.time_limit) < count, curve, jnp.sum(carry.mass))
    return _ended(carry, curve, count), trail


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_while(
    settings: ActSettings,
    weights: LoopWeights,
    product: jax.Array,
    state: State,
    valid: jax.Array,
) -> Run:
    return _loop(settings, weights, product, state, valid, ())[0]


def _while_forward(
    settings: ActSettings,
    weights: LoopWeights,
    product: jax.Array,
    state: State,
    valid: jax.Array,
) -> tuple[Run, Any]:
    start = start_carry(settings, state, valid)
    trail = jax.tree.map(
        lambda x: jnp.zeros((settings.time_limit, *x.shape), x.dtype), (start.state, start.mass)
    )
    run, trail = _loop(settings, weights, product, state, valid, trail)
    return run, (weights, product, trail, run.steps, run.executed)


def _while_backward(settings: ActSettings, residuals: Any, cotangents: Run) -> Any:
    weights, product, (states, masses), steps, count = residuals
    num_mixed = len(cotangents.mixed)

    def body(loop: Any) -> Any:
        i, to_weights, to_product, to_state, to_mass = loop
        # Who ran and who halted follow from N: no comparison is repeated, so none can tip over.
        running, halt = i < steps, i == steps - 1

        def replay(
            weights: LoopWeights, product: jax.Array, state: State, mass: jax.Array
        ) -> tuple[State, State, jax.Array, jax.Array]:
            after = cell_step(settings, weights.cell, product, state, i == 0)
            p = jax.nn.sigmoid(halting_logit(weights, after))
            nothing = tuple(jnp.zeros_like(s) for s in after[:num_mixed])
            mixed, mass, remainder = absorb(
                nothing, mass, jnp.zeros_like(mass), after, p, running, halt
            )
            return after, mixed, mass, remainder

        state = jax.tree.map(lambda buffer: lax.dynamic_index_in_dim(buffer, i, 0, False), states)
        mass = lax.dynamic_index_in_dim(masses, i, 0, False)
        _, pull = jax.vjp(replay, weights, product, state, mass)
        # The mix and the remainder are plain sums over steps: their cotangents never change.
        more_weights, more_product, to_state, to_mass = pull(
            (to_state, cotangents.mixed, to_mass, cotangents.remainder)
        )
        to_weights = jax.tree.map(jnp.add, to_weights, more_weights)
        return i - 1, to_weights, to_product + more_product, to_state, to_mass

    start = (
        count - 1,
        jax.tree.map(jnp.zeros_like, weights),
        jnp.zeros_like(product),
        jax.tree.map(lambda buffer: jnp.zeros(buffer.shape[1:], buffer.dtype), states),
        jnp.zeros(masses.shape[1:], masses.dtype),
    )
    _, to_weights, to_product, to_state, _ = lax.while_loop(lambda loop: loop[0] >= 0, body, start)
    return to_weights, to_product, to_state[:num_mixed], None


_run_while.defvjp(_while_forward, _while_backward)

Execution = Callable[[ActSettings, LoopWeights, jax.Array, State, jax.Array], Run]

EXECUTE: dict[str, Execution] = {"scan": _run_scan, "chunked": _run_chunked, "while": _run_while}
"""(settings, weights, product [B, G*H], state, valid bool [B]) -> Run, by `settings.execution`."""
