"""One call of the ponder loop of adaptive computation time (Graves 2016).

The equations stand in `act_step`, the ways to run them in `act_execution`. N is a constant for
differentiation: gradients flow through the mixed state and through the remainder alone.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from common.errors import require
from halting_jax.act_execution import EXECUTE, Run
from halting_jax.act_step import (
    ActSettings,
    CellWeights,
    cell_step,
    cell_weights,
    halting_logit,
    loop_weights,
    start_carry,
)
from halting_jax.cells import State, Weights
from halting_jax.types import Ponder


@flax.struct.dataclass
class ActResult:
    """What a call returns.

    Attributes:
      state: the mixed state (fixed steps: the last one); rows that are not valid keep theirs.
      cost: N + R [B], differentiable; 0 with fixed steps.
      steps: N as float [B].
      remainder: R [B], without gradient.
      forced: bool [B].
      mass: [M], sum over rows of the mass after each inner step, the last value repeated.
      executed: int32 [], inner steps computed.
    """

    state: State
    cost: jax.Array
    steps: jax.Array
    remainder: jax.Array
    forced: jax.Array
    mass: jax.Array
    executed: jax.Array


@flax.struct.dataclass
class ActCalls:
    """Results of C calls per row.

    Attributes:
      hidden: [B, C, H], the hidden state after each call; a call that is not valid repeats the
        one before it.
      state: after the last call, entries [B, H].
      cost: N + R [B, C], differentiable.
      steps: N as float [B, C].
      remainder: [B, C], without gradient.
      forced: bool [B, C].
      mass: [M], sum over all calls of the mass after each inner step.
      executed: int32 [], inner steps computed.
    """

    hidden: jax.Array
    state: State
    cost: jax.Array
    steps: jax.Array
    remainder: jax.Array
    forced: jax.Array
    mass: jax.Array
    executed: jax.Array

    def ponder(self, mask: jax.Array) -> Ponder:
        """The report of these calls; mask bool [B, C]."""
        return Ponder(
            cost=self.cost,
            steps=self.steps,
            remainder=self.remainder,
            forced=self.forced,
            mask=mask,
            mass=self.mass,
            executed=self.executed,
        )


def act(
    params: Weights,
    product: jax.Array,
    state: State,
    settings: ActSettings,
    *,
    valid: jax.Array | None = None,
    fixed_steps: int = 0,
) -> ActResult:
    """One call of the ponder loop.

    Args:
      params: weights of the unit.
      product: [B, G*H], `cells.input_product` of the call's input.
      state: entries [B, H]; an LSTM given only its hidden state starts with an empty memory.
      settings: static.
      valid: bool [B]; other rows do not run: N = R = 0, state as given. None = all.
      fixed_steps: if positive (static), exactly that many steps and the last state, without
        halting; may exceed the limit. Needs no halting unit.

    Returns:
      an ActResult.
    """
    if valid is None:
        valid = jnp.ones(product.shape[:1], bool)
    if fixed_steps:
        return _fixed(settings, cell_weights(params), product, state, valid, fixed_steps)
    weights = loop_weights(params)
    run = EXECUTE[settings.execution](settings, weights, product, state, valid)
    return collect(run, state, valid)


def collect(run: Run, state: State, valid: jax.Array) -> ActResult:
    """The result of a run that began at `state`."""
    steps = run.steps.astype(run.remainder.dtype)
    return ActResult(
        state=keep_invalid(run.mixed, state, valid),
        cost=steps + run.remainder,
        steps=steps,
        remainder=lax.stop_gradient(run.remainder),
        forced=run.forced,
        mass=run.mass,
        executed=run.executed,
    )


def keep_invalid(new: State, old: State, valid: jax.Array) -> State:
    """`new` on valid rows, `old` on the others."""
    return tuple(jnp.where(valid[:, None], n, o) for n, o in zip(new, old, strict=False))


def _fixed(
    settings: ActSettings,
    weights: CellWeights,
    product: jax.Array,
    state: State,
    valid: jax.Array,
    count: int,
) -> ActResult:
    """`count` steps of the cell, last state."""
    require(count > 0, f"fixed_steps={count} must be positive (0 = halt)")
    start = start_carry(settings, state, valid)

    def body(inner: State, n: jax.Array) -> tuple[State, None]:
        return cell_step(settings, weights, product, inner, n == 0), None

    last, _ = lax.scan(body, start.state, jnp.arange(count))
    zeros = start.mass
    return ActResult(
        state=keep_invalid(last[: len(state)], state, valid),
        cost=zeros,
        steps=jnp.where(valid, count, zeros),
        remainder=zeros,
        forced=jnp.zeros(valid.shape, bool),
        mass=jnp.full((settings.time_limit,), jnp.sum(valid), zeros.dtype),
        executed=jnp.int32(count),
    )


def unroll(
    params: Weights, product: jax.Array, state: State, settings: ActSettings
) -> tuple[jax.Array, jax.Array]:
    """M inner steps of every row, whether it would have halted or not.

    Args:
      params: weights of the unit.
      product: [B, G*H].
      state: entries [B, H].
      settings: static.

    Returns:
      hidden states s^n [M, B, H] and halting logits w.s^n + b [M, B].
    """
    weights = loop_weights(params)
    start = start_carry(settings, state, jnp.ones(product.shape[:1], bool))

    def body(inner: State, n: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
        inner = cell_step(settings, weights.cell, product, inner, n == 0)
        return inner, (inner[0], halting_logit(weights, inner))

    return lax.scan(body, start.state, jnp.arange(settings.time_limit))[1]
