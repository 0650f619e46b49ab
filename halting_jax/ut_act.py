"""Halting per position over hops of one shared block (Universal Transformer; tensor2tensor form).

Before hop t the signals are added to the state x and the halting unit gives p = sigmoid(x w + b).
With A the mass of a running position and theta = 1 - epsilon, the hop's weight is

    A + p > theta:   u = 1 - A,  the position halts, remainder R = 1 - A
    otherwise:       u = p,      A <- A + p

and u = 0 for positions that halted before. Then x <- block(x) for all positions, halted ones too,
which keep feeding the attention of the others, and

    basic:           out <- u x + (1 - u) out
    accumulated:     out <- out + u x, where a position that runs out of hops takes u = 1 - A

A position's cost is R + (number of hops it ran); the count is a constant for differentiation, and a
position that never reaches theta has R = 0. Every quantity has the rows of the batch in front and
knows its own hop, so rows whose positions have all halted may leave, and rows may be regrouped.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from halting_jax.signals import Signals
from halting_jax.types import Ponder


@dataclasses.dataclass(frozen=True)
class HaltingRule:
    """Static part of the bookkeeping.

    Attributes:
      max_hops: N, the limit.
      epsilon: a position halts once its mass exceeds 1 - epsilon.
      mix: "basic" or "accumulated".
      remat: recompute each hop in the backward pass.
    """

    max_hops: int
    epsilon: float = 0.01
    mix: str = "basic"
    remat: bool = False


class HopFunctions(NamedTuple):
    """What a hop is made of.

    Attributes:
      signals: position [>= S, H] and hop [>= N, H] tables.
      probability: state [B, S, H] -> halting probability [B, S], float32 or wider.
      block: state [B, S, H] -> state [B, S, H].
    """

    signals: Signals
    probability: Callable[[jax.Array], jax.Array]
    block: Callable[[jax.Array], jax.Array]


@flax.struct.dataclass
class HopCarry:
    """State of the loop; every leaf starts with the rows B.

    Attributes:
      state: [B, S, H], x.
      mixed: [B, S, H], out.
      mass: [B, S], A.
      remainder: [B, S], R.
      updates: [B, S], hops a position ran, as floating point.
      running: bool [B, S]; False for halted positions and for padding.
      hop: int32 [B], hops computed for the row.
    """

    state: jax.Array
    mixed: jax.Array
    mass: jax.Array
    remainder: jax.Array
    updates: jax.Array
    running: jax.Array
    hop: jax.Array


def start(state: jax.Array, mask: jax.Array) -> HopCarry:
    """The carry before the first hop.

    Args:
      state: [B, S, H], float32 or wider.
      mask: bool [B, S]; padding never runs.
    """
    # Derived from the arguments, so that the loop's types agree inside shard_map too.
    zeros = jnp.zeros_like(state[..., 0])
    return HopCarry(
        state=state,
        mixed=jnp.zeros_like(state),
        mass=zeros,
        remainder=zeros,
        updates=zeros,
        running=mask,
        hop=jnp.zeros_like(mask[:, 0], jnp.int32),
    )


def add_signals(state: jax.Array, signals: Signals, hop: jax.Array) -> jax.Array:
    """x + position signal + hop signal.

    Args:
      state: [B, S, H].
      signals: tables of at least S positions.
      hop: int32 [B] or [], which hop comes next.
    """
    row = signals.hop[hop]  # [B, H] or [H]
    return state + signals.position[: state.shape[1]] + row[..., None, :]


def halt(carry: HopCarry, probability: jax.Array, rule: HaltingRule) -> tuple[HopCarry, jax.Array]:
    """One step of the bookkeeping, without the block.

    Args:
      carry: before the hop.
      probability: p [B, S] of the state before the block.
      rule: limits and mix.

    Returns:
      the carry with mass, remainder, updates, running and hop brought forward, and the weight u
      [B, S] of the hop's state.
    """
    active = carry.running & (carry.hop < rule.max_hops)[:, None]
    halts = active & (carry.mass + probability > 1.0 - rule.epsilon)
    left = 1.0 - carry.mass
    given = jnp.where(halts, left, 0.0)
    weight = jnp.where(active, jnp.where(halts, left, probability), 0.0)
    brought = dataclasses.replace(
        carry,
        mass=carry.mass + weight,
        remainder=carry.remainder + given,
        updates=carry.updates + active,
        running=carry.running & ~halts,
        hop=carry.hop + 1,
    )
    if rule.mix == "accumulated":
        last = (carry.hop == rule.max_hops - 1)[:, None]
        weight = jnp.where(active & last, left, weight)
    return brought, weight


def make_hop(functions: HopFunctions, rule: HaltingRule) -> Callable[[HopCarry], HopCarry]:
    """The hop of the module docstring as a function of the carry."""

    def hop(carry: HopCarry) -> HopCarry:
        state = add_signals(carry.state, functions.signals, carry.hop)
        carry, weight = halt(carry, functions.probability(state), rule)
        state = functions.block(state)
        share = weight[..., None]  # [B, S, 1]
        if rule.mix == "accumulated":
            mixed = carry.mixed + share * state
        else:
            mixed = carry.mixed + share * (state - carry.mixed)
        return dataclasses.replace(carry, state=state, mixed=mixed)

    # The loop around it already keeps the two computations of a hop apart.
    return jax.checkpoint(hop, prevent_cse=False) if rule.remat else hop


def rows_running(carry: HopCarry, max_hops: int) -> jax.Array:
    """bool [B]: rows that need another hop."""
    return jnp.any(carry.running, axis=1) & (carry.hop < max_hops)


def advance(carry: HopCarry, functions: HopFunctions, rule: HaltingRule, num_hops: int) -> HopCarry:
    """Up to `num_hops` more hops as one scan; differentiable.

    Once no row needs another hop the rest of the scan costs nothing. A row that needs none while
    others do is computed with them, and its output stays as it is.

    Args:
      carry: rows may differ in their hop.
      functions, rule: what a hop is.
      num_hops: static.
    """
    hop = make_hop(functions, rule)

    def step(carry: HopCarry, _: None) -> tuple[HopCarry, None]:
        anyone = jnp.any(rows_running(carry, rule.max_hops))
        return jax.lax.cond(anyone, hop, lambda same: same, carry), None

    return jax.lax.scan(step, carry, None, length=num_hops)[0]


def run_out(carry: HopCarry, functions: HopFunctions, rule: HaltingRule) -> HopCarry:
    """Hops until nobody needs another, as a while loop; equals `advance`, but has no gradient."""
    hop = make_hop(functions, dataclasses.replace(rule, remat=False))
    return jax.lax.while_loop(lambda carry: jnp.any(rows_running(carry, rule.max_hops)), hop, carry)


def fixed_hops(
    state: jax.Array,
    signals: Signals,
    block: Callable[[jax.Array], jax.Array],
    num_hops: int,
    remat: bool = False,
    first: jax.Array | int = 0,
) -> jax.Array:
    """The state [B, S, H] after `num_hops` hops without halting, numbered from `first` on."""

    def hop(state: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        return block(add_signals(state, signals, index)), None

    body = jax.checkpoint(hop, prevent_cse=False) if remat else hop
    return jax.lax.scan(body, state, first + jnp.arange(num_hops))[0]


def halting_ponder(carry: HopCarry, mask: jax.Array) -> Ponder:
    """How long each position ran.

    Args:
      carry: after the last hop.
      mask: bool [B, S], positions that count.

    Returns:
      Ponder with C = S; executed is the largest number of hops computed for a row.
    """
    updates = jax.lax.stop_gradient(carry.updates)
    return Ponder(
        cost=carry.remainder + updates,
        steps=updates.astype(jnp.float32),
        remainder=jax.lax.stop_gradient(carry.remainder),
        forced=carry.running & mask,
        mask=mask,
        mass=jnp.zeros((0,), jnp.float32),
        executed=jnp.max(carry.hop),
    )


def fixed_ponder(state: jax.Array, mask: jax.Array, num_hops: int, charged: bool) -> Ponder:
    """Ponder of a run without halting: every position of the example took `num_hops`.

    Args:
      state: [B, S, H], for shape and dtype.
      mask: bool [B, S].
      num_hops: static.
      charged: whether the hops count as cost (a model that can halt, run for a fixed time).
    """
    zeros = jnp.zeros_like(state[..., 0])
    steps = jnp.where(mask, jnp.float32(num_hops), 0.0)
    return Ponder(
        cost=zeros + steps if charged else zeros,
        steps=steps,
        remainder=zeros,
        forced=jnp.zeros_like(mask),
        mask=mask,
        mass=jnp.zeros((0,), jnp.float32),
        executed=jnp.int32(num_hops),
    )
