"""Addition: after every number of a sequence, the decimal digits of the sum so far (Graves 2016).

A number has 1..D digits, leading zeros allowed, and is shown as D blocks of 10, one-hot, most
significant digit first, left-aligned, unused blocks zero. The answer has K = D + ceil(log10 T)
places of 11 classes: the digits of the sum, left-aligned, class 10 behind them. The first number
has no answer, so a sequence of one number counts in no loss and no metric.
"""

import jax
import jax.numpy as jnp

from common.errors import require
from halting_jax import losses
from halting_jax.tasks import digits as decimal
from halting_jax.tasks import draws
from halting_jax.types import Batch, Metrics, Ratio, Task, TaskShape

BLANK = 10
CLASSES = 11


def encode_numbers(digits: jax.Array, counts: jax.Array, lengths: jax.Array) -> Batch:
    """Builds features and answers from the digits of the numbers.

    Args:
      digits: int32 [B, T, D], most significant first; content beyond `counts` is ignored.
      counts: int32 [B, T], digits per number, 1..D.
      lengths: int32 [B], numbers per sequence, 1..T.

    Returns:
      Batch with inputs float32 [B, T, 10 D] and targets int32 [B, T, K]; difficulty is the digit
      count of the longest number.
    """
    rows, steps, max_digits = digits.shape
    places = decimal.places_of_sum(max_digits, steps)
    valid = jnp.arange(steps) < lengths[:, None]  # [B, T]
    used = (jnp.arange(max_digits) < counts[..., None]) & valid[..., None]  # [B, T, D]
    blocks = (digits[..., None] == jnp.arange(10)) & used[..., None]  # [B, T, D, 10]

    columns = decimal.least_significant_first(digits, counts, places)  # [B, T, K]
    total, sizes = decimal.most_significant_first(decimal.carry(jnp.cumsum(columns, axis=1)))
    place = jnp.arange(places)
    answers = jnp.where(place < sizes[..., None], total, BLANK)  # [B, T, K]
    scored = valid & (jnp.arange(steps) > 0)  # [B, T]
    target_mask = jnp.broadcast_to(scored[..., None], answers.shape)
    return Batch(
        inputs=blocks.reshape(rows, steps, -1).astype(jnp.float32),
        input_mask=valid,
        targets=jnp.where(target_mask, answers, 0).astype(jnp.int32),
        target_mask=target_mask,
        decoder_inputs=jnp.zeros((rows, 0), jnp.int32),
        difficulty=jnp.max(jnp.where(valid, counts, 0), axis=1),
    )


def make_addition(
    sequence_length: int = 5, max_digits: int = 5, fixed_sequence_length: bool = False
) -> Task:
    """Makes the addition task.

    Args:
      sequence_length: T, most numbers per sequence; at least 2, the first has no answer.
      max_digits: D, most digits per number.
      fixed_sequence_length: always T numbers instead of 1..T.

    Raises:
      UserError: if a size is too small.
    """
    require(
        sequence_length >= 2,
        f"task.sequence_length = {sequence_length} must be at least 2: the first number of a "
        "sequence has no answer",
    )
    require(max_digits >= 1, f"task.max_digits = {max_digits} must be at least 1")
    shortest = sequence_length if fixed_sequence_length else 1
    numbers = (shortest, sequence_length)
    ranges = {"train": numbers, "val": numbers, "id": numbers}
    words_per_number = 1 + draws.words_for_digits(max_digits)

    def sample(key: jax.Array, row_ids: jax.Array, split: str = "train") -> Batch:
        low, high = draws.range_of_split(ranges, split)
        words = draws.row_words(key, row_ids, 1 + sequence_length * words_per_number)
        lengths = draws.integers(words[:, 0], low, high)  # [B]
        words = words[:, 1:].reshape(-1, sequence_length, words_per_number)
        counts = draws.integers(words[..., 0], 1, max_digits)  # [B, T]
        digits = draws.digits(words[..., 1:], max_digits, 10)  # [B, T, D]
        return encode_numbers(digits, counts, lengths)

    return Task(
        name="addition",
        shape=TaskShape(
            form="frames",
            length=sequence_length,
            features=10 * max_digits,
            places=decimal.places_of_sum(max_digits, sequence_length),
            classes=CLASSES,
            causal=True,
        ),
        sample=sample,
        example_loss=example_loss,
        metrics=metrics,
        example_correct=example_correct,
        eval_sets=("id",),
        selection_metric="accuracy_sequence",
    )


def example_loss(logits: jax.Array, batch: Batch) -> Ratio:
    """Cross-entropy over the scored places; logits [B, T, K, 11] -> Ratio of [B] arrays."""
    return losses.masked_cross_entropy(logits, batch.targets, batch.target_mask)


def metrics(logits: jax.Array, batch: Batch) -> Metrics:
    """`accuracy_place`, `accuracy_step` (all places of a step), `accuracy_sequence`.

    Also `sequence_error`. logits: [B, T, K, 11].
    """
    correct = losses.correct_classes(logits, batch.targets)  # [B, T, K]
    result = losses.sequence_metrics(
        correct, batch.target_mask, "accuracy_place", "accuracy_sequence"
    )
    step_mask = jnp.any(batch.target_mask, axis=-1)  # [B, T]
    step_correct = jnp.all(correct | ~batch.target_mask, axis=-1)
    result["accuracy_step"] = losses.masked_ratio(step_correct, step_mask)
    return result


def example_correct(logits: jax.Array, batch: Batch) -> jax.Array:
    """bool [B]: every place of every sum is right; False for rows without any."""
    correct = losses.correct_classes(logits, batch.targets)
    return losses.all_correct(correct, batch.target_mask)
