"""Recurrent cells as pure step functions over explicit weights.

A cell reads `[x ; flag]`, flag = 1 at the first inner step of a call of the ponder loop. Its input
product `a = W_ih [x ; 0] + b_ih` is the same at every inner step, so it is computed once per call;
a step adds the flag's column and the state's product `u = W_hh s + b_hh`.

Weights of a cell with G gates, input width I and hidden width H, gates stacked on the last axis:

    input/kernel [I + 1, G*H] (the flag is the last row)   input/bias [G*H]
    state/kernel [H, G*H]                                  state/bias [G*H]
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError

State = tuple[jax.Array, ...]
"""Hidden state first ([B, H]); the LSTM's memory cell second."""

Weights = Mapping[str, Any]
DTYPES = ("float32", "bfloat16")


class Cell(NamedTuple):
    """One kind of cell.

    Attributes:
      num_gates: G.
      num_states: entries of its state.
      step: (a [B, G*H], u [B, G*H], state) -> new state.
    """

    num_gates: int
    num_states: int
    step: Callable[[jax.Array, jax.Array, State], State]


def _gru(a: jax.Array, u: jax.Array, state: State) -> State:
    """r, z = sigma(a + u); n = tanh(a_n + r * u_n); s' = (1 - z) * n + z * s."""
    (s,) = state
    a_r, a_z, a_n = jnp.split(a, 3, axis=-1)  # each [B, H]
    u_r, u_z, u_n = jnp.split(u, 3, axis=-1)
    r, z = jax.nn.sigmoid(a_r + u_r), jax.nn.sigmoid(a_z + u_z)
    n = jnp.tanh(a_n + r * u_n)
    return ((1 - z) * n + z * s,)


def _lstm(a: jax.Array, u: jax.Array, state: State) -> State:
    """c' = sigma(f) * c + sigma(i) * tanh(g); s' = sigma(o) * tanh(c')."""
    _, c = state
    i, f, g, o = jnp.split(a + u, 4, axis=-1)  # each [B, H]
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _tanh_rnn(a: jax.Array, u: jax.Array, state: State) -> State:
    """s' = tanh(a + u)."""
    del state
    return (jnp.tanh(a + u),)


CELLS = {"gru": Cell(3, 1, _gru), "lstm": Cell(4, 2, _lstm), "tanh_rnn": Cell(1, 1, _tanh_rnn)}


def find_cell(name: str) -> Cell:
    """The cell of this name.

    Raises:
      UserError: there is none.
    """
    if name not in CELLS:
        raise UserError(f"cell '{name}' is none of {', '.join(CELLS)}")
    return CELLS[name]


def uniform(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
    """float32 draws from U(-1/sqrt(fan), 1/sqrt(fan))."""
    bound = 1.0 / math.sqrt(max(fan, 1))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def init_linear(key: jax.Array, num_inputs: int, num_outputs: int, fan: int = 0) -> Weights:
    """Weights {"kernel" [in, out], "bias" [out]}, all U(+-1/sqrt(fan)); fan 0 = num_inputs."""
    kernel_key, bias_key = jax.random.split(key)
    fan = fan or num_inputs
    return {
        "kernel": uniform(kernel_key, (num_inputs, num_outputs), fan),
        "bias": uniform(bias_key, (num_outputs,), fan),
    }


def init_cell(key: jax.Array, name: str, num_inputs: int, hidden_size: int) -> Weights:
    """Initial weights of a cell (module docstring), all U(+-1/sqrt(H)).

    Args:
      key: typed key.
      name: of the cell.
      num_inputs: I, without the flag.
      hidden_size: H.

    Raises:
      UserError: unknown cell.
    """
    width = find_cell(name).num_gates * hidden_size
    input_key, state_key = jax.random.split(key)
    return {
        "input": init_linear(input_key, num_inputs + 1, width, hidden_size),
        "state": init_linear(state_key, hidden_size, width, hidden_size),
    }


def matmul(x: jax.Array, kernel: jax.Array, dtype: str = "float32") -> jax.Array:
    """x [..., D] times kernel [D, F] -> [..., F] of x's dtype.

    The leading axes are merged first: on CPU a weight gradient that contracts over two axes is
    more than twice as slow as that of a plain matrix product.

    Args:
      dtype: of the product itself; "float32" leaves the operands as they are (never lowers
        float64), "bfloat16" rounds both.
    """
    flat = x.reshape(-1, x.shape[-1])
    if dtype == "bfloat16":
        product = (flat.astype(jnp.bfloat16) @ kernel.astype(jnp.bfloat16)).astype(x.dtype)
    else:
        product = flat @ kernel
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(weights: Weights, x: jax.Array, dtype: str = "float32") -> jax.Array:
    """x [..., D] -> [..., F]: W x + b."""
    return matmul(x, weights["kernel"], dtype) + weights["bias"]


def input_product(cell: Weights, x: jax.Array, dtype: str = "float32") -> jax.Array:
    """a = W_ih [x ; 0] + b_ih: the part of a step that does not change within a call.

    Args:
      cell: weights of the cell.
      x: [..., I].
      dtype: of the product.

    Returns:
      [..., G*H].
    """
    return matmul(x, cell["input"]["kernel"][:-1], dtype) + cell["input"]["bias"]
