"""Batched inference in which rows that have halted stop costing.

The rows still running are gathered into buckets of halving size; so the work of a batch is close
to the sum of its rows' steps instead of the number of rows times the slowest row's steps.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from halting_jax.types import Batch, Model, Outputs, Params

MIN_BUCKET = 8  # smaller batches cost as much as this one


class EarlyExit:
    """Compiled pieces of a model's inference; call it like `model.apply`."""

    def __init__(self, model: Model, stride: int = 1) -> None:
        """Compiles nothing yet.

        Args:
          model: one with `start`, `advance`, `running` and `finish`.
          stride: inner steps between two looks at who still runs.
        """
        assert model.start and model.advance and model.running and model.finish
        running = model.running
        self._start = jax.jit(model.start)
        self._finish = jax.jit(model.finish)
        advance = model.advance
        self._stride = stride

        def advanced(params: Params, carry: Any) -> tuple[Any, jax.Array]:
            carry = advance(params, carry, stride)
            return carry, running(carry)

        self._advance = jax.jit(advanced)
        self._running = jax.jit(running)
        self._take = jax.jit(lambda carry, rows: jax.tree.map(lambda x: x[rows], carry))
        # Rows beyond the end fill a bucket up; writing them back is dropped.
        self._put = jax.jit(
            lambda carry, part, rows: jax.tree.map(
                lambda x, y: x.at[rows].set(y, mode="drop"), carry, part
            ),
            donate_argnums=0,
        )
        # Row-steps computed by the last call, fillings included; for measuring.
        self.row_steps = 0

    def __call__(self, params: Params, batch: Batch) -> Outputs:
        """Run every row until it halts.

        Args:
          params: weights.
          batch: B rows.

        Returns:
          what `model.apply` returns, apart from `ponder.executed`: here the row-steps computed
          divided by B, rounded up.
        """
        carry = self._start(params, batch)
        alive = np.asarray(self._running(carry))
        total = len(alive)
        self.row_steps = 0
        members = np.arange(total)  # rows of `part`, as rows of the batch
        part = carry
        while alive.any():
            bucket = bucket_size(int(alive.sum()), total)
            if bucket < len(members):
                if part is not carry:
                    carry = self._put(carry, part, jnp.asarray(members))
                kept = members[alive]
                members = np.full(bucket, total)
                members[: len(kept)] = kept
                # Out-of-range gathers clamp: fillings repeat the last row, which has no effect.
                part = self._take(carry, jnp.asarray(np.minimum(members, total - 1)))
            part, running = self._advance(params, part)
            self.row_steps += len(members) * self._stride
            alive = np.asarray(running) & (members < total)
        if part is not carry:
            carry = self._put(carry, part, jnp.asarray(members))
        outputs = self._finish(params, carry)
        executed = jnp.int32(math.ceil(self.row_steps / max(total, 1)))
        return outputs.replace(  # type: ignore[attr-defined]
            ponder=outputs.ponder.replace(executed=executed)
        )


def bucket_size(count: int, total: int) -> int:
    """The smallest of total, total / 2, total / 4, ... (not below MIN_BUCKET) that holds count."""
    size = total
    while size > MIN_BUCKET and -(-size // 2) >= count:
        size = -(-size // 2)
    return size
