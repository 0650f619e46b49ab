"""Calls of the ponder loop one after another, the state carried from call to call.

Mazes and parity make one call per row, sequences one per frame.
"""

import jax
import jax.numpy as jnp
from jax import lax

from halting_jax.act import ActCalls, act
from halting_jax.act_ahead import run_ahead
from halting_jax.act_step import ActSettings
from halting_jax.cells import State, Weights, find_cell


def zero_state(products: jax.Array, settings: ActSettings, num_states: int) -> State:
    """An all-zero state for the rows of input products [B, ..., G*H]: num_states x [B, H]."""
    width = products.shape[-1] // find_cell(settings.cell).num_gates
    zeros = jnp.zeros((products.shape[0], width), products.dtype)
    return (zeros,) * num_states


def act_calls(
    params: Weights,
    products: jax.Array,
    state: State,
    settings: ActSettings,
    *,
    valid: jax.Array,
    fixed_steps: int = 0,
) -> ActCalls:
    """C calls in sequence.

    With execution "while" every row goes through its own calls (see `act_ahead`); otherwise the
    rows enter each call together.

    Args:
      params: weights of the unit (see `act_step`).
      products: [B, C, G*H], `cells.input_product` of the inputs.
      state: before the first call, entries [B, H].
      settings: static.
      valid: bool [B, C]; at other calls a row does not run: N = R = 0, state unchanged.
      fixed_steps: see `act.act`.
    """

    def call(state: State, inputs: tuple[jax.Array, jax.Array]) -> tuple[State, ActCalls]:
        product, valid = inputs
        result = act(params, product, state, settings, valid=valid, fixed_steps=fixed_steps)
        return result.state, ActCalls(
            hidden=result.state[0],
            state=(),
            cost=result.cost,
            steps=result.steps,
            remainder=result.remainder,
            forced=result.forced,
            mass=result.mass,
            executed=result.executed,
        )

    if products.shape[1] == 1:
        last, calls = call(state, (products[:, 0], valid[:, 0]))
        calls = jax.tree.map(lambda leaf: leaf[None], calls)
    elif settings.execution == "while" and not fixed_steps:
        return run_ahead(params, products, state, settings, valid)
    else:
        # "chunked" rebuilds the chunks of a call in the backward pass instead of keeping them.
        body = jax.checkpoint(call) if settings.execution == "chunked" else call
        last, calls = lax.scan(body, state, (jnp.swapaxes(products, 0, 1), valid.T))
    return ActCalls(
        hidden=jnp.swapaxes(calls.hidden, 0, 1),
        state=last,
        cost=calls.cost.T,
        steps=calls.steps.T,
        remainder=calls.remainder.T,
        forced=calls.forced.T,
        mass=jnp.sum(calls.mass, axis=0),
        executed=jnp.sum(calls.executed),
    )
