"""Sinusoid tables that tell positions and hops apart (Universal Transformer, tensor2tensor form).

With k = channels // 2 and inverse scales inv_i = exp(-i ln(1e4) / max(k - 1, 1)), i < k,

    row(pos) = [sin(pos inv_0) .. sin(pos inv_{k-1}) | cos(pos inv_0) .. cos(pos inv_{k-1})]

with one zero column behind it when channels is odd, and nothing but zeros when channels < 2. Rows
do not depend on the length of the table, so a longer one extends a shorter one.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import require

LARGEST_SCALE = 1e4
POSITIONS = ("1d", "2d")


class Signals(NamedTuple):
    """What is added to the state before every hop.

    Attributes:
      position: float32 [S, H], row s belongs to position s.
      hop: float32 [N, H], row t belongs to hop t.
    """

    position: jax.Array
    hop: jax.Array


@functools.cache
def sinusoids(length: int, channels: int) -> np.ndarray:
    """The table of the module docstring, float32 [length, channels]; read-only."""
    half = channels // 2
    table = np.zeros((length, channels), np.float32)
    if half:
        exponents = np.arange(half, dtype=np.float32) * -np.float32(
            math.log(LARGEST_SCALE) / max(half - 1, 1)
        )
        # Products are rounded to float32 as in the reference; the functions themselves are taken
        # in float64, because the float32 ones of different libraries differ in the last bit, and
        # a bit of inv becomes a hundred bits at position 100.
        inverse = np.exp(exponents.astype(np.float64)).astype(np.float32)
        angles = np.arange(length, dtype=np.float32)[:, None] * inverse  # [length, half]
        table[:, :half] = np.sin(angles.astype(np.float64))
        table[:, half : 2 * half] = np.cos(angles.astype(np.float64))
    table.flags.writeable = False
    return table


@functools.cache
def grid_sinusoids(side: int, channels: int) -> np.ndarray:
    """Sinusoids of a square grid, read row by row: float32 [side * side, channels].

    The first channels // 2 columns are the table of the row, the others that of the column.
    """
    rows = sinusoids(side, channels // 2)
    columns = sinusoids(side, channels - channels // 2)
    table = np.concatenate(
        [np.repeat(rows, side, axis=0), np.tile(columns, (side, 1))], axis=1
    )  # [side * side, channels]
    table.flags.writeable = False
    return table


def make_signals(length: int, channels: int, hops: int, pos: str = "1d") -> Signals:
    """Both tables of a model.

    Args:
      length: S, positions.
      channels: H.
      hops: N, rows of the hop table.
      pos: "1d" (one sinusoid along the sequence) or "2d" (row and column of a square grid).

    Returns:
      Signals with position [S, H] and hop [N, H], float32.

    Raises:
      UserError: unknown `pos`, or "2d" for a length that is no square.
    """
    require(pos in POSITIONS, f"ut.pos={pos!r} is none of {', '.join(POSITIONS)}")
    if pos == "1d":
        position = sinusoids(length, channels)
    else:
        side = math.isqrt(length)
        require(
            side * side == length,
            f"ut.pos=2d needs a square grid, {length} positions are none; use ut.pos=1d",
        )
        position = grid_sinusoids(side, channels)
    return Signals(jnp.asarray(position), jnp.asarray(sinusoids(hops, channels)))
