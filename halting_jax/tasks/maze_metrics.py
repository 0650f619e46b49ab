"""What a predicted maze is worth: cells, marked cells, valid and optimal paths.

Cells and marks are compared with the label. A path needs no label: mazes have many shortest paths,
and "valid" and "optimal" ask whether the marks form one at all.
"""

import jax
import jax.numpy as jnp
import numpy as np

from halting_jax import losses
from halting_jax.datasets.maze_solver import side_of
from halting_jax.datasets.maze_tokens import GOAL, OPEN, PATH, START, WALL
from halting_jax.tasks.single_path import neighbours, single_path_exists
from halting_jax.types import Batch, Metrics, Ratio


def cell_metrics(
    predictions: jax.Array, targets: jax.Array, mask: jax.Array, focus_token: int | None
) -> Metrics:
    """Compares predicted cells with the label.

    Args:
      predictions: int [B, S].
      targets: int [B, S].
      mask: bool [B, S], True = counted; rows without any count in nothing.
      focus_token: the id whose precision, recall and F1 are wanted; None leaves them out.

    Returns:
      puz_acc (rows without a mistake), cell_acc, and with a focus token focus_precision
      tp / (tp + fp), focus_recall tp / (tp + fn), focus_f1 2 tp / (2 tp + fp + fn), all over the
      whole batch.
    """
    right = predictions == targets
    metrics = {
        "puz_acc": losses.masked_ratio(losses.all_correct(right, mask), jnp.any(mask, axis=1)),
        "cell_acc": losses.masked_ratio(right, mask),
    }
    if focus_token is not None:
        said, true = mask & (predictions == focus_token), mask & (targets == focus_token)
        hits, claims, marks = (jnp.sum(x, dtype=jnp.float32) for x in (said & true, said, true))
        metrics["focus_precision"] = Ratio(hits, claims)
        metrics["focus_recall"] = Ratio(hits, marks)
        metrics["focus_f1"] = Ratio(2 * hits, claims + marks)
    return metrics


def finalize(metrics: Metrics) -> dict[str, float]:
    """Turns summed metrics into values.

    Args:
      metrics: sums over a whole split.

    Returns:
      total / count of each; the focus metrics as the original defines them, with 1e-8 in every
      denominator: p = tp / (tp + fp + 1e-8), r likewise, F1 = 2 p r / (p + r + 1e-8).
    """
    totals = {name: (float(ratio.total), float(ratio.count)) for name, ratio in metrics.items()}
    values = {name: total / count if count else 0.0 for name, (total, count) in totals.items()}
    if "focus_f1" in values:
        for name in ("focus_precision", "focus_recall"):
            total, count = totals[name]
            values[name] = total / (count + 1e-8)
        precision, recall = values["focus_precision"], values["focus_recall"]
        values["focus_f1"] = 2 * precision * recall / (precision + recall + 1e-8)
    return values


def copy_input_baseline(
    inputs: np.ndarray, labels: np.ndarray, focus_token: int | None = PATH
) -> dict[str, float]:
    """Scores the predictor that returns its input; int [P, S] each."""
    predictions, targets = jnp.asarray(inputs), jnp.asarray(labels)
    mask = jnp.ones(targets.shape, bool)
    return finalize(cell_metrics(predictions, targets, mask, focus_token))


def path_metrics(logits: jax.Array, batch: Batch) -> Metrics:
    """Counts the rows whose marks form a path; too dear for the training step.

    Args:
      logits: [B, S, V].
      batch: mazes; rows without any scored cell count in nothing.

    Returns:
      valid_path and optimal_path.
    """
    counted = losses.rows_with_targets(batch)
    valid, optimal = path_flags(batch.inputs, jnp.argmax(logits, axis=-1))
    return {
        "valid_path": losses.masked_ratio(valid, counted),
        "optimal_path": losses.masked_ratio(optimal, counted),
    }


@jax.jit
def path_flags(inputs: jax.Array, predictions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tells whether the marked cells form a path from S to G, and a shortest one.

    Valid: walls, S and G as in the input, elsewhere only marks and open cells, and S, the marked
    cells and G can be put in one order of single moves that uses each once.
    Optimal (implies valid): the same frame, and with the distances d_S, d_G and L = d_S(G) there is
    exactly one marked cell at each d_S = 1 .. L-1, each with d_S + d_G = L, consecutive ones
    adjacent.

    Args:
      inputs: int [B, S].
      predictions: int [B, S].

    Returns:
      bool [B] each; False for inputs without exactly one S and one G. See `single_path_exists` for
      the bound on the search behind "valid".
    """
    rows, seq_len = inputs.shape
    side = side_of(seq_len)
    inputs = inputs.astype(jnp.int32).reshape(rows, side, side)
    predictions = predictions.astype(jnp.int32).reshape(rows, side, side)
    is_start, is_goal, is_mark = inputs == START, inputs == GOAL, predictions == PATH
    frame = jnp.where(inputs == OPEN, is_mark | (predictions == OPEN), predictions == inputs)
    framed = (
        _all(frame)
        & (_count(is_start) == 1)
        & (_count(is_goal) == 1)
        & _all((inputs >= WALL) & (inputs <= GOAL))
    )
    optimal = framed & _is_shortest(inputs != WALL, is_start, is_goal, is_mark)
    # A shortest path is valid without a search.
    ask = framed & ~optimal
    found = single_path_exists(is_mark | is_start | is_goal, is_start, is_goal, ask)
    return optimal | found, optimal


def grid_distances(is_open: jax.Array, sources: jax.Array) -> jax.Array:
    """Counts the moves from a set of cells: d(v) = 1 + min over neighbours d, repeated until still.

    Args:
      is_open: bool [..., H, W].
      sources: bool [..., H, W], cells at distance 0.

    Returns:
      int32 [..., H, W]; H * W where there is no way.
    """
    height, width = is_open.shape[-2:]
    never = height * width
    start = jnp.where(sources, 0, never)

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        distance, _ = state
        around = jnp.stack(neighbours(distance, never)).min(0) + 1
        closer = jnp.where(is_open, jnp.minimum(distance, around), distance)
        return closer, jnp.any(closer != distance)

    return jax.lax.while_loop(lambda state: state[1], step, (start, jnp.any(sources)))[0]


def _is_shortest(
    is_open: jax.Array, is_start: jax.Array, is_goal: jax.Array, is_mark: jax.Array
) -> jax.Array:
    never = is_open.shape[-2] * is_open.shape[-1]
    sources = jnp.stack([is_start, is_goal])
    from_start, from_goal = grid_distances(is_open[None], sources)  # [B, H, W] each
    length = jnp.max(jnp.where(is_goal, from_start, 0), axis=(1, 2))[:, None, None]
    on_path = from_start + from_goal == length
    # With a predecessor for every mark and one mark before G, all of 1 .. L-1 have a mark, and as
    # many marks as distances means one each.
    before = jnp.stack(neighbours(jnp.where(is_mark, from_start, -2), -2))
    has_predecessor = (from_start == 1) | jnp.any(before == from_start - 1, axis=0)
    reaches_goal = (length[:, 0, 0] == 1) | jnp.any(
        is_mark & (from_start == length - 1), axis=(1, 2)
    )
    return (
        (length[:, 0, 0] < never)
        & _all(~is_mark | (on_path & has_predecessor))
        & (_count(is_mark) == length[:, 0, 0] - 1)
        & reaches_goal
    )


def _all(values: jax.Array) -> jax.Array:
    return jnp.all(values, axis=(1, 2))


def _count(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=(1, 2), dtype=jnp.int32)
