"""Structures that tasks, models and the trainer share.

Shape letters: B rows, T outer sequence, S grid tokens, H hidden, V classes, M limit of inner
(ponder) steps, C calls of the ponder loop per row: 1 for mazes and parity, T for sequences, S for
the per-position halting of the Universal Transformer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

Params = Any
FORMS = ("grid", "vector", "frames", "seq2seq")


@flax.struct.dataclass
class Batch:
    """Examples of one task, batch first; padding may hold anything and never matters.

    Attributes:
      inputs: grid and seq2seq source: int32 tokens [B, S]; vector: float32 [B, bits];
        frames: float32 [B, T, features].
      input_mask: bool [B, S | bits | T], True = part of the example.
      targets: int32; grid [B, S]; vector [B]; frames [B, T] or [B, T, places]; seq2seq [B, T_out].
      target_mask: bool like targets, True = scored.
      decoder_inputs: int32 [B, T_out], the shifted target of seq2seq; else [B, 0].
      difficulty: int32 [B]: bits, gates, digits, items, symbols or path moves.
    """

    inputs: jax.Array
    input_mask: jax.Array
    targets: jax.Array
    target_mask: jax.Array
    decoder_inputs: jax.Array
    difficulty: jax.Array


@dataclasses.dataclass(frozen=True)
class TaskShape:
    """What a model must know of a task; static.

    Attributes:
      form: "grid" (tokens to as many classes), "vector" (one static input, one answer),
        "frames" (a sequence of feature rows), "seq2seq" (tokens to tokens).
      length: S, bits, T or the longest source; train and evaluation may differ for seq2seq.
      features: width of a vector or frame; of tokens the vocabulary size.
      places: answers per position (addition: digits), else 1.
      classes: classes per answer; 1 = one logit, a yes-no answer.
      readout: "positions" (every position) or "last" (the last valid one).
      causal: whether `attention_mode="auto"` means causal.
    """

    form: str
    length: int
    features: int
    places: int = 1
    classes: int = 1
    readout: str = "positions"
    causal: bool = False


@flax.struct.dataclass
class Ponder:
    """How long a model thought, per call of the ponder loop.

    Attributes:
      cost: float32 [B, C], N + R (ACT-RNN), remainder + updates (Universal Transformer); carries
        the gradient; 0 without halting.
      steps: float32 [B, C], inner steps a call used.
      remainder: float32 [B, C], the mass given to the last step; no gradient.
      forced: bool [B, C], stopped by the limit alone.
      mask: bool [B, C], True = the call belongs to the example.
      mass: float32 [M], sum over the masked calls of the mass accumulated after each inner step
        (the last value repeated); [0] for models without it.
      executed: int32 [], inner steps really computed, summed over sequential calls.
    """

    cost: jax.Array
    steps: jax.Array
    remainder: jax.Array
    forced: jax.Array
    mask: jax.Array
    mass: jax.Array
    executed: jax.Array


@flax.struct.dataclass
class Outputs:
    """What a model returns.

    Attributes:
      logits: float32; grid [B, S, V]; vector [B]; frames [B, T] or [B, T, places, classes], or
        [B] with readout "last"; seq2seq [B, T_out, V].
      ponder: see Ponder.
    """

    logits: jax.Array
    ponder: Ponder


class Ratio(NamedTuple):
    """A mean as its sum and count, so that means over batches, shards and splits are exact."""

    total: jax.Array
    count: jax.Array  # type: ignore[assignment]  # a tuple's own method has this name

    def __add__(self, other: Any) -> "Ratio":  # type: ignore[override]
        return Ratio(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> jax.Array:
        """total / count; 0 where nothing was counted."""
        return jnp.where(self.count > 0, self.total / jnp.maximum(self.count, 1), 0.0)


Metrics = dict[str, Ratio]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task as a bundle of pure functions.

    Attributes:
      name: as in `task.name`.
      shape: what models need of it.
      sample: (key, row_ids [B] int32, split) -> Batch. Row i depends on key and row_ids[i] alone,
        so a batch may be cut in any way. split is static: "train" or the name of an evaluation set.
        None for tasks read from files.
      example_loss: (logits, batch) -> Ratio of [B] arrays: sum of the loss over a row's scored
        answers, and how many there are. The loss of a batch is sum / sum.
      metrics: (logits, batch) -> Metrics of scalars, named as in the log without prefix.
      example_correct: (logits, batch) -> bool [B], the whole row is right.
      eval_sets: names of the test sets, the first is the in-distribution one.
      selection_metric: the metric (larger is better) that decides which checkpoint is best.
    """

    name: str
    shape: TaskShape
    sample: Callable[..., Batch] | None
    example_loss: Callable[[jax.Array, Batch], Ratio]
    metrics: Callable[[jax.Array, Batch], Metrics]
    example_correct: Callable[[jax.Array, Batch], jax.Array]
    eval_sets: tuple[str, ...]
    selection_metric: str


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as a bundle of pure functions.

    Attributes:
      type: as in `model.type`.
      init: key -> params.
      apply: (params, batch, fixed_steps=0) -> Outputs. fixed_steps > 0 runs that many inner steps
        without halting (static; inference only).
      halting_path: regular expression over parameter names (joined by "/") of the halting unit.
      max_steps: M, the limit of inner steps.
      start, advance, running, finish: inference in pieces, so that an evaluator can let rows that
        have halted leave the batch; None for models that cannot. start(params, batch) -> carry,
        every leaf with a leading B axis; advance(params, carry, count) -> carry after up to
        `count` (static) inner steps of the rows that still run; running(carry) -> bool [B];
        finish(params, carry) -> Outputs, equal to those of apply.
      stretches: (params, batch) -> (logits [K, ...] after every stretch of inner steps, Outputs of
        the last); gradients end where a stretch begins. None for models without.
      decode: (params, batch, length) -> int32 [B, length], what the model writes by itself, the
        most likely token each time, up to and with the end token, zeros behind it; only the source
        of the batch is read, and targets begin at position 0. None but for seq2seq.
    """

    type: str
    init: Callable[[jax.Array], Params]
    apply: Callable[..., Outputs]
    halting_path: str
    max_steps: int
    start: Callable[..., Any] | None = None
    advance: Callable[..., Any] | None = None
    running: Callable[[Any], jax.Array] | None = None
    finish: Callable[..., Outputs] | None = None
    stretches: Callable[[Params, Batch], tuple[jax.Array, Outputs]] | None = None
    decode: Callable[[Params, Batch, int], jax.Array] | None = None
