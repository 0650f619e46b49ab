"""Addition against Python integers, the digit arrays too."""

import jax.numpy as jnp
import numpy as np
import pytest

from halting_jax.tasks import addition
from halting_jax.tasks import digits as decimal
from tests.halting_jax.task_cases import assert_uniform, batch_of, task_of

CASES = ("addition", "addition-fixed")


def numbers_of(inputs, length):
    """Digit strings shown by one row of features [T, 10 D]."""
    blocks = inputs.reshape(inputs.shape[0], -1, 10)
    texts = []
    for number in blocks[:length]:
        used = number.sum(-1).astype(int).tolist()
        assert used == sorted(used, reverse=True) and set(used) <= {0, 1}, "not left-aligned"
        texts.append("".join(str(int(block.argmax())) for block in number if block.any()))
    return texts


@pytest.mark.parametrize("case", CASES)
def test_targets_are_the_digits_of_the_running_sum(case):
    batch, places = batch_of(case), task_of(case).shape.places
    digit_counts = []
    for row in range(0, len(batch.inputs), 5):
        length = int(batch.input_mask[row].sum())
        texts = numbers_of(batch.inputs[row], length)
        assert batch.difficulty[row] == max(map(len, texts))
        digit_counts += map(len, texts)
        assert not batch.target_mask[row, 0].any() and not batch.target_mask[row, length:].any()
        assert batch.target_mask[row, 1:length].all()
        for step in range(1, length):
            text = str(sum(int(t) for t in texts[: step + 1]))
            expected = [int(c) for c in text] + [10] * (places - len(text))
            assert batch.targets[row, step].tolist() == expected
    assert_uniform(np.array(digit_counts), 1, batch.inputs.shape[-1] // 10)


def test_lengths():
    assert_uniform(batch_of("addition").input_mask.sum(1), 1, 4)
    assert batch_of("addition-fixed").input_mask.all()


def test_digits_are_uniform_with_leading_zeros():
    batch = batch_of("addition-fixed")
    blocks = batch.inputs.reshape(-1, 2, 10)
    for place in range(2):
        digits = blocks[:, place][blocks[:, place].any(-1)].argmax(-1)
        assert_uniform(digits, 0, 9)


@pytest.mark.parametrize(
    ("digits", "terms", "places"),
    [(5, 5, 6), (5, 10, 6), (5, 11, 7), (5, 100, 7), (5, 101, 8), (3, 2, 4), (4, 1, 4)],
)
def test_places_hold_the_largest_sum_and_no_more_than_needed(digits, terms, places):
    assert decimal.places_of_sum(digits, terms) == places
    assert len(str(terms * (10**digits - 1))) == places


def test_length_one_has_no_target():
    digits = jnp.asarray([[[9, 9], [1, 2]], [[9, 9], [1, 2]]], jnp.int32)
    batch = addition.encode_numbers(digits, jnp.asarray([[2, 1], [2, 1]]), jnp.asarray([1, 2]))
    assert not batch.target_mask[0].any() and batch.target_mask[1, 1].all()
    assert batch.targets[1, 1].tolist() == [1, 0, 0]
    metrics = addition.metrics(jnp.zeros((2, 2, 3, 11)), batch)
    assert float(metrics["accuracy_sequence"].count) == 1.0
    assert float(metrics["accuracy_step"].count) == 1.0
    assert float(metrics["accuracy_place"].count) == 3.0


def test_sums_beyond_int32():
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 10, size=(6, 3, 25)).astype(np.int32)
    digits[0] = 9
    counts = rng.integers(1, 26, size=(6, 3)).astype(np.int32)
    counts[0] = 25
    columns = decimal.least_significant_first(jnp.asarray(digits), jnp.asarray(counts), 26)
    total, size = decimal.most_significant_first(decimal.carry(columns.sum(1)))
    for row in range(6):
        texts = ["".join(map(str, d[:n])) for d, n in zip(digits[row], counts[row], strict=True)]
        got = "".join(map(str, np.asarray(total[row])[: int(size[row])]))
        assert got == str(sum(map(int, texts)))


def test_zero_keeps_one_digit():
    total, size = decimal.most_significant_first(jnp.zeros((1, 4), jnp.int32))
    assert int(size[0]) == 1 and int(total[0, 0]) == 0
