"""Logic against truth tables written as Python functions."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from halting_jax.tasks import logic
from halting_jax.tasks.logic import make_logic
from tests.halting_jax.task_cases import assert_uniform, batch_of, task_of

# In the order of the one-hot slots.
PAPER = [
    lambda p, q: not (p or q),
    lambda p, q: not p and q,
    lambda p, q: p and not q,
    lambda p, q: p != q,
    lambda p, q: not (p and q),
    lambda p, q: p and q,
    lambda p, q: p == q,
    lambda p, q: not p or q,
    lambda p, q: p or not q,
    lambda p, q: p or q,
]
ORIGINAL = [
    lambda a, b: a and b,
    lambda a, b: a or b,
    lambda a, b: a != b,
    lambda a, b: not (a and b),
    lambda a, b: not (a or b),
    lambda a, b: a == b,
    lambda a, b: a,
    lambda a, b: b,
    lambda a, b: not a,
    lambda a, b: not b,
]


def test_paper_rows_chain_gates_and_answers():
    for split in ("train", "ood"):
        batch = batch_of("logic-paper", split)
        gate_counts, gates, seconds = [], [], []
        for row in range(len(batch.inputs)):
            length = int(batch.input_mask[row].sum())
            assert batch.target_mask[row].tolist() == batch.input_mask[row].tolist()
            answer, most = bool(batch.inputs[row, 0, 0]), 0
            for step in range(length):
                features = batch.inputs[row, step]
                assert step == 0 or features[0] == 0, "b0 is shown in the first row only"
                chunks = features[2:].reshape(-1, 10)
                used = chunks.sum(1).astype(int).tolist()
                count = sum(used)
                assert used == [1] * count + [0] * (len(used) - count) and count >= 1
                before, now = answer, bool(features[1])
                for chunk in chunks[:count]:
                    before, now = now, bool(PAPER[int(chunk.argmax())](now, before))
                    gates.append(int(chunk.argmax()))
                answer, most = now, max(most, count)
                assert batch.targets[row, step] == answer
                gate_counts.append(count)
                seconds.append(features[1])
            assert batch.difficulty[row] == most
        assert_uniform(np.array(gate_counts), 1, 5)
        assert_uniform(np.array(gates), 0, 9)
        assert_uniform(np.array(seconds).astype(int), 0, 1)
        assert_uniform(batch.inputs[:, 0, 0].astype(int), 0, 1)
        assert 0.45 < batch.targets[batch.target_mask].mean() < 0.55


def test_lengths_of_the_sets():
    assert_uniform(batch_of("logic-paper").input_mask.sum(1), 1, 4)
    assert_uniform(batch_of("logic-paper", "ood").input_mask.sum(1), 1, 6)
    assert task_of("logic-original").eval_sets == ("id",)


def test_original_rows_carry_the_running_value():
    batch = batch_of("logic-original")
    gates = []
    for row in range(len(batch.inputs)):
        length = int(batch.input_mask[row].sum())
        value = bool(batch.inputs[row, 0, 0])
        for step in range(length):
            features = batch.inputs[row, step]
            slots = np.flatnonzero(features[2:])
            assert len(slots) == 1 and slots[0] % 10 == 0
            assert bool(features[0]) == value
            value = bool(ORIGINAL[slots[0] // 10](value, bool(features[1])))
            gates.append(slots[0] // 10)
        assert np.flatnonzero(batch.target_mask[row]).tolist() == [length - 1]
        assert batch.targets[row, length - 1] == value
        assert batch.difficulty[row] == length
    assert_uniform(np.array(gates), 0, 9)
    assert_uniform(batch.difficulty, 1, 10)


def test_default_width_is_that_of_the_paper():
    assert make_logic().shape.features == make_logic(encoding="original").shape.features == 102


def test_one_answer_per_row_or_one_per_frame_score_alike():
    batch = batch_of("logic-original", "val", 64)
    logits = np.random.default_rng(0).normal(size=batch.targets.shape).astype(np.float32)
    last = jnp.asarray(logits[np.arange(64), batch.difficulty - 1])
    full = jnp.asarray(logits)
    for got, expected in zip(
        (*logic.example_loss(last, batch), *logic.metrics(last, batch).values()),
        (*logic.example_loss(full, batch), *logic.metrics(full, batch).values()),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_array_equal(
        logic.example_correct(last, batch), logic.example_correct(full, batch)
    )
    cut = dataclasses.replace(batch, target_mask=batch.target_mask & (np.arange(64) < 60)[:, None])
    assert logic.example_loss(last, cut).count.sum() == 60
