"""What the viewer shows of a trained model, as plain values: no page, no Streamlit.

`viewer_run.open_run` loads a checkpoint, `describe` runs it on one example: the question, the
label, the answer, how long the model thought where, and what it would have answered after every
step.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from halting_jax.types import Batch, TaskShape
from halting_jax.viewer_curve import halting_curve
from halting_jax.viewer_marks import (
    DIFFICULTY_UNITS,
    Inputs,
    Marks,
    answer_marks,
    answers_joined,
    input_marks,
    joined,
)
from halting_jax.viewer_run import OpenRun, Reply

FRAME_LIMIT = 16


@dataclasses.dataclass(frozen=True)
class Frame:
    """What the model answers after a fixed number of steps.

    Attributes:
      steps: how many.
      answers: one mark per shown answer.
      right: bool per shown answer.
      accuracy: share of the scored answers that are right (digits of addition count one by one);
        confidence: mean probability the model gives its answers there.
      exact: the whole example is right; valid, optimal: a maze's marks form a path, a shortest one;
        None for other tasks.
    """

    steps: int
    answers: Marks
    right: tuple[bool, ...]
    accuracy: float
    confidence: float
    exact: bool
    valid: bool | None
    optimal: bool | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One example, and what a model made of it.

    Attributes:
      task, split, index: which one.
      difficulty, unit: how hard it is, and what is counted.
      side: of the square grid; 0 for sequences.
      inputs: marks of the question; label, and `final.answers`: of the answers.
      question, label_text, answer_text: the same as one line of text each.
      final: the answer when the model halts by itself (or after `fixed_steps`); its steps are the
        most that any call took.
      fixed_steps: > 0: halting was overruled.
      mean_steps: over the calls of the ponder loop.
      max_steps: M, the limit; 1 for models that do not ponder.
      input_steps, answer_steps: inner steps per shown input or answer; empty where the model has
        no count of its own there.
      curve: halting probability accumulated after each inner step [M]; empty for models that do
        not halt.
      curve_name: what the curve is.
      frames: the answer after 1, 2, ... steps, in order.
      settled: per shown answer the steps of the first frame from which it no longer changes.
    """

    task: str
    split: str
    index: int
    difficulty: int
    unit: str
    side: int
    inputs: Marks
    label: Marks
    question: str
    label_text: str
    answer_text: str
    final: Frame
    fixed_steps: int
    mean_steps: float
    max_steps: int
    input_steps: tuple[float, ...]
    answer_steps: tuple[float, ...]
    curve: tuple[float, ...]
    curve_name: str
    frames: tuple[Frame, ...]
    settled: tuple[int, ...]


def describe(
    run: OpenRun, split: str, index: int, fixed_steps: int = 0, frame_limit: int = FRAME_LIMIT
) -> Sample:
    """Runs the model on one example.

    Args:
      run: of `open_run`.
      split: name of a set, "" = the first test set.
      index: of the example.
      fixed_steps: > 0 overrules halting in `final`.
      frame_limit: most frames; 0 leaves them out.

    Raises:
      UserError: no such set or example.
    """
    examples = run.examples(split)
    batch = run.batch(split, index)
    sheet = Sheet.of(run, batch)
    reply = jax.device_get(run.reply(batch, fixed_steps))
    steps, mask = reply.ponder.steps[0], reply.ponder.mask[0]
    counted = steps[mask]
    most = int(counted.max()) if counted.size else 0
    final = sheet.frame(reply, most)
    frames = tuple(
        sheet.frame(run.reply(batch, n), n)
        for n in frame_steps(run.model.max_steps, most, frame_limit)
    )
    input_steps, answer_steps = _steps_by_place(run.task.shape, steps, sheet)
    curve, curve_name = (
        ((), "halting overruled")
        if fixed_steps
        else halting_curve(run.trained, batch, reply.ponder)
    )
    return Sample(
        task=run.task.name,
        split=examples.name,
        index=index,
        difficulty=int(batch.difficulty[0]),
        unit=DIFFICULTY_UNITS[run.task.name],
        side=sheet.side,
        inputs=sheet.inputs.marks,
        label=sheet.label,
        question=sheet.question,
        label_text=answers_joined(run.task.name, sheet.label),
        answer_text=answers_joined(run.task.name, final.answers),
        final=final,
        fixed_steps=fixed_steps,
        mean_steps=float(counted.mean()) if counted.size else 0.0,
        max_steps=run.model.max_steps,
        input_steps=input_steps,
        answer_steps=answer_steps,
        curve=curve,
        curve_name=curve_name,
        frames=frames,
        settled=settled_steps(frames),
    )


def frame_steps(max_steps: int, used: int, limit: int) -> tuple[int, ...]:
    """The numbers of steps worth a frame: all of 1..M, or where that is more than `limit`, half of
    them one by one and the others evenly up to M; the number that was used is among them."""
    if limit <= 0:
        return ()
    if max_steps <= limit:
        return tuple(range(1, max_steps + 1))
    dense = limit // 2
    spread = np.linspace(dense, max_steps, limit - dense + 1)[1:].round().astype(int)
    chosen = {*range(1, dense + 1), *(int(n) for n in spread)}
    if 0 < used <= max_steps:
        chosen.add(used)
    return tuple(sorted(chosen))


def settled_steps(frames: Sequence[Frame]) -> tuple[int, ...]:
    """Per answer the steps of the first frame from which it no longer changes."""
    if not frames:
        return ()
    result = []
    for place in range(len(frames[-1].answers)):
        first = frames[-1]
        for frame in reversed(frames):
            if frame.answers[place] != frames[-1].answers[place]:
                break
            first = frame
        result.append(first.steps)
    return tuple(result)


@dataclasses.dataclass(frozen=True)
class Sheet:
    """The fixed part of an example: what is asked, what is right, where answers belong."""

    run: OpenRun
    batch: Batch
    inputs: Inputs
    label: Marks
    positions: tuple[int, ...]
    side: int

    @classmethod
    def of(cls, run: OpenRun, batch: Batch) -> "Sheet":
        row = jax.tree.map(lambda x: np.asarray(x[0]), batch)
        task = run.task.name
        # Sort's answer frames belong to the input too, as empty ones.
        asked = row.input_mask & ~row.target_mask if task == "sort" else row.input_mask
        inputs = input_marks(task, run.trained.config.task.encoding, row.inputs, asked)
        targets, mask = _rows(row.targets), _rows(row.target_mask)
        positions = tuple(int(i) for i in np.flatnonzero(mask.any(axis=1)))
        side = round(run.task.shape.length**0.5) if run.task.shape.form == "grid" else 0
        return cls(run, batch, inputs, answer_marks(task, targets, positions), positions, side)

    @property
    def question(self) -> str:
        """The question as one line."""
        name = self.run.task.name
        return f"{self.side} x {self.side} {name}" if self.side else joined(name, self.inputs.marks)

    def frame(self, reply: Reply, steps: int) -> Frame:
        """What the model said to this example; arrays of one row."""
        task, batch = self.run.task, self.batch
        ids, targets = _rows(np.asarray(reply.ids[0])), _rows(np.asarray(batch.targets[0]))
        mask = _rows(np.asarray(batch.target_mask[0]))
        right = ids == targets
        sure = np.broadcast_to(_rows(np.asarray(reply.chances[0])), mask.shape)
        valid = optimal = None
        if task.name == "maze":
            valid, optimal = _path_flags(batch.inputs, reply.ids)
        return Frame(
            steps=steps,
            answers=answer_marks(task.name, ids, self.positions),
            right=tuple(bool((right[i] | ~mask[i]).all()) for i in self.positions),
            accuracy=float(right[mask].mean()) if mask.any() else 0.0,
            confidence=float(sure[mask].mean()) if mask.any() else 0.0,
            exact=bool(reply.exact[0]),
            valid=valid,
            optimal=optimal,
        )


def _rows(values: np.ndarray) -> np.ndarray:
    """[T, places]: one answer per row; parity has one, other tasks one or more per position."""
    return values.reshape(-1, 1) if values.ndim < 2 else values


def _path_flags(inputs: jax.Array, ids: jax.Array) -> tuple[bool, bool]:
    from halting_jax.tasks.maze_metrics import path_flags

    valid, optimal = path_flags(inputs, ids)
    return bool(valid[0]), bool(optimal[0])


def _steps_by_place(
    shape: TaskShape, steps: np.ndarray, sheet: Sheet
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Steps per shown input and per shown answer, where the calls belong to places."""

    def at(positions: Sequence[int], offset: int = 0) -> tuple[float, ...]:
        return tuple(float(steps[offset + i]) for i in positions)

    width = sheet.batch.inputs.shape[1]
    if shape.form == "grid":
        return (), at(sheet.positions) if len(steps) == width else ()
    if len(steps) < width or len(steps) == 1:
        return (), ()
    inputs = at(sheet.inputs.positions)
    if shape.form == "seq2seq":
        return inputs, at(sheet.positions, width) if len(steps) > width else ()
    # Frames: an answer has a count of its own unless its frame shows an input.
    apart = not set(sheet.positions) & set(sheet.inputs.positions)
    return inputs, at(sheet.positions) if shape.form == "frames" and apart else ()
