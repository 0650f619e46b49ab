"""What every generated task promises, whatever it is about."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from halting_jax import losses
from halting_jax.tasks.factory import GENERATED, make_task, size_names
from tests.halting_jax.task_cases import CASES, batch_of, task_of

METRICS = {
    "parity": {"accuracy"},
    "logic": {"accuracy"},
    "addition": {"accuracy_place", "accuracy_step", "accuracy_sequence"},
    "sort": {"per_token_accuracy", "sequence_accuracy"},
    "copy": {"char_accuracy", "sequence_accuracy"},
    "reverse": {"char_accuracy", "sequence_accuracy"},
    "string_addition": {"char_accuracy", "sequence_accuracy"},
}
SMALL = 48


def small(case, split="train"):
    return jax.tree.map(lambda x: x[:SMALL], batch_of(case, split))


@functools.cache
def scorer(case):
    """(logits, batch) -> loss sums, their gradient, metrics and rows that are right, compiled."""
    task = task_of(case)

    def score(logits, batch):
        def total(logits):
            ratio = task.example_loss(logits, batch)
            return ratio.total.sum(), ratio

        grad, loss = jax.grad(total, has_aux=True)(logits)
        return loss, grad, task.metrics(logits, batch), task.example_correct(logits, batch)

    compiled = jax.jit(score)
    return lambda logits, batch: jax.device_get(compiled(np.asarray(logits, np.float32), batch))


def rows_with_targets(batch):
    return batch.target_mask.reshape(len(batch.target_mask), -1).any(1)


def value(ratio):
    return float(ratio.total) / max(float(ratio.count), 1.0)


def random_logits(case, batch, seed=0):
    """Logits of the shape a model returns for this batch."""
    shape = task_of(case).shape
    size = batch.targets.shape
    if shape.readout == "last":
        size = size[:1]
    elif shape.classes > 1:
        size = (*size, shape.classes)
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def perfect_logits(case, batch):
    """Logits that name the target everywhere it counts, and nonsense elsewhere."""
    shape = task_of(case).shape
    if shape.readout == "last":
        last = batch.input_mask.sum(1) - 1
        return 40.0 * batch.targets[np.arange(len(last)), last] - 20.0
    if shape.classes == 1:
        return np.where(batch.target_mask, 40.0 * batch.targets - 20.0, 7.0)
    logits = np.random.default_rng(1).normal(size=(*batch.targets.shape, shape.classes))
    right = 40.0 * (batch.targets[..., None] == np.arange(shape.classes))
    return np.where(batch.target_mask[..., None], right, logits)


@pytest.mark.parametrize("case", CASES)
def test_arrays_fit_the_shape_that_models_are_built_for(case):
    task, batch = task_of(case), batch_of(case)
    shape, rows = task.shape, len(batch.difficulty)
    expected = {
        "vector": (rows, shape.features),
        "frames": (rows, shape.length, shape.features),
        "seq2seq": (rows, shape.length),
    }[shape.form]
    assert batch.inputs.shape == expected
    assert batch.inputs.dtype == (np.int32 if shape.form == "seq2seq" else np.float32)
    assert batch.input_mask.shape == expected[: 1 if shape.form == "vector" else 2] or (
        shape.form == "vector" and batch.input_mask.shape == expected
    )
    assert batch.target_mask.shape == batch.targets.shape
    assert batch.input_mask.dtype == batch.target_mask.dtype == np.bool_
    assert batch.targets.dtype == batch.decoder_inputs.dtype == batch.difficulty.dtype == np.int32
    assert batch.difficulty.min() >= 1
    answers = max(shape.classes, 2)
    assert batch.targets.min() >= 0 and batch.targets.max() < answers
    if shape.form == "frames" and shape.places > 1:
        assert batch.targets.shape == (rows, shape.length, shape.places)
    if shape.form == "seq2seq":
        assert batch.inputs.max() < shape.features
        assert batch.decoder_inputs.shape == batch.targets.shape
    else:
        assert batch.decoder_inputs.shape == (rows, 0)


@pytest.mark.parametrize("case", CASES)
def test_padding_is_zero(case):
    batch = batch_of(case)
    assert not batch.inputs[~batch.input_mask].any()
    assert not batch.targets[~batch.target_mask].any()
    assert batch.input_mask.any(axis=tuple(range(1, batch.input_mask.ndim))).all()
    if batch.decoder_inputs.size:
        np.testing.assert_array_equal(batch.decoder_inputs != 0, batch.target_mask)


@pytest.mark.parametrize("case", CASES)
def test_a_row_depends_on_its_number_and_not_on_the_batch(case):
    task, whole = task_of(case), batch_of(case)
    rows = np.array([41, 0, 1999, 7], np.int32)
    part = jax.jit(task.sample, static_argnames="split")(jax.random.key(5), rows, "train")
    for got, expected in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, expected[rows])
    flat = whole.inputs.reshape(len(whole.inputs), -1)
    assert len(np.unique(flat, axis=0)) > 20, "rows repeat each other"


@pytest.mark.parametrize("case", CASES)
def test_evaluation_sets(case):
    task = task_of(case)
    assert task.eval_sets[0] == "id"
    train = batch_of(case)
    for split in ("val", *task.eval_sets):
        draw = functools.partial(task.sample, split=split)
        batch = jax.eval_shape(draw, jax.random.key(0), jnp.arange(64))
        assert batch.difficulty.shape == (64,)
        for got, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(train), strict=True):
            assert got.ndim == expected.ndim and got.dtype == expected.dtype
            assert split != "val" or got.shape[1:] == expected.shape[1:]
    with pytest.raises(UserError, match="no split 'test'"):
        task.sample(jax.random.key(0), jnp.arange(2), "test")


@pytest.mark.parametrize("case", CASES)
def test_a_perfect_predictor_scores_one(case):
    task, batch = task_of(case), small(case)
    loss, _, metrics, correct = scorer(case)(perfect_logits(case, batch), batch)
    values = {name: value(ratio) for name, ratio in metrics.items()}
    assert set(values) == METRICS[task.name] | {"sequence_error"}
    assert values.pop("sequence_error") == 0.0
    assert set(values.values()) == {1.0}
    assert task.selection_metric in values
    scored = rows_with_targets(batch)
    np.testing.assert_array_equal(correct, scored)
    np.testing.assert_array_equal(losses.rows_with_targets(batch), scored)
    assert loss.total.shape == loss.count.shape == (SMALL,)
    np.testing.assert_allclose(loss.total, 0.0, atol=1e-5)
    np.testing.assert_array_equal(loss.count > 0, scored)


@pytest.mark.parametrize("case", CASES)
def test_one_wrong_answer_costs_exactly_one_row(case):
    task, batch = task_of(case), small(case)
    scored = np.argwhere(batch.target_mask)
    wrong = tuple(scored[len(scored) // 2])
    targets = batch.targets.copy()
    targets[wrong] = (batch.targets[wrong] + 1) % max(task.shape.classes, 2)
    logits = perfect_logits(case, dataclasses.replace(batch, targets=targets))
    _, _, metrics, correct = scorer(case)(logits, batch)
    assert float(metrics["sequence_error"].total) == 1.0
    for name, ratio in metrics.items():
        if name != "sequence_error":
            assert float(ratio.count - ratio.total) == 1.0, name
    expected = rows_with_targets(batch)
    expected[wrong[0]] = False
    np.testing.assert_array_equal(correct, expected)


@pytest.mark.parametrize("case", CASES)
def test_content_of_padding_never_matters(case):
    batch = small(case)
    logits = random_logits(case, batch)
    soiled = dataclasses.replace(batch, targets=np.where(batch.target_mask, batch.targets, 99))
    bad = logits.copy()
    if bad.ndim > 1:
        bad[~batch.target_mask] = np.nan
    clean = scorer(case)(logits, batch)
    for got, expected in zip(
        jax.tree.leaves(scorer(case)(bad, soiled)), jax.tree.leaves(clean), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    grad = clean[1]
    assert np.isfinite(grad).all() and np.abs(grad).sum() > 0
    if grad.ndim > 1:
        assert not grad[~batch.target_mask].any()


@pytest.mark.parametrize("case", CASES)
def test_a_batch_without_any_target_is_not_nan(case):
    batch = small(case)
    empty = dataclasses.replace(batch, target_mask=np.zeros_like(batch.target_mask))
    loss, grad, metrics, correct = scorer(case)(random_logits(case, batch), empty)
    for name, ratio in metrics.items():
        assert float(ratio.count) == float(ratio.total) == float(ratio.value) == 0.0, name
    assert not loss.total.any() and not loss.count.any() and not grad.any()
    assert not correct.any()


def test_factory_takes_a_config_of_every_task():
    assert set(size_names("parity")) == {"bits", "placement", "near_ood_bits", "ood_bits"}
    assert set(GENERATED) == set(METRICS)
    sizes = {"bits": 3, "max_n": 4, "sequence_length": 3}
    assert make_task("parity", **sizes).shape.features == 11
    assert make_task("sort", **sizes).shape.classes == 4
    assert make_task("addition", **sizes).shape.length == 3


def test_factory_names_what_is_wrong():
    with pytest.raises(UserError, match="unknown task.name 'parities'.*parity.*string_addition"):
        make_task("parities")
    with pytest.raises(UserError, match="no task takes bitts; parity takes bits"):
        make_task("parity", bitts=3)
    with pytest.raises(UserError, match="task maze needs seq_len, vocab_size"):
        make_task("maze", bits=3)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("parity", {"bits": 0}, "task.bits"),
        ("parity", {"bits": 8, "near_ood_bits": 8}, "task.near_ood_bits = 8 must exceed 8"),
        ("parity", {"bits": 8, "ood_bits": 12}, "task.ood_bits = 12 must exceed 12"),
        ("parity", {"placement": "left"}, "task.placement"),
        ("addition", {"sequence_length": 1}, "task.sequence_length"),
        ("addition", {"max_digits": 0}, "task.max_digits"),
        ("logic", {"train_min_steps": 5, "train_max_steps": 4}, "task.train_max_steps = 4"),
        ("logic", {"encoding": "new"}, "task.encoding"),
        ("sort", {"min_n": 0}, "task.min_n"),
        ("sort", {"min_n": 1, "max_n": 1}, "task.max_n"),
        ("copy", {"eval_min_length": 0}, "task.eval_min_length"),
        ("string_addition", {"max_terms": 1}, "task.max_terms"),
        ("string_addition", {"test_max_digits": 4}, "task.test_max_digits"),
    ],
)
def test_sizes_that_make_no_task(name, sizes, message):
    with pytest.raises(UserError, match=message):
        make_task(name, **sizes)
