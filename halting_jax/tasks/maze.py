"""Mazes and sudokus: tokens of a grid to as many tokens."""

import functools

import jax
import jax.numpy as jnp

from common.errors import require
from halting_jax import losses
from halting_jax.datasets.maze_solver import side_of
from halting_jax.tasks.maze_metrics import cell_metrics, finalize, path_metrics
from halting_jax.types import Batch, Metrics, Ratio, Task, TaskShape

__all__ = ["finalize", "make_maze", "maze_batch", "path_metrics"]


def make_maze(seq_len: int, vocab_size: int, focus_token: int | None = 5) -> Task:
    """Makes the task of filling in a grid; its examples are read from files (`maze_batch`).

    Args:
      seq_len: S, cells of the square grid.
      vocab_size: V.
      focus_token: the id whose precision, recall and F1 are reported: 5, the path, for mazes; None
        for sudokus.

    Returns:
      The task; its loss is the mean cross-entropy over all cells, walls included.

    Raises:
      UserError: if the grid is not square or the focus token not part of the vocabulary.
    """
    side_of(seq_len)
    require(
        focus_token is None or 0 <= focus_token < vocab_size,
        f"the data has {vocab_size} token ids, so id {focus_token} (the path of a maze) cannot "
        "occur; for other puzzles set task.name=sudoku",
    )
    return Task(
        name="maze" if focus_token is not None else "sudoku",
        shape=TaskShape(form="grid", length=seq_len, features=vocab_size, classes=vocab_size),
        sample=None,
        example_loss=_example_loss,
        metrics=functools.partial(_metrics, focus_token=focus_token),
        example_correct=_example_correct,
        eval_sets=("test",),
        selection_metric="puz_acc",
    )


def maze_batch(
    inputs: jax.Array,
    labels: jax.Array,
    difficulty: jax.Array,
    indices: jax.Array,
    aug_ids: jax.Array | None = None,
    index_maps: jax.Array | None = None,
) -> Batch:
    """Gathers a batch from puzzles kept on the device as bytes.

    Args:
      inputs: uint8 [P, S].
      labels: uint8 [8, P, S], the labels of every orientation (`maze_files.label_variants`);
        or [1, P, S] or [P, S], which are turned along with the inputs.
      difficulty: int32 [P].
      indices: int32 [B], which puzzles; -1 makes a row in which nothing is scored.
      aug_ids: int32 [B], the orientation of each row; None leaves all as they are.
      index_maps: int32 [8, S] of `aug8.index_maps`; needed with `aug_ids`.

    Returns:
      The batch.
    """
    labels = labels if labels.ndim == 3 else labels[None]
    if (aug_ids is None) != (index_maps is None):
        raise ValueError("aug_ids and index_maps go together")
    present = indices >= 0
    rows = jnp.where(present, indices, 0)
    tokens = inputs[rows]  # [B, S]
    if aug_ids is None or index_maps is None:
        targets = labels[0, rows]
    else:
        origin = index_maps[aug_ids]  # [B, S]
        tokens = jnp.take_along_axis(tokens, origin, axis=1)
        if labels.shape[0] == 1:
            targets = jnp.take_along_axis(labels[0, rows], origin, axis=1)
        else:
            targets = labels[aug_ids, rows]
    mask = jnp.broadcast_to(present[:, None], tokens.shape)
    return Batch(
        inputs=tokens.astype(jnp.int32),
        input_mask=mask,
        targets=targets.astype(jnp.int32),
        target_mask=mask,
        decoder_inputs=jnp.zeros((tokens.shape[0], 0), jnp.int32),
        difficulty=difficulty[rows].astype(jnp.int32),
    )


def _example_loss(logits: jax.Array, batch: Batch) -> Ratio:
    return losses.masked_cross_entropy(logits, batch.targets, batch.target_mask)


def _metrics(logits: jax.Array, batch: Batch, focus_token: int | None) -> Metrics:
    predictions = jnp.argmax(logits, axis=-1)
    return cell_metrics(predictions, batch.targets, batch.target_mask, focus_token)


def _example_correct(logits: jax.Array, batch: Batch) -> jax.Array:
    right = losses.correct_classes(logits, batch.targets)
    return losses.all_correct(right, batch.target_mask)
