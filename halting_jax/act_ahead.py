"""Calls in sequence during training: a row that has halted starts its next call at once.

With one call after the other for the whole batch, every call lasts as long as its slowest row:
sum over calls of max over rows of N. Here every row goes through its own calls, so the loop makes
max over rows of the sum over calls of N inner steps. Values and gradients are the same.

The backward pass keeps little: the forward loop is cut into segments, of each of which only the
start is kept. A segment is replayed, keeping what each of its steps started from, and then walked
through backwards. Who halts where is taken from the recorded N, so no comparison is repeated.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from halting_jax.act import ActCalls
from halting_jax.act_progress import (
    ActProgress,
    CallRecord,
    act_advance_with,
    act_start,
    assemble,
    count_steps,
    next_valid,
)
from halting_jax.act_step import (
    ActSettings,
    LoopWeights,
    absorb,
    cell_step,
    halting_logit,
    loop_weights,
)
from halting_jax.cells import State, Weights


class _Run(NamedTuple):
    """What the loop returns: records [B, C, ...], state after the last call, mass [M]."""

    record: CallRecord
    state: State
    mass: jax.Array


class _Moment(NamedTuple):
    """All rows before one inner step: position, steps int32 [B]; state, mixed entries [B, H];
    mass [B]."""

    position: jax.Array
    steps: jax.Array
    state: State
    mixed: State
    mass: jax.Array


def run_ahead(
    params: Weights,
    products: jax.Array,
    state: State,
    settings: ActSettings,
    valid: jax.Array,
) -> ActCalls:
    """C calls per row, every row at its own pace.

    Args:
      params: weights of the unit.
      products: [B, C, G*H].
      state: before the first call, entries [B, H].
      settings: static.
      valid: bool [B, C].
    """
    run = _run(settings, loop_weights(params), products, state, valid)
    return assemble(run.record, run.state, run.mass, state[0], valid)


def _segment_length(settings: ActSettings, num_calls: int) -> int:
    """About the square root of the most steps there can be, which keeps the least."""
    return max(math.isqrt(num_calls * settings.time_limit), 8)


def _ended(progress: ActProgress) -> _Run:
    state = progress.carry.state[: len(progress.carry.mixed)]
    return _Run(progress.record, state, jnp.sum(progress.curve, axis=0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    settings: ActSettings,
    weights: LoopWeights,
    products: jax.Array,
    state: State,
    valid: jax.Array,
) -> _Run:
    progress = act_start(products, state, settings, valid)
    return _ended(act_advance_with(weights, progress, products.shape[1] * settings.time_limit))


def _forward(
    settings: ActSettings,
    weights: LoopWeights,
    products: jax.Array,
    state: State,
    valid: jax.Array,
) -> tuple[_Run, Any]:
    num_calls = products.shape[1]
    length = _segment_length(settings, num_calls)
    count = -(-num_calls * settings.time_limit // length)

    def moment(progress: ActProgress) -> _Moment:
        carry = progress.carry
        return _Moment(progress.position, carry.steps, carry.state, carry.mixed, carry.mass)

    def body(loop: tuple[jax.Array, ActProgress, _Moment]) -> tuple[Any, ActProgress, _Moment]:
        j, progress, starts = loop
        starts = _store(starts, moment(progress), j)
        return j + 1, act_advance_with(weights, progress, length), starts

    progress = act_start(products, state, settings, valid)
    starts = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), moment(progress))
    _, progress, starts = lax.while_loop(
        lambda loop: jnp.any(loop[1].carry.running), body, (jnp.int32(0), progress, starts)
    )
    run = _ended(progress)
    return run, (weights, products, valid, starts, run.record)


def _store(buffers: Any, values: Any, i: jax.Array) -> Any:
    return jax.tree.map(
        lambda buffer, value: lax.dynamic_update_index_in_dim(buffer, value, i, 0), buffers, values
    )


def _load(buffers: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda buffer: lax.dynamic_index_in_dim(buffer, i, 0, False), buffers)


class _Place(NamedTuple):
    """Where rows stand, [B]: their call (in bounds), whether they run, and halt at this step."""

    call: jax.Array
    running: jax.Array
    halt: jax.Array
    first: jax.Array


def _place(now: _Moment, steps: jax.Array) -> _Place:
    """From the recorded N [B, C]."""
    num_calls = steps.shape[1]
    call = jnp.minimum(now.position, num_calls - 1)
    running = now.position < num_calls
    here = jnp.take_along_axis(steps, call[:, None], axis=1)[:, 0]
    return _Place(call, running, running & (now.steps + 1 == here), now.steps == 0)


def _known_step(
    settings: ActSettings,
    place: _Place,
    weights: LoopWeights,
    product: jax.Array,
    state: State,
    mixed: State,
    mass: jax.Array,
) -> tuple[State, State, jax.Array, jax.Array, jax.Array]:
    """One inner step whose halts are known: (state, mixed, mass) before the next step, and hidden
    state and remainder of the call, which count where the row halts."""
    after = cell_step(settings, weights.cell, product, state, place.first)
    p = jax.nn.sigmoid(halting_logit(weights, after))
    mixed, full, remainder = absorb(
        mixed, mass, jnp.zeros_like(mass), after, p, place.running, place.halt
    )
    halt, running = place.halt[:, None], place.running[:, None]
    # A row that halts enters its next call from the mixed state; what is not mixed starts at 0.
    entry = mixed + tuple(jnp.zeros_like(s) for s in state[len(mixed) :])
    following = tuple(
        jnp.where(halt, e, jnp.where(running, a, s))
        for e, a, s in zip(entry, after, state, strict=True)
    )
    kept = tuple(jnp.where(halt, 0, m) for m in mixed)
    return following, kept, jnp.where(place.halt, 0, full), mixed[0], remainder


def _backward(settings: ActSettings, residuals: Any, cotangents: _Run) -> Any:
    weights, products, valid, starts, record = residuals
    steps = record.steps.astype(jnp.int32)  # [B, C]
    rows = jnp.arange(products.shape[0])
    executed = count_steps(record)
    length = _segment_length(settings, products.shape[1])
    to_hidden, to_remainder = cotangents.record.hidden, cotangents.record.remainder

    def replay(i: jax.Array, loop: tuple[_Moment, _Moment]) -> tuple[_Moment, _Moment]:
        now, trail = loop
        place = _place(now, steps)
        state, mixed, mass, _, _ = _known_step(
            settings, place, weights, products[rows, place.call], now.state, now.mixed, now.mass
        )
        position = jnp.where(place.halt, next_valid(valid, now.position + 1), now.position)
        made = jnp.where(place.halt, 0, now.steps + place.running)
        # The mix is not needed on the way back: its cotangent does not depend on its value.
        trail = _store(trail, now._replace(mixed=()), i)
        return _Moment(position, made, state, mixed, mass), trail

    def step_back(loop: Any) -> Any:
        i, trail, to_weights, to_products, to_state, to_mixed, to_mass = loop
        now = _load(trail, i)
        place = _place(now, steps)
        product = products[rows, place.call]
        nothing = tuple(jnp.zeros_like(m) for m in to_mixed)
        _, pull = jax.vjp(
            functools.partial(_known_step, settings, place),
            weights,
            product,
            now.state,
            nothing,
            now.mass,
        )
        shown = jnp.where(place.halt[:, None], to_hidden[rows, place.call], 0)
        left = jnp.where(place.halt, to_remainder[rows, place.call], 0)
        more, to_product, to_state, to_mixed, to_mass = pull(
            (to_state, to_mixed, to_mass, shown, left)
        )
        to_weights = jax.tree.map(jnp.add, to_weights, more)
        to_products = to_products.at[rows, place.call].add(to_product, unique_indices=True)
        return i - 1, trail, to_weights, to_products, to_state, to_mixed, to_mass

    def segment_back(loop: Any) -> Any:
        j, *cotangent = loop
        todo = jnp.minimum(length, executed - j * length)
        start = _load(starts, j)
        trail = jax.tree.map(
            lambda x: jnp.zeros((length, *x.shape), x.dtype), start._replace(mixed=())
        )
        _, trail = lax.fori_loop(0, todo, replay, (start, trail))
        _, _, *cotangent = lax.while_loop(
            lambda inner: inner[0] >= 0, step_back, (todo - 1, trail, *cotangent)
        )
        return j - 1, *cotangent

    extra = starts.state[len(cotangents.state) :]
    to_state = cotangents.state + tuple(jnp.zeros(x.shape[1:], x.dtype) for x in extra)
    last = (
        (executed - 1) // length,
        jax.tree.map(jnp.zeros_like, weights),
        jnp.zeros_like(products),
        to_state,
        tuple(jnp.zeros_like(x) for x in cotangents.state),
        jnp.zeros(starts.mass.shape[1:], starts.mass.dtype),
    )
    end = lax.while_loop(lambda loop: loop[0] >= 0, segment_back, last)
    _, to_weights, to_products, to_state, _, _ = end
    return to_weights, to_products, to_state[: len(cotangents.state)], None


_run.defvjp(_forward, _backward)
