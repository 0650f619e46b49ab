"""Grading while the model works on: verdicts of both graders, in threads beside the main loop.

What could run for ever (computer algebra) is decided in a worker process with a time limit; an
answer that ran out of it counts as wrong and is counted.
"""

import collections
import concurrent.futures
from typing import Any, NamedTuple

from common.answers.tasks import grade_task
from esm.datasets import TaskExample


class Graded(NamedTuple):
    """The verdicts on one answer.

    Attributes:
        pred: what was read from it by the chosen grader; None = nothing.
        gold: the reference answer.
        correct: of the chosen grader.
        correct_legacy: of the original's rules.
        error: why nothing was compared, or "timeout", "crash"; None otherwise.
    """

    pred: str | None
    gold: str | None
    correct: bool
    correct_legacy: bool
    error: str | None

    def fields(self, legacy: bool = True) -> dict[str, Any]:
        """The part of a result row."""
        row: dict[str, Any] = {"pred": self.pred, "gold": self.gold, "correct": self.correct}
        if legacy:
            row["correct_legacy"] = self.correct_legacy
        if self.error in ("timeout", "crash"):
            row["grading_error"] = self.error
        return row


def grade(example: TaskExample, response: str, finish: str, template: str, grader: str) -> Graded:
    """Grades one answer by both graders.

    Args:
        example: the question.
        response: the model's text.
        finish: "stop" or "length".
        template: of the prompt; it decides whether a box is asked for.
        grader: "strict" | "legacy": whose verdict counts.
    """
    verdicts = {
        name: grade_task(
            example.task,
            response,
            example.answer,
            answer=example.meta.get("answer"),
            template=template,
            finish_reason=finish,
            grader=name,
        )
        for name in ("strict", "legacy")
    }
    chosen = verdicts[grader]
    return Graded(
        chosen.pred, chosen.gold, chosen.correct, verdicts["legacy"].correct, chosen.error
    )


class Grader:
    """Grades in threads; `done` hands verdicts out in the order of submission.

    Use as a context manager.
    """

    def __init__(self, template: str, grader: str, workers: int) -> None:
        """Args: as in `grade`; workers: threads."""
        self._template = template
        self._grader = grader
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, "grading")
        self._waiting: collections.deque[tuple[Any, concurrent.futures.Future[Graded]]] = (
            collections.deque()
        )
        self.errors: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, item: Any, example: TaskExample, response: str, finish: str) -> None:
        """Queues an answer; `item` comes back with its verdict."""
        future = self._threads.submit(
            grade, example, response, finish, self._template, self._grader
        )
        self._waiting.append((item, future))

    def done(self, wait: bool = False) -> list[tuple[Any, Graded]]:
        """The verdicts that are there, oldest first; all of them with `wait`."""
        ready: list[tuple[Any, Graded]] = []
        while self._waiting and (wait or self._waiting[0][1].done()):
            item, future = self._waiting.popleft()
            verdict = future.result()
            if verdict.error in ("timeout", "crash"):
                self.errors[verdict.error] += 1
            ready.append((item, verdict))
        return ready
