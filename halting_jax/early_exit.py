"""Batched inference in which rows that have halted stop costing, as one compiled program.

The rows still running are gathered into smaller and smaller buckets, so a batch costs about the sum
of its rows' steps instead of the number of rows times the slowest row's steps. The sizes follow
from the number of rows alone, and nothing is decided on the host: B, 0.6 B, 0.36 B, .., rounded up,
LEVELS at most and none below SMALLEST. Every size is one copy of the model's step in the program,
which is what limits their number; a batch of at most WHOLE rows is not divided.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from halting_jax.types import Batch, Model, Outputs, Params

RATIO = 0.6
LEVELS = 6
SMALLEST = 5
WHOLE = 8


def bucket_sizes(rows: int) -> tuple[int, ...]:
    """Sizes of the buckets of a batch of so many rows, falling, the batch itself first."""
    if rows <= WHOLE:
        return (rows,)
    sizes = (math.ceil(rows * RATIO**level) for level in range(LEVELS))
    return tuple(size for size in sizes if size >= SMALLEST)


def with_early_exit(model: Model) -> Callable[[Params, Batch], tuple[Outputs, jax.Array]]:
    """Makes the inference of a model whose halted rows leave the batch.

    Args:
      model: one with `start`, `advance`, `running` and `finish`.

    Returns:
      (params, batch of B rows) -> what `model.apply` returns, apart from `ponder.executed`, which
      is the row-steps computed divided by B, rounded up; and these row-steps, int32 [], rows that
      fill a bucket up included. To be compiled by the caller; it has no gradient.
    """
    assert model.start and model.advance and model.running and model.finish
    start, advance, running, finish = model.start, model.advance, model.running, model.finish

    def apply(params: Params, batch: Batch) -> tuple[Outputs, jax.Array]:
        def down(rows: Any, row_steps: jax.Array, sizes: tuple[int, ...]) -> tuple[Any, jax.Array]:
            size, *smaller = sizes
            most = smaller[0] if smaller else 0

            def go_on(loop: tuple[Any, jax.Array]) -> jax.Array:
                return jnp.sum(running(loop[0])) > most

            def step(loop: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
                return advance(params, loop[0], 1), loop[1] + size

            rows, row_steps = jax.lax.while_loop(go_on, step, (rows, row_steps))
            if not smaller:
                return rows, row_steps
            # Running rows first, in their order; halted ones fill up and stay as they are.
            chosen = jnp.argsort(~running(rows), stable=True)[:most]
            part = jax.tree.map(lambda x: x[chosen], rows)
            part, row_steps = down(part, row_steps, tuple(smaller))
            rows = jax.tree.map(lambda x, y: x.at[chosen].set(y, unique_indices=True), rows, part)
            return rows, row_steps

        rows = start(params, batch)
        size = batch.inputs.shape[0]
        rows, row_steps = down(rows, jnp.int32(0), bucket_sizes(size))
        outputs = finish(params, rows)
        ponder = outputs.ponder.replace(executed=-(-row_steps // size))  # type: ignore[attr-defined]
        return outputs.replace(ponder=ponder), row_steps  # type: ignore[attr-defined]

    return apply
