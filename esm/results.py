"""Results of a method: one row per question in a journal, and their summary.

`per_example.jsonl` grows as answers finish, in whatever order; when all are there it is sorted into
the order of the questions, so a resumed run leaves the same file as an uninterrupted one.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.engines.base import Rollout
from common.errors import UserError, require
from common.rundir import (
    append_jsonl,
    atomic_write,
    atomic_write_json,
    json_text,
    read_jsonl,
    repair_jsonl,
)
from common.statistics import wilson_interval
from esm.controller import Answer
from esm.datasets import TaskExample
from esm.files import RESULT, read_object
from esm.grading import Graded

ROWS = "per_example.jsonl"
SETTINGS = "settings.json"
SUMMARY = "summary.jsonl"
FINISH_NAMES = {"delimiter": "stop", "eos": "stop", "length": "length"}


class Results:
    """The directory of one method's results."""

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], examples: Sequence[TaskExample]
    ) -> None:
        """Opens it and reads what is there.

        Args:
            directory: `eval/<name>`.
            settings: what the rows depend on; other settings are refused.
            examples: the questions.

        Raises:
            UserError: it holds results of other settings, or is damaged.
        """
        self.directory = directory
        self.path = directory / ROWS
        self.examples = list(examples)
        self._settings = json.loads(json_text(settings))
        self._seconds = 0.0
        self._check_settings()
        repair_jsonl(self.path)
        rows = read_jsonl(self.path, RESULT) if self.path.exists() else []
        wanted = {example.id for example in examples}
        self._rows = {row["example_id"]: row for row in rows if row["example_id"] in wanted}
        # Of a run over more questions: kept, but not part of this summary.
        self._others = [row for row in rows if row["example_id"] not in wanted]

    @property
    def missing(self) -> list[TaskExample]:
        """Questions without a row, in order."""
        return [example for example in self.examples if example.id not in self._rows]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows in the order of the questions."""
        return [self._rows[e.id] for e in self.examples if e.id in self._rows]

    def start(self) -> None:
        """Makes the directory and notes the settings; nothing is written before."""
        self.directory.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.directory / SETTINGS, self._settings)

    def add(self, row: dict[str, Any]) -> None:
        """Appends a finished row."""
        append_jsonl(self.path, row)
        self._rows[row["example_id"]] = row

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time inside to the wall time of these results, over all commands."""
        path = self.directory / "timing.json"
        before = 0.0
        if path.exists():
            before = read_object(path, "delete it: only the total time is lost", {"wall_s": float})[
                "wall_s"
            ]
        begin = time.monotonic()
        try:
            yield
        finally:
            self._seconds = before + time.monotonic() - begin
            atomic_write_json(path, {"wall_s": round(self._seconds, 3)})

    def finish(self, max_tokens: int) -> dict[str, Any]:
        """Sorts the rows and writes the summary.

        Args:
            max_tokens: T.
        """
        rows = self.rows
        lines = (json_text(row) + "\n" for row in (*rows, *self._others))
        atomic_write(self.path, "".join(lines))
        summary = summarize(rows, max_tokens) | {"wall_s": round(self._seconds, 3)}
        atomic_write(self.directory / SUMMARY, json_text(summary) + "\n")
        return summary

    def _check_settings(self) -> None:
        path = self.directory / SETTINGS
        if not path.exists():
            return
        saved = read_object(path, f"delete {self.directory} to start over")
        keys = [*self._settings, *(key for key in saved if key not in self._settings)]
        changed = [
            f"{key}: saved {_short(saved.get(key))}, now {_short(self._settings.get(key))}"
            for key in keys
            if saved.get(key) != self._settings.get(key)
        ]
        require(
            not changed,
            f"{self.directory} holds results of other settings ({'; '.join(changed[:3])}); set "
            "eval.tag to keep both, or delete it",
        )


def rollout_row(
    example: TaskExample, rollout: Rollout, text: str, prompt_tokens: int
) -> dict[str, Any]:
    """The row of an unsegmented answer, without its verdict."""
    count = len(rollout.token_ids)
    return {
        "task": example.task,
        "example_id": example.id,
        "tokens_used": count,
        "finish_reason": FINISH_NAMES[rollout.finish],
        "truncated": rollout.finish == "length",
        "prefill_tokens": prompt_tokens,
        "forward_positions": prompt_tokens + count,
        "text": text,
        "logprob_sum": round(float(sum(rollout.log_probs)), 4),
        "token_ids": rollout.token_ids,
    }


def answer_row(example: TaskExample, answer: Answer, text: str) -> dict[str, Any]:
    """The row of an answer in segments, without its verdict."""
    count, work = len(answer.token_ids), answer.work
    return {
        "task": example.task,
        "example_id": example.id,
        "tokens_used": count,
        "budget_used": count + answer.probe_tokens,
        "probe_tokens_used": answer.probe_tokens,
        "finish_reason": FINISH_NAMES[answer.finish],
        "truncated": answer.truncated,
        "prefill_tokens": work.prefill,
        "reread_tokens": work.reread,
        "probe_tokens_reused": work.probe_reused,
        "forward_positions": work.prefill + work.commit + work.probe + work.reread,
        "text": text,
        "logprob_sum": round(answer.log_prob, 4),
        "token_ids": answer.token_ids,
        "steps": answer.steps,
    }


def graded_row(row: dict[str, Any], verdict: Graded) -> dict[str, Any]:
    """A row with its verdict, in the order in which people read it."""
    head = {key: row[key] for key in ("task", "example_id")}
    head |= verdict.fields()
    return head | {key: value for key, value in row.items() if key not in head}


def summarize(rows: Sequence[Mapping[str, Any]], max_tokens: int) -> dict[str, Any]:
    """Accuracy with its interval and the mean cost of a question, over n rows."""
    count = len(rows)
    correct = sum(bool(row["correct"]) for row in rows)
    low, high = wilson_interval(correct, count)

    def mean(key: str) -> float:
        return round(sum(row.get(key, 0) for row in rows) / count, 4) if count else 0.0

    return {
        "n": count,
        "acc": correct / count if count else 0.0,
        "T_max": max_tokens,
        "acc_low": round(low, 6),
        "acc_high": round(high, 6),
        "acc_legacy": sum(bool(row.get("correct_legacy")) for row in rows) / max(1, count),
        "tokens_mean": mean("tokens_used"),
        "probe_tokens_mean": mean("probe_tokens_used"),
        "prefill_tokens_mean": mean("prefill_tokens"),
        "reread_tokens_mean": mean("reread_tokens"),
        "forward_positions_mean": mean("forward_positions"),
        "grading_errors": sum("grading_error" in row for row in rows),
    }


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """Rows of finished or unfinished results.

    Raises:
        UserError: there are none, or the file is damaged.
    """
    path = directory / ROWS
    if not path.is_file():
        raise UserError(f"no results at {directory}; run --stage=eval first")
    return read_jsonl(path, RESULT)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
