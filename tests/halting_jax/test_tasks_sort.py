"""Sort against Python's sorted."""

import jax.numpy as jnp
import numpy as np

from halting_jax.tasks import sort
from tests.halting_jax.task_cases import assert_uniform, batch_of


def rows_of(batch):
    """Inputs, both masks, targets and the number of items, row by row."""
    columns = (batch.inputs, batch.input_mask, batch.targets, batch.target_mask, batch.difficulty)
    return zip(*columns, strict=True)


def test_paper_frames():
    batch = batch_of("sort-paper")
    for inputs, mask, targets, scored, n in rows_of(batch):
        values = inputs[:n, 0].tolist()
        assert inputs[:, 1].tolist() == [float(t == n - 1) for t in range(12)]
        assert not inputs[n:].any() and mask.tolist() == [t < 2 * n for t in range(12)]
        assert scored.tolist() == [n <= t < 2 * n for t in range(12)]
        assert targets[n : 2 * n].tolist() == sorted(range(n), key=values.__getitem__)
    assert_uniform(batch.difficulty, 2, 6)


def test_original_frames():
    batch = batch_of("sort-original")
    for inputs, mask, targets, scored, n in rows_of(batch):
        values = inputs[:n, 0].tolist()
        expected = np.zeros((10, 7))
        expected[:n, 0] = values
        expected[np.arange(n), 1 + np.arange(n)] = 1
        expected[5 : 5 + n, 6] = 1
        np.testing.assert_array_equal(inputs, expected.astype(np.float32))
        assert mask.tolist() == [t < n or 5 <= t < 5 + n for t in range(10)]
        assert scored.tolist() == [5 <= t < 5 + n for t in range(10)]
        assert targets[5 : 5 + n].tolist() == sorted(range(n), key=values.__getitem__)
    assert_uniform(batch.difficulty, 1, 5)


def test_values_are_standard_normal():
    batch = batch_of("sort-paper")
    values = batch.inputs[:, :6, 0][batch.input_mask[:, :6] & ~batch.target_mask[:, :6]]
    n = values.size
    assert abs(values.mean()) < 5 / np.sqrt(n)
    assert abs(values.std() - 1) < 5 / np.sqrt(2 * n)
    for limit, share in ((1.0, 0.68269), (2.0, 0.95450), (3.0, 0.99730)):
        within = (np.abs(values) < limit).mean()
        assert abs(within - share) < 5 * np.sqrt(share * (1 - share) / n)


def test_equal_values_keep_their_order():
    values = jnp.asarray([[1.0, 0.5, 1.0, 0.5, 9.0]])
    order = sort.sorting_order(values, jnp.asarray([4]))
    assert order.tolist() == [[1, 3, 0, 2, 0]]
