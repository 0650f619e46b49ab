"""Reductions over the vocabulary, a cache-sized part of [B, V] at a time on CPUs.

A pass over two rows of logits needs several sums of the same exponentials. A GPU fuses them into
one kernel; the CPU compiler writes the exponentials to memory and reads them back for each sum. So
CPUs take a few rows and a few thousand columns at a time, whose exponentials stay in the cache.
The parts do not depend on the number of rows: neither does a row's result.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ROWS = 8
COLUMNS = 4096


def fold_columns(
    step: Callable[..., Any], carry: Any, *arrays: jax.Array, columns: int | None = None
) -> Any:
    """Folds step(carry, *parts) -> carry over blocks of columns.

    Args:
        step: takes and returns the carry; parts are [B, C], the last block may be narrower.
        carry: start, a tree of arrays whose shapes and dtypes `step` keeps.
        *arrays: each [B, V].
        columns: C; None = `COLUMNS` on CPUs, everything at once elsewhere.
    """
    width = arrays[0].shape[-1]
    if columns is None:
        columns = COLUMNS if jax.default_backend() == "cpu" else width
    blocks = width // columns
    if blocks * columns == width and blocks <= 1:
        return step(carry, *arrays)

    def one(index: jax.Array, carry: Any) -> Any:
        start = index * columns
        return step(carry, *(lax.dynamic_slice_in_dim(a, start, columns, 1) for a in arrays))

    carry = lax.fori_loop(0, blocks, one, carry) if blocks else carry
    if blocks * columns < width:
        carry = step(carry, *(a[:, blocks * columns :] for a in arrays))
    return carry


def map_rows(fn: Callable[..., Any], *trees: Any, rows: int | None = None) -> Any:
    """fn(*trees), a few rows at a time.

    Args:
        fn: treats each row by itself; takes and returns trees of arrays [R, ...].
        *trees: arrays [B, ...], the first [B, V]; None is passed on.
        rows: R; None = on CPUs `ROWS`, or more where rows are short, and all rows elsewhere.
    """
    count, width = jax.tree.leaves(trees)[0].shape
    if rows is None:
        rows = count
        if jax.default_backend() == "cpu":
            rows = ROWS * max(1, COLUMNS // width)
    if count <= rows:
        return fn(*trees)
    # The last part overlaps its predecessor instead of being padded or compiled a second time.
    starts = np.minimum(np.arange(-(-count // rows)) * rows, count - rows)

    def one(start: jax.Array) -> Any:
        return fn(*jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, rows, 0), trees))

    parts = lax.map(one, jnp.asarray(starts, jnp.int32))
    owner = np.arange(count) // rows
    place = owner * rows + np.arange(count) - starts[owner]

    def join(part: jax.Array) -> jax.Array:
        flat = part.reshape(-1, *part.shape[2:])
        return flat if count % rows == 0 else flat[place]

    return jax.tree.map(join, parts)
