"""Small versions of every generated task, and their batches, sampled once per test run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from halting_jax.tasks.factory import make_task
from halting_jax.types import Batch, Task

ROWS = 2000
CASES = {
    "parity-prefix": ("parity", {"bits": 7}),
    "parity-random": ("parity", {"bits": 6, "placement": "random", "ood_bits": 40}),
    "addition": ("addition", {"sequence_length": 4, "max_digits": 3}),
    "addition-fixed": (
        "addition",
        {"sequence_length": 11, "max_digits": 2, "fixed_sequence_length": True},
    ),
    "logic-paper": ("logic", {"train_max_steps": 4, "eval_max_steps": 6, "max_gates": 5}),
    "logic-original": ("logic", {"encoding": "original", "eval_max_steps": 10}),
    "sort-paper": ("sort", {"max_n": 6}),
    "sort-original": ("sort", {"min_n": 1, "max_n": 5, "encoding": "original"}),
    "copy-paper": ("copy", {"train_max_length": 5, "eval_max_length": 9}),
    "reverse-original": (
        "reverse",
        {"train_max_length": 5, "eval_max_length": 9, "encoding": "original"},
    ),
    "string_addition": ("string_addition", {"max_digits": 3, "max_terms": 3}),
}


@functools.cache
def task_of(case: str) -> Task:
    """The task of a case."""
    name, sizes = CASES[case]
    return make_task(name, **sizes)


@functools.cache
def batch_of(case: str, split: str = "train", rows: int = ROWS) -> Batch:
    """Rows 0..rows-1 of a case's split, as NumPy arrays."""
    task = task_of(case)
    assert task.sample is not None
    sample = jax.jit(task.sample, static_argnames="split")
    batch = sample(jax.random.key(5), jnp.arange(rows, dtype=jnp.int32), split)
    return jax.tree.map(np.asarray, batch)


def assert_uniform(values: np.ndarray, low: int, high: int) -> None:
    """Checks that integers cover low..high evenly, to within five standard deviations."""
    assert values.min() == low and values.max() == high
    counts = np.bincount(values.ravel() - low, minlength=high - low + 1)
    share = 1.0 / len(counts)
    deviation = np.sqrt(values.size * share * (1 - share))
    np.testing.assert_allclose(counts, values.size * share, rtol=0, atol=5 * deviation + 1e-9)
