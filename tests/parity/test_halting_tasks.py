"""Targets, encodings, losses and metrics of the generated tasks against the recordings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halting_jax import losses
from halting_jax.tasks import addition, logic, parity, sequences, sort
from halting_jax.types import Batch
from tests.parity.halting_cases import Case, case_name, cases

IGNORED = -100
SAMPLES = cases("data_samples")


def each(found: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", found, ids=case_name)


def batch_from(inputs, targets, target_mask) -> Batch:
    """A batch around recorded targets; the losses read nothing else."""
    rows = len(inputs)
    return Batch(
        inputs=inputs,
        input_mask=np.ones(inputs.shape[:2], bool),
        targets=np.asarray(targets, np.int32),
        target_mask=target_mask,
        decoder_inputs=np.zeros((rows, 0), np.int32),
        difficulty=np.ones(rows, np.int32),
    )


def assert_means(task, logits, batch, loss, metrics) -> None:
    """The recorded mean loss and metrics, in both precisions."""
    for double, tolerance in ((True, {"rtol": 0, "atol": 1e-9}), (False, {"rtol": 1e-4})):
        with jax.enable_x64(double):
            ratio = task.example_loss(jnp.asarray(logits, float), batch)
            np.testing.assert_allclose(ratio.total.sum() / ratio.count.sum(), loss, **tolerance)
            found = task.metrics(jnp.asarray(logits, float), batch)
    assert metrics, "no metric was recorded"
    for name, expected in metrics.items():
        np.testing.assert_allclose(found[name].value, expected, atol=1e-6, err_msg=name)


def test_there_are_recordings():
    assert SAMPLES and cases("parity") and cases("addition") and cases("copy_reverse")


@each(SAMPLES)
def test_parity_samples(case):
    part = case.part("parity")
    values = part["x"][..., 0]
    np.testing.assert_array_equal(parity.parity_targets(jnp.asarray(values)), part["target"])
    used = values != 0
    np.testing.assert_array_equal(used, np.arange(used.shape[1]) < used.sum(1)[:, None])


def addition_numbers(x: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits [B, T, D] and their counts [B, T] shown by features [B, T, 10 D]."""
    blocks = x.reshape(*x.shape[:2], -1, 10)
    valid = np.arange(x.shape[1]) < lengths[:, None]
    counts = np.where(valid, (blocks == 1).any(-1).sum(-1), 1)
    return blocks.argmax(-1).astype(np.int32), counts.astype(np.int32)


@each(SAMPLES)
def test_addition_samples(case):
    part = case.part("addition")
    x, y = (part[name].swapaxes(0, 1) for name in ("x_time_major", "y_time_major"))
    digits, counts = addition_numbers(x, part["lengths"])
    batch = addition.encode_numbers(jnp.asarray(digits), counts, part["lengths"])
    np.testing.assert_array_equal(batch.inputs, np.where(x == IGNORED, 0, x))
    np.testing.assert_array_equal(batch.target_mask, y != IGNORED)
    np.testing.assert_array_equal(np.where(batch.target_mask, batch.targets, IGNORED), y)
    np.testing.assert_array_equal(batch.input_mask, (x != IGNORED).all(-1))


@each(cases("addition"))
def test_addition_cases_follow_the_target_rule(case):
    x, y = (case.arrays[name].swapaxes(0, 1) for name in ("in/x", "in/y"))
    digits, counts = addition_numbers(x, case.arrays["in/lengths"])
    batch = addition.encode_numbers(jnp.asarray(digits), counts, case.arrays["in/lengths"])
    np.testing.assert_array_equal(np.where(batch.target_mask, batch.targets, IGNORED), y)


@each(SAMPLES)
def test_logic_samples(case):
    part = case.part("logic_original")
    x, lengths = part["x"], part["lengths"]
    gates = (x[..., 2:].argmax(-1) // logic.GATES).astype(np.int32)
    batch = logic.encode_original(
        jnp.asarray(x[:, 0, 0] == 1), jnp.asarray(x[..., 1] == 1), jnp.asarray(gates), lengths
    )
    np.testing.assert_array_equal(batch.inputs, x)
    last = np.arange(len(x)), lengths - 1
    np.testing.assert_array_equal(batch.targets[last], part["target"])
    np.testing.assert_array_equal(batch.target_mask.sum(1), 1)
    assert batch.target_mask[last].all()


@each(SAMPLES)
def test_sort_samples(case):
    part = case.part("sort_original")
    x, target, n = part["x"], part["target"], part["n"]
    max_n = target.shape[1]
    batch = sort.encode(jnp.asarray(x[:, :max_n, 0]), n, "original")
    np.testing.assert_array_equal(batch.inputs, x)
    found = np.where(batch.target_mask, batch.targets, -1)
    np.testing.assert_array_equal(found[:, max_n:], target)
    assert (found[:, :max_n] == -1).all()


def check_symbols(source, decoder_inputs, target, reverse) -> Batch:
    counts = (source >= sequences.FIRST_SYMBOL).sum(1).astype(np.int32)
    symbols = jnp.asarray(source[:, :-1] - sequences.FIRST_SYMBOL)
    offset = jnp.zeros(len(source), jnp.int32)
    batch = sequences.encode_symbols(symbols, counts, offset, source.shape[1], reverse)
    np.testing.assert_array_equal(batch.inputs, source)
    np.testing.assert_array_equal(batch.decoder_inputs, decoder_inputs)
    np.testing.assert_array_equal(batch.targets, target)
    return batch


@each(SAMPLES)
@pytest.mark.parametrize("task", ["copy", "reverse"])
def test_symbol_samples(case, task):
    part = case.part(task)
    tokens = part["src_tokens"], part["decoder_input_tokens"], part["target_tokens"]
    check_symbols(*tokens, task == "reverse")


@each(SAMPLES)
def test_string_addition_samples(case):
    part, vocabulary = case.part("string_addition"), case.meta["string_addition_vocab"]
    assert len(vocabulary) == sequences.ADDITION_VOCAB
    assert vocabulary[sequences.PLUS] == "+" and vocabulary[sequences.FIRST_DIGIT] == "0"
    texts = [
        "".join(vocabulary[t] for t in row if t > sequences.EOS).split("+")
        for row in part["src_tokens"]
    ]
    terms, longest = max(map(len, texts)), max(len(n) for row in texts for n in row)
    digits = np.zeros((len(texts), terms, longest), np.int32)
    counts = np.ones((len(texts), terms), np.int32)
    for row, numbers in enumerate(texts):
        for term, number in enumerate(numbers):
            digits[row, term, : len(number)] = [int(c) for c in number]
            counts[row, term] = len(number)
    used = np.array([len(numbers) for numbers in texts], np.int32)
    batch = sequences.encode_sum(jnp.asarray(digits), jnp.asarray(counts), jnp.asarray(used))
    for found, name in (
        (batch.inputs, "src_tokens"),
        (batch.decoder_inputs, "decoder_input_tokens"),
        (batch.targets, "target_tokens"),
    ):
        width = part[name].shape[1]
        np.testing.assert_array_equal(found[:, :width], part[name], err_msg=name)
        assert not found[:, width:].any()


@each(cases("parity"))
def test_parity_loss_and_accuracy(case):
    x, target = case.arrays["in/x"][..., 0], case.arrays["in/target"]
    np.testing.assert_array_equal(parity.parity_targets(jnp.asarray(x)), target)
    batch = batch_from(x, target, np.ones(len(x), bool))
    loss = case.arrays["out/loss_classification"]
    assert_means(parity, case.arrays["out/logits"], batch, loss, case.part("metric"))


def addition_batch(case) -> tuple[np.ndarray, np.ndarray, Batch]:
    """Batch-first logits and targets, and the batch that scores what is valid."""
    x, y, logits = (case.arrays[name].swapaxes(0, 1) for name in ("in/x", "in/y", "out/logits"))
    return logits, y, batch_from(x, np.where(y == IGNORED, 0, y), y != IGNORED)


@each(cases("addition"))
def test_addition_loss_and_metrics(case):
    logits, _, batch = addition_batch(case)
    own = "masked" if case.part("masked") else "out"
    loss = case.arrays[f"{own}/loss_classification"]
    assert_means(addition, logits, batch, loss, case.part("metric_masked"))


@each(cases("addition"))
def test_the_original_counts_padding_as_wrong(case):
    """Its metrics follow from ours when every step after the first is scored."""
    logits, y, batch = addition_batch(case)
    later = np.broadcast_to((np.arange(y.shape[1]) > 0)[:, None], y.shape)
    found = addition.metrics(jnp.asarray(logits), batch.replace(targets=y, target_mask=later))
    recorded = case.part("metric_original")
    assert recorded
    for name, expected in recorded.items():
        np.testing.assert_allclose(found[name].value, expected, atol=1e-6, err_msg=name)


@each(cases("copy_reverse"))
def test_copy_and_reverse_loss_and_metrics(case):
    tokens = (case.arrays[f"in/{name}"] for name in ("src", "dec_in", "target"))
    batch = check_symbols(*tokens, case.meta["task"] == "reverse")
    assert np.array_equal(losses.rows_with_targets(batch), np.ones(len(batch.targets), bool))
    loss = case.arrays["out/loss_classification"]
    assert_means(sequences, case.arrays["out/logits"], batch, loss, case.part("metric"))
