"""Evaluation of a whole set by sums, with rows that have halted leaving the batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from common import dist
from common.spmd import ROWS, WHOLE, spmd, sum_over_devices
from halting_jax.early_exit import with_early_exit
from halting_jax.losses import rows_with_targets
from halting_jax.objective import classification, ponder_ratio
from halting_jax.ponder_sums import PonderSums, ponder_report, ponder_sums
from halting_jax.source import EvalSet
from halting_jax.types import Batch, Metrics, Model, Outputs, Params, Ratio, Task


@flax.struct.dataclass
class RowResults:
    """What is kept of every example, [B].

    Attributes:
      correct: bool, the whole example is right; steps: float32, mean steps of its calls;
      difficulty: int32; counted: bool, it has a scored answer (a filling of the last batch has
      none, nor has a sum of one number).
    """

    correct: jax.Array
    steps: jax.Array
    difficulty: jax.Array
    counted: jax.Array


@dataclasses.dataclass(frozen=True)
class SetResult:
    """Evaluation of one set.

    Attributes:
      name: of the set.
      metrics: of the task, means over the set.
      ponder: of `ponder_report`.
      losses: "classification", "ponder" (mean cost), "ponder_added" (tau times it).
      correct, steps, difficulty: per example, NumPy arrays [n].
    """

    name: str
    metrics: dict[str, float]
    ponder: dict[str, Any]
    losses: dict[str, float]
    correct: np.ndarray
    steps: np.ndarray
    difficulty: np.ndarray


class Evaluator:
    """Compiled evaluation of one task and model on a mesh."""

    def __init__(
        self,
        task: Task,
        model: Model,
        mesh: Mesh,
        *,
        batch_size: int,
        tau: float,
        ponder_reduce: str = "mean",
        fixed_steps: int = 0,
        early_exit: bool = True,
        path_metrics: Callable[[jax.Array, Batch], Metrics] | None = None,
        finalize: Callable[[Metrics], dict[str, float]] | None = None,
        mode: str = "jit",
    ) -> None:
        """Compiles nothing yet.

        Args:
          task, model, mesh: what is evaluated, and where.
          batch_size: examples per call over all devices; rounded up to a multiple of them.
          tau: weight of the ponder cost, for the reported loss.
          ponder_reduce: see `objective.ponder_ratio`.
          fixed_steps: > 0 runs that many inner steps without halting; nothing is decoded then.
          early_exit: rows that have halted leave the batch of their device, where the model can
            go on with a part of its rows; else every row waits for the last.
          path_metrics: metrics too dear for the training step.
          finalize: turns summed metrics into values; default: total / count of each.
          mode: see `common.spmd`.
        """
        self._task = task
        self._model = model
        self._mesh = mesh
        devices = mesh.devices.size
        self._batch_size = -(-batch_size // devices) * devices
        self._tau = tau
        self._reduce = ponder_reduce
        self._fixed_steps = fixed_steps
        self._path_metrics = path_metrics
        self._finalize = finalize or _values
        self._mode = mode
        self._apply = self._inference(early_exit)
        # Sets of equal shapes share one program; only their examples are drawn by one each.
        self._grade = spmd(self._graded, mesh, (WHOLE, ROWS, ROWS), (WHOLE, ROWS), mode=mode)
        self._decode = spmd(self._decoded, mesh, (WHOLE, ROWS), WHOLE, mode=mode)
        self._draws: dict[str, Callable[[np.ndarray], Batch]] = {}

    def _inference(self, early_exit: bool) -> Callable[[Params, Batch], Outputs]:
        model = self._model
        if early_exit and not self._fixed_steps and model.start:
            leaving = with_early_exit(model)
            return lambda params, batch: leaving(params, batch)[0]
        return functools.partial(model.apply, fixed_steps=self._fixed_steps)

    def run(
        self,
        params: Params,
        examples: EvalSet,
        progress: str = "",
        before_batch: Callable[[], None] = lambda: None,
    ) -> SetResult:
        """Evaluate a set.

        Metrics are those under teacher forcing. On test sets a seq2seq model also writes its
        answers by itself: `decoded_char_accuracy` (a sequence is right in one way exactly if it
        is right in the other; single tokens need not be).

        Args:
          params: replicated weights.
          examples: the set.
          progress: title of a progress bar, "" for none.
          before_batch: called ahead of every batch; may raise to stop.
        """
        total: Any = None
        kept: list[RowResults] = []
        starts = range(0, examples.size, self._batch_size)
        decoding = self._model.decode is not None and not self._fixed_steps
        # Validation sequences may start behind padding, as in training; those of tests never do.
        decoding = decoding and examples.name in self._task.eval_sets
        bar = tqdm(
            total=examples.size,
            desc=progress,
            unit="example",
            disable=not progress or not dist.is_main(),
        )
        with bar:
            for start in starts:
                before_batch()
                rows = np.arange(start, start + self._batch_size, dtype=np.int32)
                batch = self._draw(examples)(rows)
                sums, results = self._grade(params, batch, rows < examples.size)
                if decoding:
                    loss, ponder, metrics, counts = sums
                    sums = loss, ponder, metrics | self._decode(params, batch), counts
                # Sums of many examples lose digits in float32: they are added up in float64.
                sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
                total = sums if total is None else jax.tree.map(np.add, total, sums)
                kept.append(dist.gather(results))
                bar.update(min(self._batch_size, examples.size - start))
        return self._report(examples.name, total, kept)

    def _report(self, name: str, total: Any, kept: list[RowResults]) -> SetResult:
        loss, ponder, metrics, sums = total
        counted = np.concatenate([part.counted for part in kept])

        def joined(field: str) -> np.ndarray:
            return np.concatenate([getattr(part, field) for part in kept])[counted]

        mean_ponder = float(ponder.total / max(ponder.count, 1))
        return SetResult(
            name=name,
            metrics=self._finalize(metrics),
            ponder=ponder_report(sums, self._model.max_steps),
            losses={
                "classification": float(loss.total / max(loss.count, 1)),
                "ponder": mean_ponder,
                "ponder_added": self._tau * mean_ponder,
            },
            correct=joined("correct"),
            steps=joined("steps"),
            difficulty=joined("difficulty"),
        )

    def _draw(self, examples: EvalSet) -> Callable[[np.ndarray], Batch]:
        """The compiled examples of a set: row numbers -> Batch."""
        if examples.name not in self._draws:
            draw = spmd(examples.batch, self._mesh, (ROWS,), ROWS, mode=self._mode)
            self._draws[examples.name] = draw
        return self._draws[examples.name]

    def _graded(self, params: Params, batch: Batch, counted: jax.Array) -> Any:
        """One device's part: sums over all devices, and results of its own rows."""
        sums, results = self._measure(self._apply(params, batch), batch, counted)
        return sum_over_devices(sums), results

    def _decoded(self, params: Params, batch: Batch) -> Metrics:
        """Scored tokens that the model writes by itself, summed over all devices."""
        assert self._model.decode is not None
        tokens = self._model.decode(params, batch, batch.targets.shape[1])
        right = (tokens == batch.targets) & batch.target_mask
        ratio = Ratio(
            jnp.sum(right).astype(jnp.float32), jnp.sum(batch.target_mask, dtype=jnp.float32)
        )
        return sum_over_devices({"decoded_char_accuracy": ratio})

    def _measure(
        self, outputs: Outputs, batch: Batch, counted: jax.Array
    ) -> tuple[tuple[Ratio, Ratio, Metrics, PonderSums], RowResults]:
        task, ponder = self._task, outputs.ponder
        ponder = dataclasses.replace(ponder, mask=ponder.mask & counted[:, None])
        metrics = task.metrics(outputs.logits, batch)
        if self._path_metrics is not None:
            metrics = metrics | self._path_metrics(outputs.logits, batch)
        calls = jnp.maximum(jnp.sum(ponder.mask, axis=1), 1)
        results = RowResults(
            correct=task.example_correct(outputs.logits, batch),
            steps=jnp.sum(jnp.where(ponder.mask, ponder.steps, 0.0), axis=1) / calls,
            difficulty=batch.difficulty,
            counted=counted & rows_with_targets(batch),
        )
        sums = (
            classification(task, outputs.logits, batch),
            ponder_ratio(ponder, self._reduce),
            metrics,
            ponder_sums(ponder, max(self._model.max_steps, self._fixed_steps)),
        )
        return sums, results


def _values(metrics: Metrics) -> dict[str, float]:
    return {
        name: float(ratio.total) / float(ratio.count) if ratio.count else 0.0
        for name, ratio in metrics.items()
    }


def difficulty_rows(result: SetResult, max_rows: int = 12) -> list[dict[str, float]]:
    """Accuracy and steps per difficulty; many values are pooled into equal ranges.

    Returns:
      rows of low, high, n, accuracy, steps, in order of difficulty.
    """
    values = np.unique(result.difficulty)
    if not len(values):
        return []
    groups = np.array_split(values, min(max_rows, len(values)))
    rows = []
    for group in groups:
        chosen = (result.difficulty >= group[0]) & (result.difficulty <= group[-1])
        rows.append(
            {
                "low": int(group[0]),
                "high": int(group[-1]),
                "n": int(chosen.sum()),
                "accuracy": float(result.correct[chosen].mean()),
                "steps": float(result.steps[chosen].mean()),
            }
        )
    return rows


def format_difficulty(rows: list[dict[str, float]]) -> str:
    """The table of `difficulty_rows` as text."""
    lines = ["difficulty        n   accuracy   steps", "-" * 40]
    for row in rows:
        span = f"{row['low']}" if row["low"] == row["high"] else f"{row['low']}-{row['high']}"
        lines.append(f"{span:>10} {row['n']:>8}   {row['accuracy']:>7.1%} {row['steps']:>7.2f}")
    return "\n".join(lines)
