"""Parity: is the number of +1 in a vector of -1, 0 and +1 odd? (Graves 2016, section 3.1)

Lengths m are uniform. Training and the set "id" use m = 1..bits; "near_ood" m = bits+1..
near_ood_bits and "ood" m = near_ood_bits+1..ood_bits, so that both test only what was never
trained. All share one width, the largest of the three. With placement "random" the m values lie
anywhere in it and every column is trained (PonderNet's extrapolation test); with "prefix" they fill
columns 0..m-1, and columns beyond `bits` stay zero in training: a model that reads the vector
through one matrix cannot extrapolate there, only one that reads bit by bit can.
"""

import jax
import jax.numpy as jnp

from common.errors import require
from halting_jax import losses
from halting_jax.tasks import draws
from halting_jax.types import Batch, Metrics, Ratio, Task, TaskShape

PLACEMENTS = ("prefix", "random")
NEAR_OOD_EXTRA = 4
OOD_EXTRA = 8


def parity_targets(values: jax.Array) -> jax.Array:
    """1 where the number of positive entries is odd; [B, width] -> int32 [B]."""
    return jnp.sum(values > 0, axis=-1, dtype=jnp.int32) % 2


def _length_ranges(bits: int, near_ood_bits: int, ood_bits: int) -> dict[str, tuple[int, int]]:
    """Range of m per split."""
    trained = (1, bits)
    ranges = {"train": trained, "val": trained, "id": trained}
    longest = bits
    for name, limit in (("near_ood", near_ood_bits), ("ood", ood_bits)):
        if limit < 0:
            continue
        require(
            limit > longest,
            f"task.{name}_bits = {limit} must exceed {longest}, the longest of the sets before it; "
            "0 chooses its size, -1 leaves the set out",
        )
        ranges[name] = (longest + 1, limit)
        longest = limit
    return ranges


def make_parity(
    bits: int = 64,
    placement: str = "prefix",
    near_ood_bits: int = 0,
    ood_bits: int = 0,
) -> Task:
    """Makes the parity task.

    Args:
      bits: most values per vector in training.
      placement: "prefix" (columns 0..m-1) or "random" (anywhere in the width).
      near_ood_bits: most values in the set "near_ood"; 0 = bits + 4, -1 = no such set.
      ood_bits: most values in the set "ood"; 0 = bits + 8, -1 = no such set.

    Raises:
      UserError: if a size is not positive, the sets do not grow, or the placement is unknown.
    """
    require(bits >= 1, f"task.bits = {bits} must be at least 1")
    require(
        placement in PLACEMENTS,
        f"task.placement = {placement!r} must be one of {', '.join(PLACEMENTS)}",
    )
    ranges = _length_ranges(
        bits,
        near_ood_bits or bits + NEAR_OOD_EXTRA,
        ood_bits or bits + OOD_EXTRA,
    )
    width = max(high for _, high in ranges.values())
    sign_words = -(-width // 32)
    place_words = width if placement == "random" else 0

    def sample(key: jax.Array, row_ids: jax.Array, split: str = "train") -> Batch:
        low, high = draws.range_of_split(ranges, split)
        words = draws.row_words(key, row_ids, 1 + sign_words + place_words)
        lengths = draws.integers(words[:, 0], low, high)  # [B]
        signs = draws.coins(words[:, 1 : 1 + sign_words], width)  # [B, width]
        if placement == "random":
            chosen = draws.subset(words[:, 1 + sign_words :], lengths)
        else:
            chosen = jnp.arange(width) < lengths[:, None]
        values = jnp.where(chosen, jnp.where(signs, 1.0, -1.0), 0.0).astype(jnp.float32)
        return Batch(
            inputs=values,
            input_mask=chosen,
            targets=parity_targets(values),
            target_mask=jnp.ones(row_ids.shape, bool),
            decoder_inputs=jnp.zeros((row_ids.shape[0], 0), jnp.int32),
            difficulty=lengths,
        )

    return Task(
        name="parity",
        shape=TaskShape(form="vector", length=width, features=width),
        sample=sample,
        example_loss=example_loss,
        metrics=metrics,
        example_correct=example_correct,
        eval_sets=tuple(name for name in ranges if name not in ("train", "val")),
        selection_metric="accuracy",
    )


def example_loss(logits: jax.Array, batch: Batch) -> Ratio:
    """Binary cross-entropy of one logit per row; logits [B] -> Ratio of [B] arrays."""
    return losses.masked_binary_cross_entropy(logits, batch.targets, batch.target_mask)


def metrics(logits: jax.Array, batch: Batch) -> Metrics:
    """`accuracy` and `sequence_error`; logits [B]."""
    correct = losses.correct_bits(logits, batch.targets)
    return losses.sequence_metrics(correct, batch.target_mask, "accuracy")


def example_correct(logits: jax.Array, batch: Batch) -> jax.Array:
    """bool [B]: the answer is right; logits [B]."""
    correct = losses.correct_bits(logits, batch.targets)
    return losses.all_correct(correct, batch.target_mask)
