"""The inner step of adaptive computation time: the recurrence itself, written once.

Graves 2016, with s^0 the state before the call and A the halting mass given away so far:

    s^n = cell(s^{n-1}, [x ; 1{n=1}])          h^n = sigma(w.s^n + b)
    N = first n with A + h^n >= 1 - epsilon, at most M
    p^n = h^n for n < N, p^N = R = 1 - A       state = sum_n p^n s^n       cost = N + R

Halting runs in float32 (float64 where the state is) whatever the dtype of the matrix products, and
who still runs is a boolean, never read off the mass.

Weights of the unit: cell/... (see `cells`), halting/kernel [H, 1], halting/bias [1].
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from common.errors import UserError, require
from halting_jax.cells import (
    DTYPES,
    State,
    Weights,
    find_cell,
    init_cell,
    matmul,
    uniform,
)

EXECUTIONS = ("while", "chunked", "scan")


@dataclasses.dataclass(frozen=True)
class ActSettings:
    """How a call of the ponder loop runs; static.

    Attributes:
      cell: gru | lstm | tanh_rnn.
      time_limit: M, the most inner steps.
      epsilon: halting slack.
      execution: "while" stops when nobody runs, "chunked" skips whole chunks then, "scan" always
        makes M steps. Values and gradients are equal.
      chunk: inner steps per chunk of "chunked".
      dtype: of the matrix products, float32 | bfloat16.

    Raises:
      UserError: a value is out of range.
    """

    cell: str = "gru"
    time_limit: int = 20
    epsilon: float = 0.01
    execution: str = "while"
    chunk: int = 4
    dtype: str = "float32"

    def __post_init__(self) -> None:
        find_cell(self.cell)
        require(self.time_limit >= 1, f"time_limit={self.time_limit} must be at least 1")
        require(0 <= self.epsilon < 1, f"epsilon={self.epsilon} must be in [0, 1)")
        require(self.chunk >= 1, f"chunk={self.chunk} must be at least 1")
        for value, known in ((self.execution, EXECUTIONS), (self.dtype, DTYPES)):
            if value not in known:
                raise UserError(f"'{value}' is none of {', '.join(known)}")


class CellWeights(NamedTuple):
    """The cell's weights of an inner step: flag [G*H], kernel [H, G*H], bias [G*H]."""

    flag: jax.Array
    kernel: jax.Array
    bias: jax.Array


class LoopWeights(NamedTuple):
    """All weights of an inner step: those of the cell, halt_kernel [H], halt_bias []."""

    cell: CellWeights
    halt_kernel: jax.Array
    halt_bias: jax.Array


@flax.struct.dataclass
class ActCarry:
    """Where each row stands inside a call; every leaf has B rows.

    Attributes:
      state: s^n, entries [B, H].
      mixed: sum of p^k s^k so far, for those entries that the call returns.
      mass: A [B].
      remainder: R [B], 0 until the row halts.
      steps: int32 [B], inner steps so far (N once halted).
      running: bool [B].
      forced: bool [B], halted by the limit alone.
    """

    state: State
    mixed: State
    mass: jax.Array
    remainder: jax.Array
    steps: jax.Array
    running: jax.Array
    forced: jax.Array


def init_act(
    key: jax.Array, cell: str, num_inputs: int, hidden_size: int, halt_bias: float | None
) -> Weights:
    """Initial weights of cell and halting unit (module docstring), float32.

    Args:
      key: typed key.
      cell: its name.
      num_inputs: I, without the flag.
      hidden_size: H.
      halt_bias: initial bias of the halting unit; None = there is no such unit.
    """
    cell_key, halt_key = jax.random.split(key)
    weights = {"cell": init_cell(cell_key, cell, num_inputs, hidden_size)}
    if halt_bias is not None:
        weights["halting"] = {
            "kernel": uniform(halt_key, (hidden_size, 1), hidden_size),
            "bias": jnp.full((1,), halt_bias, jnp.float32),
        }
    return weights


def cell_weights(params: Weights) -> CellWeights:
    """The weights of the cell's step out of those of the unit."""
    cell = params["cell"]
    return CellWeights(cell["input"]["kernel"][-1], cell["state"]["kernel"], cell["state"]["bias"])


def loop_weights(params: Weights) -> LoopWeights:
    """The weights of the inner step out of those of the unit."""
    halting = params["halting"]
    return LoopWeights(cell_weights(params), halting["kernel"][:, 0], halting["bias"][0])


def cell_step(
    settings: ActSettings, weights: CellWeights, product: jax.Array, state: State, first: jax.Array
) -> State:
    """s^n from s^{n-1}; product [B, G*H], first bool [B] or [] (whether n = 1)."""
    a = product + jnp.where(jnp.expand_dims(first, -1), weights.flag, 0)
    u = matmul(state[0], weights.kernel, settings.dtype) + weights.bias
    return find_cell(settings.cell).step(a, u, state)


def halting_logit(weights: LoopWeights, state: State) -> jax.Array:
    """w.s + b [B], at least float32."""
    s = state[0].astype(jnp.promote_types(state[0].dtype, jnp.float32))
    # A product and a sum: a matrix product may run in reduced precision on an accelerator.
    return jnp.sum(s * weights.halt_kernel, axis=-1) + weights.halt_bias


def decide(settings: ActSettings, carry: ActCarry, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which rows halt at this step, and which of them by the limit alone; bool [B] each."""
    natural = carry.mass + p >= 1 - settings.epsilon
    last = carry.steps + 1 >= settings.time_limit
    return carry.running & (natural | last), carry.running & last & ~natural


def absorb(
    mixed: State,
    mass: jax.Array,
    remainder: jax.Array,
    state: State,
    p: jax.Array,
    running: jax.Array,
    halt: jax.Array,
) -> tuple[State, jax.Array, jax.Array]:
    """Adds s^n with weight p^n to the mix: (mixed, mass, remainder) after step n."""
    left = 1 - mass
    weight = jnp.where(running, jnp.where(halt, left, p), 0)  # [B]
    mixed = tuple(
        m + weight[:, None].astype(s.dtype) * s for m, s in zip(mixed, state, strict=False)
    )
    return mixed, mass + weight, remainder + jnp.where(halt, left, 0)


def start_carry(settings: ActSettings, state: State, valid: jax.Array) -> ActCarry:
    """Rows before their first inner step.

    Entries that the cell has beyond the given state (the memory of an LSTM that is reset in every
    call) start at 0 and are not mixed.
    """
    missing = find_cell(settings.cell).num_states - len(state)
    real = jnp.promote_types(state[0].dtype, jnp.float32)
    zeros = jnp.zeros(valid.shape, real)
    return ActCarry(
        state=state + (jnp.zeros_like(state[0]),) * missing,
        mixed=tuple(jnp.zeros_like(s) for s in state),
        mass=zeros,
        remainder=zeros,
        steps=jnp.zeros(valid.shape, jnp.int32),
        running=valid,
        forced=jnp.zeros(valid.shape, bool),
    )


def inner_step(
    settings: ActSettings, weights: LoopWeights, product: jax.Array, carry: ActCarry
) -> ActCarry:
    """One inner step of all rows; rows that have halted keep everything they return."""
    state = cell_step(settings, weights.cell, product, carry.state, carry.steps == 0)
    p = jax.nn.sigmoid(halting_logit(weights, state))
    halt, forced = decide(settings, carry, p)
    mixed, mass, remainder = absorb(
        carry.mixed, carry.mass, carry.remainder, state, p, carry.running, halt
    )
    return ActCarry(
        state=state,
        mixed=mixed,
        mass=mass,
        remainder=remainder,
        steps=carry.steps + carry.running,
        running=carry.running & ~halt,
        forced=carry.forced | forced,
    )
