"""Calls of the ponder loop in pieces, so that rows that have halted can leave the batch.

    progress = act_start(params, products, state, settings, valid)
    while any row runs:
        progress = act_advance(params, progress, k)
        ... keep the running rows: jax.tree.map(lambda leaf: leaf[rows], progress) ...
    calls = act_finish(progress)

Every row goes through its own calls: one that has halted starts its next call at once instead of
waiting for the slowest row of the batch. Results equal those of `act_calls.act_calls`.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from halting_jax.act import ActCalls
from halting_jax.act_step import (
    ActCarry,
    ActSettings,
    LoopWeights,
    inner_step,
    loop_weights,
    start_carry,
)
from halting_jax.cells import State, Weights


@flax.struct.dataclass
class CallRecord:
    """What rows have produced so far: see ActCalls; every leaf [B, C] but hidden [B, C, H]."""

    hidden: jax.Array
    remainder: jax.Array
    steps: jax.Array
    forced: jax.Array


@flax.struct.dataclass
class ActProgress:
    """Rows under way; every leaf has B rows, so rows can be gathered freely.

    Attributes:
      products: input products [B, C, G*H].
      valid: bool [B, C].
      initial: hidden state before the first call [B, H].
      position: int32 [B], the call a row is in; C = done.
      carry: where each row stands inside its call; `carry.running` says who goes on.
      record: of finished calls.
      curve: [B, M], a row's mass after each inner step, summed over its calls.
      settings: static.
    """

    products: jax.Array
    valid: jax.Array
    initial: jax.Array
    position: jax.Array
    carry: ActCarry
    record: CallRecord
    curve: jax.Array
    settings: ActSettings = flax.struct.field(pytree_node=False)


def act_start(
    products: jax.Array, state: State, settings: ActSettings, valid: jax.Array
) -> ActProgress:
    """Rows before their first inner step.

    Args:
      products: [B, C, G*H], `cells.input_product` of the inputs.
      state: entries [B, H].
      settings: static; the execution does not matter here.
      valid: bool [B, C]; other calls are passed over.
    """
    position = next_valid(valid, jnp.zeros(valid.shape[:1], jnp.int32))
    carry = start_carry(settings, state, position < valid.shape[1])
    nothing = jnp.zeros(valid.shape, carry.mass.dtype)
    hidden = jnp.zeros((*valid.shape, state[0].shape[1]), state[0].dtype)
    record = CallRecord(hidden, nothing, nothing, jnp.zeros(valid.shape, bool))
    curve = jnp.zeros((valid.shape[0], settings.time_limit), carry.mass.dtype)
    return ActProgress(products, valid, state[0], position, carry, record, curve, settings)


def act_advance(params: Weights, progress: ActProgress, steps: int | jax.Array) -> ActProgress:
    """At most `steps` more inner steps, fewer when nobody runs any more.

    Args:
      params: weights of the unit.
      progress: of `act_start` or an earlier call, rows in any order.
      steps: static or traced.
    """
    return act_advance_with(loop_weights(params), progress, steps)


def act_advance_with(
    weights: LoopWeights, progress: ActProgress, steps: int | jax.Array
) -> ActProgress:
    """`act_advance` with the weights of the loop alone."""

    def go_on(loop: tuple[jax.Array, ActProgress]) -> jax.Array:
        return (loop[0] < steps) & jnp.any(loop[1].carry.running)

    def body(loop: tuple[jax.Array, ActProgress]) -> tuple[jax.Array, ActProgress]:
        return loop[0] + 1, _advance_once(weights, loop[1])

    return lax.while_loop(go_on, body, (jnp.int32(0), progress))[1]


def act_finish(progress: ActProgress) -> ActCalls:
    """The results of rows that are done; `executed` is the most inner steps any of them made."""
    state = progress.carry.state[: len(progress.carry.mixed)]
    mass = jnp.sum(progress.curve, axis=0)
    return assemble(progress.record, state, mass, progress.initial, progress.valid)


def assemble(
    record: CallRecord, state: State, mass: jax.Array, initial: jax.Array, valid: jax.Array
) -> ActCalls:
    """Results from the records of all calls.

    Args:
      record: of rows that are done.
      state: after the last call, entries [B, H].
      mass: [M], summed over calls.
      initial: hidden state before the first call [B, H].
      valid: bool [B, C].
    """
    # Calls that are not valid repeat the hidden state before them.
    last = lax.cummax(jnp.where(valid, jnp.arange(valid.shape[1]), -1), axis=1)  # [B, C]
    hidden = jnp.take_along_axis(record.hidden, jnp.maximum(last, 0)[..., None], axis=1)
    hidden = jnp.where((last >= 0)[..., None], hidden, initial[:, None])
    return ActCalls(
        hidden=hidden,
        state=state,
        cost=record.steps + record.remainder,
        steps=record.steps,
        remainder=lax.stop_gradient(record.remainder),
        forced=record.forced,
        mass=mass,
        executed=count_steps(record),
    )


def count_steps(record: CallRecord) -> jax.Array:
    """The most inner steps any row made: int32 []."""
    return jnp.max(jnp.sum(record.steps, axis=1), initial=0).astype(jnp.int32)


def next_valid(valid: jax.Array, position: jax.Array) -> jax.Array:
    """The first valid call at or after a position [B]; C where there is none."""
    num_calls = valid.shape[1]
    index = jnp.arange(num_calls)
    ahead = valid & (index >= position[:, None])
    return jnp.min(jnp.where(ahead, index, num_calls), axis=1, initial=num_calls)


def _advance_once(weights: LoopWeights, progress: ActProgress) -> ActProgress:
    """One inner step; rows that halt record their call and enter the next."""
    settings, carry, position = progress.settings, progress.carry, progress.position
    rows, columns = jnp.arange(len(position)), jnp.arange(settings.time_limit)
    here = jnp.minimum(position, progress.valid.shape[1] - 1)
    product = progress.products[rows, here]  # [B, G*H]
    after = inner_step(settings, weights, product, carry)
    halted = carry.running & ~after.running  # [B]
    # After step n the mass counts once at n, and at all later ones when the row halts.
    at = carry.steps[:, None]
    counted = (columns == at) | (halted[:, None] & (columns > at))
    counted &= carry.running[:, None]
    curve = progress.curve + jnp.where(counted, after.mass[:, None], 0)

    slot = jnp.where(halted, position, progress.valid.shape[1])  # [B], beyond the end: dropped
    written = jnp.arange(progress.valid.shape[1]) == slot[:, None]  # [B, C]

    def put(leaf: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(written, value[:, None].astype(leaf.dtype), leaf)

    record = CallRecord(
        hidden=progress.record.hidden.at[rows, slot].set(after.mixed[0], mode="drop"),
        remainder=put(progress.record.remainder, after.remainder),
        steps=put(progress.record.steps, after.steps),
        forced=put(progress.record.forced, after.forced),
    )
    position = jnp.where(halted, next_valid(progress.valid, position + 1), position)
    fresh = start_carry(settings, after.mixed, position < progress.valid.shape[1])

    def choose(fresh: jax.Array, after: jax.Array, before: jax.Array) -> jax.Array:
        """A row enters its next call, or goes on, or is done and keeps its last state."""
        column = (-1, *(1,) * (fresh.ndim - 1))
        ongoing = jnp.where(carry.running.reshape(column), after, before)
        return jnp.where(halted.reshape(column), fresh, ongoing)

    return dataclasses.replace(
        progress,
        position=position,
        carry=jax.tree.map(choose, fresh, after, carry),
        record=record,
        curve=curve,
    )
