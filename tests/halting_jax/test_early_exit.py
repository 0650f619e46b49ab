"""Rows that have halted leave the batch, and nothing changes but the cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halting_jax.early_exit import MIN_BUCKET, EarlyExit, bucket_size
from halting_jax.types import Batch, Model, Outputs, Ponder

LIMIT = 40


def _batch(need: np.ndarray) -> Batch:
    rows = len(need)
    return Batch(
        inputs=jnp.asarray(need, jnp.float32)[:, None],
        input_mask=jnp.ones((rows, 1), bool),
        targets=jnp.zeros(rows, jnp.int32),
        target_mask=jnp.ones(rows, bool),
        decoder_inputs=jnp.zeros((rows, 0), jnp.int32),
        difficulty=jnp.asarray(need),
    )


def _counting_model() -> Model:
    """Counts up to a row's own number; the result is the sum of the numbers counted."""

    def start(params: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        zeros = jnp.zeros(len(batch.inputs))
        return zeros, zeros, batch.inputs[:, 0]

    def running(carry: tuple[jax.Array, ...]) -> jax.Array:
        return carry[0] < carry[2]

    def advance(params: jax.Array, carry: tuple[jax.Array, ...], count: int) -> tuple:
        done, total, need = carry
        for _ in range(count):
            more = done < need
            done = jnp.where(more, done + 1, done)
            total = jnp.where(more, total + params * done, total)
        return done, total, need

    def finish(params: jax.Array, carry: tuple[jax.Array, ...]) -> Outputs:
        done, total, _ = carry
        ponder = Ponder(
            cost=done[:, None],
            steps=done[:, None],
            remainder=done[:, None] * 0,
            forced=done[:, None] < 0,
            mask=done[:, None] >= 0,
            mass=jnp.zeros(0),
            executed=jnp.int32(0),
        )
        return Outputs(total, ponder)

    def apply(params: jax.Array, batch: Batch, fixed_steps: int = 0) -> Outputs:
        return finish(params, advance(params, start(params, batch), LIMIT))

    return Model(
        "counting", lambda key: jnp.ones(()), apply, "", LIMIT, start, advance, running, finish
    )


@pytest.mark.parametrize("rows, stride", [(1, 1), (7, 1), (64, 1), (50, 3)])
def test_same_results_at_the_cost_of_the_mean(rows: int, stride: int) -> None:
    need = np.random.default_rng(rows).geometric(0.25, rows).clip(1, LIMIT)
    model, batch = _counting_model(), _batch(need)
    early = EarlyExit(model, stride)
    found, expected = early(jnp.float32(2.0), batch), model.apply(jnp.float32(2.0), batch)
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.ponder.steps[:, 0], need)
    assert early.row_steps < rows * (need.max() + stride) or rows <= MIN_BUCKET
    if rows == 64:
        # Halving buckets are at most twice as large as what runs.
        assert early.row_steps <= 2 * need.sum() + MIN_BUCKET * need.max()
        assert early.row_steps < 0.75 * rows * need.max()


def test_buckets_halve_and_hold_what_runs() -> None:
    for total in (8, 50, 64, 127):
        sizes = {bucket_size(count, total) for count in range(1, total + 1)}
        assert all(bucket_size(c, total) >= c for c in range(1, total + 1))
        assert len(sizes) <= 1 + int(np.log2(max(total // MIN_BUCKET, 1))) + 1
