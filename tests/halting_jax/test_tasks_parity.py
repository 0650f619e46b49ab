"""Parity against counting by hand, and where its values lie."""

import numpy as np
import pytest

from halting_jax.tasks.parity import make_parity
from tests.halting_jax.task_cases import assert_uniform, batch_of, task_of

CASES = ("parity-prefix", "parity-random")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", ["train", "near_ood", "ood"])
def test_target_is_whether_the_number_of_plus_ones_is_odd(case, split):
    batch = batch_of(case, split)
    assert set(np.unique(batch.inputs)) == {-1.0, 0.0, 1.0}
    for values, mask, target, bits in zip(
        batch.inputs, batch.input_mask, batch.targets, batch.difficulty, strict=True
    ):
        assert target == sum(1 for v in values if v == 1) % 2
        assert bits == sum(1 for v in values if v != 0) == mask.sum()
    assert 0.44 < batch.targets.mean() < 0.56
    signs = batch.inputs[batch.input_mask]
    assert abs(signs.mean()) < 5 / np.sqrt(signs.size)


def test_lengths_of_the_sets():
    for case, ranges in (
        ("parity-prefix", {"train": (1, 7), "id": (1, 7), "near_ood": (8, 11), "ood": (12, 15)}),
        ("parity-random", {"train": (1, 6), "val": (1, 6), "near_ood": (7, 10), "ood": (11, 40)}),
    ):
        for split, (low, high) in ranges.items():
            assert_uniform(batch_of(case, split).difficulty, low, high)


def test_prefix_fills_the_first_columns():
    batch = batch_of("parity-prefix")
    expected = np.arange(batch.inputs.shape[1]) < batch.difficulty[:, None]
    np.testing.assert_array_equal(batch.input_mask, expected)


def test_random_places_are_uniform_and_independent_of_the_sign():
    batch = batch_of("parity-random")
    rows, width = batch.inputs.shape
    used = batch.input_mask.sum(0)
    share = batch.difficulty.sum() / (rows * width)
    np.testing.assert_allclose(used, rows * share, atol=5 * np.sqrt(rows * share * (1 - share)))
    assert abs(batch.inputs.sum(0)).max() < 5 * np.sqrt(used.max())
    # Neighbours are as likely as distant columns: with m bits, m (m - 1) / (W (W - 1)).
    both = (batch.input_mask[:, 3] & batch.input_mask[:, 4]).mean()
    m = batch.difficulty.astype(float)
    expected = (m * (m - 1)).mean() / (width * (width - 1))
    assert abs(both - expected) < 5 * np.sqrt(expected / rows)


def test_signs_differ_between_columns_of_different_words():
    batch = batch_of("parity-random", "ood")
    both = batch.input_mask[:, 0] & batch.input_mask[:, 32]
    agree = (batch.inputs[both, 0] == batch.inputs[both, 32]).mean()
    assert abs(agree - 0.5) < 5 * 0.5 / np.sqrt(both.sum())


def test_sets_can_be_left_out():
    task = make_parity(bits=8, near_ood_bits=-1, ood_bits=-1)
    assert task.shape.features == 8 and task.eval_sets == ("id",)
    assert make_parity(bits=8, near_ood_bits=-1).eval_sets == ("id", "ood")
    assert task_of("parity-prefix").eval_sets == ("id", "near_ood", "ood")
