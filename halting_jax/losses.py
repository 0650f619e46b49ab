"""Masked losses and metrics that several tasks share; all as sums and counts.

Content under a False mask, NaN included, reaches neither a value nor a gradient: it is replaced
before the arithmetic, not multiplied away after it.
"""

import jax
import jax.numpy as jnp

from halting_jax.types import Batch, Metrics, Ratio


def _floating(values: jax.Array) -> jax.Array:
    """The values as float32 at least: half precision and booleans cannot hold sums."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _row_sum(values: jax.Array) -> jax.Array:
    """Sums over every axis but the first; [B, ...] -> floating [B]."""
    return jnp.sum(_floating(values).reshape(values.shape[0], -1), axis=1)


def masked_cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> Ratio:
    """Cross-entropy per row: sum over the scored answers of logsumexp(z) - z[target].

    Args:
      logits: [B, ..., V].
      targets: int32 [B, ...], classes 0..V-1 where scored, anything elsewhere.
      mask: bool [B, ...], True = scored.

    Returns:
      Ratio of [B] arrays: the sum and how many answers it covers.
    """
    logits = jnp.where(mask[..., None], _floating(logits), 0)  # [B, ..., V]
    targets = jnp.where(mask, targets, 0)
    # take_along_axis, not a one-hot product: its gradient is one scatter.
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # [B, ...]
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    return Ratio(_row_sum(jnp.where(mask, loss, 0)), _row_sum(mask))


def masked_binary_cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> Ratio:
    """Binary cross-entropy with logits per row: sum of softplus(z) - z y.

    Args:
      logits: [B, ...], one per yes-no answer.
      targets: int32 [B, ...], 0 or 1 where scored, anything elsewhere.
      mask: bool [B, ...], True = scored.

    Returns:
      Ratio of [B] arrays: the sum and how many answers it covers.
    """
    logits = jnp.where(mask, _floating(logits), 0)
    loss = jax.nn.softplus(logits) - logits * jnp.where(mask, targets, 0).astype(logits.dtype)
    return Ratio(_row_sum(jnp.where(mask, loss, 0)), _row_sum(mask))


def correct_classes(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Whether the largest logit is the target's; [B, ..., V], [B, ...] -> bool [B, ...]."""
    return jnp.argmax(logits, axis=-1) == targets


def correct_bits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Whether a positive logit meets target 1 and any other target 0; [B, ...] -> bool [B, ...]."""
    return (logits > 0) == (targets > 0)


def rows_with_targets(batch: Batch) -> jax.Array:
    """bool [B]: rows that have anything to score; the others count in no metric."""
    return jnp.any(batch.target_mask.reshape(batch.target_mask.shape[0], -1), axis=1)


def all_correct(correct: jax.Array, mask: jax.Array) -> jax.Array:
    """bool [B]: every scored answer of a row is right, and it has at least one.

    Args:
      correct: bool [B, ...], per answer.
      mask: bool [B, ...], True = scored.
    """
    rows = correct.shape[0]
    right = jnp.all((correct | ~mask).reshape(rows, -1), axis=1)
    return right & jnp.any(mask.reshape(rows, -1), axis=1)


def masked_ratio(correct: jax.Array, mask: jax.Array) -> Ratio:
    """Share of True among the entries under the mask, as scalars."""
    total = jnp.sum(correct & mask, dtype=jnp.float32)
    return Ratio(total, jnp.sum(mask, dtype=jnp.float32))


def sequence_metrics(
    correct: jax.Array, mask: jax.Array, answer_name: str, sequence_name: str = ""
) -> Metrics:
    """Accuracy per answer, accuracy per row under a second name if given, and `sequence_error`.

    Sequence error is Graves' headline measure: a row with any mistake is an error.

    Args:
      correct: bool [B, ...], per answer.
      mask: bool [B, ...], True = scored; rows without any count in no metric.
      answer_name: name of the accuracy over all scored answers.
      sequence_name: name of the accuracy over rows; "" leaves it out.
    """
    scored = jnp.any(mask.reshape(mask.shape[0], -1), axis=1)  # [B]
    right = all_correct(correct, mask)  # [B]
    metrics = {answer_name: masked_ratio(correct, mask)}
    if sequence_name:
        metrics[sequence_name] = masked_ratio(right, scored)
    metrics["sequence_error"] = masked_ratio(~right, scored)
    return metrics


def by_difficulty(
    values: jax.Array,
    difficulty: jax.Array,
    max_difficulty: int,
    mask: jax.Array | None = None,
) -> Ratio:
    """Sums and counts of a per-row value for each difficulty.

    Args:
      values: [B], one number (or bool) per row.
      difficulty: int32 [B].
      max_difficulty: D, static; rows outside 1..D are left out.
      mask: bool [B], True = counted; None counts every row.

    Returns:
      Ratio of float [D] arrays; entry d - 1 belongs to difficulty d.
    """
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    # Row 0 collects what is not counted: scatters wrap negative positions around.
    inside = mask & (difficulty >= 1) & (difficulty <= max_difficulty)
    segment = jnp.where(inside, difficulty, 0)
    counted = _floating(jnp.where(inside, values, 0))
    total = jax.ops.segment_sum(counted, segment, max_difficulty + 1)
    count = jax.ops.segment_sum(_floating(inside), segment, max_difficulty + 1)
    return Ratio(total[1:], count[1:])
