"""From finished canvases to rewards: decode each episode once, grade it in isolated workers.

`Grader.submit` returns at once, so one batch is graded while the next rolls out on the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.answers.paper_parsers import check_parser
from common.answers.pool import GradingHandle, GradingPool
from reoac_jax.records import check_task
from reoac_jax.tokenizer import Tokenizer

# Grading functions by task; that of MATH loads computer algebra before its first item.
GRADERS = {
    "gsm8k": "common.answers.gsm8k:grade_gsm8k",
    "math": "common.answers.algebra:grade_math",
}


class Graded(NamedTuple):
    """Texts and rewards of a batch.

    Attributes:
      texts: decoded answers.
      rewards: [B] float32 in [0, 1].
      num_failed: answers without a verdict: over the time limit, crashed or undecided; they earn 0.
      num_timeouts: those of them that hit the time limit.
    """

    texts: list[str]
    rewards: np.ndarray
    num_failed: int
    num_timeouts: int = 0


class PendingGrades(NamedTuple):
    """A batch being graded."""

    texts: list[str]
    handle: GradingHandle

    def result(self) -> Graded:
        """Wait for the verdicts."""
        verdicts = self.handle.result()
        failed = sum(v.timed_out or v.crashed for v in verdicts)
        late = sum(v.timed_out for v in verdicts)
        return Graded(self.texts, np.array([v.score for v in verdicts], np.float32), failed, late)


def decode_texts(
    gen_ids: np.ndarray, tokenizer: Tokenizer, mask_id: int, cut_at_eos: bool
) -> list[str]:
    """Texts of canvases [B, G] int32, without special tokens.

    Args:
      cut_at_eos: stop at the first eos (plus); otherwise special ids are dropped anywhere (paper).
    """
    special = {mask_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id}
    texts = []
    for row in gen_ids.tolist():
        if cut_at_eos and tokenizer.eos_id in row:
            row = row[: row.index(tokenizer.eos_id)]
        texts.append(tokenizer.decode([i for i in row if i not in special]))
    return texts


class Grader:
    """Grades batches of canvases against gold answers; a context manager that owns its workers."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        mask_id: int,
        *,
        cut_at_eos: bool,
        task: str = "gsm8k",
        mode: str = "strict",
        verifier: str = "robust",
        parser: str = "sympy",
        workers: int = 1,
        time_limit: float = 2.0,
    ) -> None:
        """Start the workers.

        Args:
          cut_at_eos: see `decode_texts`.
          task: "gsm8k" or "math".
          mode, verifier: of `common.answers.grade_gsm8k` and `grade_math`.
          parser: of the paper verifier of MATH.
          time_limit: seconds per answer.

        Raises:
          UserError: the task is unknown, the workers cannot start, or the parser is not installed.
        """
        self._tokenizer, self._mask_id, self._cut = tokenizer, mask_id, cut_at_eos
        check_task(task)
        self._options = {"mode": mode, "verifier": verifier}
        if task == "math":
            self._options["parser"] = parser
            if verifier == "paper":
                check_parser(parser)
        self._pool = GradingPool(workers, time_limit, GRADERS[task])

    def texts(self, gen_ids: np.ndarray) -> list[str]:
        """The texts that canvases [B, G] are graded by."""
        return decode_texts(gen_ids, self._tokenizer, self._mask_id, self._cut)

    def submit(self, gen_ids: np.ndarray, golds: Sequence[str]) -> PendingGrades:
        """Decode canvases [B, G] and queue them; returns at once."""
        texts = self.texts(gen_ids)
        items = [(text, gold, self._options) for text, gold in zip(texts, golds, strict=True)]
        return PendingGrades(texts, self._pool.submit(items))

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.close()
