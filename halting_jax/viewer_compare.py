"""A trained model on several sets side by side: how often it is right, how long it thinks."""

import dataclasses

import jax
import numpy as np

from common import dist
from halting_jax.evaluate import Evaluator, SetResult, difficulty_rows
from halting_jax.viewer_data import Sheet
from halting_jax.viewer_marks import answers_joined
from halting_jax.viewer_run import OpenRun, Reply


@dataclasses.dataclass(frozen=True)
class Answered:
    """One example as a row of a table, in text."""

    question: str
    label: str
    answer: str
    right: bool
    steps: float
    difficulty: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """A set, or its first examples.

    Attributes:
      name: of the set.
      examples: how many were measured.
      right: share of them that are right as a whole.
      steps: mean steps.
      metrics: of the task.
      by_difficulty: rows of `evaluate.difficulty_rows`.
      answered: the first ones in text.
    """

    name: str
    examples: int
    right: float
    steps: float
    metrics: dict[str, float]
    by_difficulty: list[dict[str, float]]
    answered: tuple[Answered, ...]


def measure(run: OpenRun, split: str, count: int, shown: int = 10) -> Measured:
    """Evaluates the first `count` examples of a set.

    Args:
      run: of `open_run`.
      split: name of the set.
      count: at most this many examples.
      shown: how many of them are written out.

    Raises:
      UserError: no such set.
    """
    examples = run.examples(split)
    chosen = dataclasses.replace(examples, size=min(count, examples.size))
    # One call over the whole set on one device: sets of a viewer are small.
    evaluator = Evaluator(
        run.task,
        run.model,
        dist.make_mesh(1),
        batch_size=chosen.size,
        tau=0.0,
        early_exit=False,
    )
    result = evaluator.run(run.trained.params, chosen)
    return Measured(
        name=chosen.name,
        examples=chosen.size,
        right=float(result.correct.mean()),
        steps=float(result.steps.mean()),
        metrics=result.metrics,
        by_difficulty=difficulty_rows(result),
        answered=_answered(run, split, result, min(shown, chosen.size)),
    )


def _answered(run: OpenRun, split: str, result: SetResult, count: int) -> tuple[Answered, ...]:
    batch = run.rows(split, np.arange(count))
    reply = run.reply(batch)
    answers = {"ids": reply.ids, "chances": reply.chances, "exact": reply.exact}
    rows = []
    for i in range(count):
        one, said = jax.tree.map(lambda x, i=i: x[i : i + 1], jax.device_get((batch, answers)))
        sheet = Sheet.of(run, one)
        frame = sheet.frame(Reply(ponder=reply.ponder, **said), 0)
        rows.append(
            Answered(
                question=sheet.question,
                label=answers_joined(run.task.name, sheet.label),
                answer=answers_joined(run.task.name, frame.answers),
                right=frame.exact,
                steps=float(result.steps[i]),
                difficulty=int(result.difficulty[i]),
            )
        )
    return tuple(rows)
