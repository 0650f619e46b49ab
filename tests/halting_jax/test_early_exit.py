"""Rows that have halted leave the batch, and nothing changes but the cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halting_jax.early_exit import LEVELS, SMALLEST, WHOLE, bucket_sizes, with_early_exit
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


@pytest.mark.parametrize("rows", [1, 7, 50, 64])
def test_same_results_at_the_cost_of_the_mean(rows: int) -> None:
    need = np.random.default_rng(rows).geometric(0.25, rows).clip(1, LIMIT)
    model, batch = _counting_model(), _batch(need)
    found, row_steps = jax.jit(with_early_exit(model))(jnp.float32(2.0), batch)
    expected = model.apply(jnp.float32(2.0), batch)
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.ponder.steps[:, 0], need)
    assert int(found.ponder.executed) == -(-int(row_steps) // rows)
    # Exactly the smallest bucket that holds what runs, at every step.
    sizes = bucket_sizes(rows)
    alive = [int((need > step).sum()) for step in range(need.max())]
    assert int(row_steps) == sum(min(s for s in sizes if s >= count) for count in alive)
    if rows == 64:
        assert row_steps <= 1.5 * need.sum() + SMALLEST * need.max()
        assert row_steps < 0.75 * rows * need.max()


def test_a_row_that_never_starts_and_a_batch_that_stops_at_once() -> None:
    need = np.zeros(20, int)
    model = _counting_model()
    run = jax.jit(with_early_exit(model))
    found, row_steps = run(jnp.float32(2.0), _batch(need))
    assert row_steps == 0 and not np.any(found.logits)
    need[13] = LIMIT
    found, row_steps = run(jnp.float32(2.0), _batch(need))
    np.testing.assert_array_equal(found.ponder.steps[:, 0], need)
    assert row_steps == bucket_sizes(20)[-1] * LIMIT


def test_buckets_fall_from_the_batch_to_the_smallest() -> None:
    assert bucket_sizes(64) == (64, 39, 24, 14, 9, 5)
    assert bucket_sizes(512) == (512, 308, 185, 111, 67, 40)
    assert bucket_sizes(8) == (8,) and bucket_sizes(3) == (3,)
    for rows in range(1, 300):
        sizes = bucket_sizes(rows)
        assert sizes[0] == rows and len(sizes) <= LEVELS
        assert len(sizes) == 1 if rows <= WHOLE else sizes[-1] >= SMALLEST
        assert all(b < a <= 2 * b for a, b in zip(sizes, sizes[1:], strict=False))
