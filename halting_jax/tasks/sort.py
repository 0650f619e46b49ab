"""Sort: read standard normal numbers, then name their positions in ascending order (Graves 2016).

Paper encoding: 2n frames of [value, last-flag]; n numbers, the flag on the last one, then n zero
frames, in which the answer is due. Original encoding: 2 n_max frames of [value, one-hot position,
phase]; numbers start at frame 0, answers at frame n_max with phase 1, frames between are padding.
The answer of emit frame r is the position, 0-based, of the r-th smallest number.
"""

import jax
import jax.numpy as jnp

from common.errors import require
from halting_jax import losses
from halting_jax.tasks import draws
from halting_jax.types import Batch, Metrics, Ratio, Task, TaskShape

ENCODINGS = ("paper", "original")


def sorting_order(values: jax.Array, lengths: jax.Array) -> jax.Array:
    """Positions in ascending order of value, equal ones in order of position.

    All pairs are compared, which at these lengths is cheaper than a sort.

    Args:
      values: float32 [B, n_max]; content beyond `lengths` is ignored.
      lengths: int32 [B].

    Returns:
      int32 [B, n_max], a permutation of 0..n-1, zeros behind it.
    """
    index = jnp.arange(values.shape[1], dtype=jnp.int32)
    valid = index < lengths[:, None]  # [B, n]
    other, own = values[:, :, None], values[:, None, :]  # [B, n, 1], [B, 1, n]
    before = (other < own) | ((other == own) & (index[:, None] < index))  # [B, n, n]
    rank = jnp.sum(before & valid[:, :, None], axis=1, dtype=jnp.int32)  # [B, n]
    found = (rank[:, :, None] == index) & valid[:, :, None]  # [B, item, rank]
    return jnp.sum(jnp.where(found, index[:, None], 0), axis=1, dtype=jnp.int32)


def _aligned(order: jax.Array, offset: jax.Array | int, frames: int) -> jax.Array:
    """Moves [B, n_max] answers to frames offset..offset+n_max-1; int32 [B, frames]."""
    index = jnp.arange(frames, dtype=jnp.int32) - offset  # [frames] or [B, frames]
    index = jnp.broadcast_to(index, (order.shape[0], frames))
    inside = (index >= 0) & (index < order.shape[1])
    moved = jnp.take_along_axis(order, jnp.clip(index, 0, order.shape[1] - 1), axis=1)
    return jnp.where(inside, moved, 0)


def encode(values: jax.Array, lengths: jax.Array, encoding: str) -> Batch:
    """Frames and answers.

    Args:
      values: float32 [B, n_max]; content beyond `lengths` is ignored.
      lengths: int32 [B], 1..n_max.
      encoding: "paper" or "original".

    Returns:
      Batch with inputs [B, 2 n_max, 2 or 2 + n_max] and targets [B, 2 n_max]; difficulty is the
      number of items.
    """
    rows, max_n = values.shape
    frame = jnp.arange(2 * max_n, dtype=jnp.int32)
    count = lengths[:, None]  # [B, 1]
    read = frame < count  # [B, 2 n_max]
    shown = jnp.where(read, jnp.pad(values, ((0, 0), (0, max_n))), 0)
    if encoding == "paper":
        start: jax.Array | int = count
        features = jnp.stack([shown, frame == count - 1], axis=-1)  # [B, 2 n_max, 2]
    else:
        start = max_n
        position = (frame[:, None] == jnp.arange(max_n)) & read[..., None]
        emitted = (frame >= max_n) & (frame < max_n + count)
        features = jnp.concatenate([shown[..., None], position, emitted[..., None]], axis=-1)
    emit = (frame >= start) & (frame < start + count)  # [B, 2 n_max]
    order = _aligned(sorting_order(values, lengths), start, 2 * max_n)
    return Batch(
        inputs=features.astype(jnp.float32),
        input_mask=read | emit,
        targets=jnp.where(emit, order, 0),
        target_mask=emit,
        decoder_inputs=jnp.zeros((rows, 0), jnp.int32),
        difficulty=lengths,
    )


def make_sort(min_n: int = 2, max_n: int = 15, encoding: str = "paper") -> Task:
    """Makes the sort task.

    Args:
      min_n: fewest numbers.
      max_n: most numbers, also the number of classes.
      encoding: "paper" or "original".

    Raises:
      UserError: if the range is empty or the encoding is unknown.
    """
    require(
        encoding in ENCODINGS, f"task.encoding = {encoding!r} must be one of {', '.join(ENCODINGS)}"
    )
    sizes = draws.checked_range("task.{}_n", min_n, max_n)
    require(max_n >= 2, f"task.max_n = {max_n} must be at least 2")
    ranges = {"train": sizes, "val": sizes, "id": sizes}

    def sample(key: jax.Array, row_ids: jax.Array, split: str = "train") -> Batch:
        low, high = draws.range_of_split(ranges, split)
        words = draws.row_words(key, row_ids, 1 + max_n)
        lengths = draws.integers(words[:, 0], low, high)
        return encode(draws.normals(words[:, 1:]), lengths, encoding)

    return Task(
        name="sort",
        shape=TaskShape(
            form="frames",
            length=2 * max_n,
            features=2 if encoding == "paper" else 2 + max_n,
            classes=max_n,
        ),
        sample=sample,
        example_loss=example_loss,
        metrics=metrics,
        example_correct=example_correct,
        eval_sets=("id",),
        selection_metric="sequence_accuracy",
    )


def _sequence_logits(logits: jax.Array) -> jax.Array:
    """[B, T, V] of [B, T, V] or [B, T, 1, V]: one place per frame may keep its axis."""
    return logits[:, :, 0] if logits.ndim == 4 else logits


def example_loss(logits: jax.Array, batch: Batch) -> Ratio:
    """Cross-entropy over the emit frames; logits [B, T, n_max] -> Ratio of [B] arrays."""
    return losses.masked_cross_entropy(_sequence_logits(logits), batch.targets, batch.target_mask)


def metrics(logits: jax.Array, batch: Batch) -> Metrics:
    """`per_token_accuracy`, `sequence_accuracy`, `sequence_error`; logits [B, T, n_max]."""
    correct = losses.correct_classes(_sequence_logits(logits), batch.targets)
    return losses.sequence_metrics(
        correct, batch.target_mask, "per_token_accuracy", "sequence_accuracy"
    )


def example_correct(logits: jax.Array, batch: Batch) -> jax.Array:
    """bool [B]: every answer is right; logits [B, T, n_max]."""
    correct = losses.correct_classes(_sequence_logits(logits), batch.targets)
    return losses.all_correct(correct, batch.target_mask)
