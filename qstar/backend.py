"""The contract between the scheduler and whatever runs the two models.

A backend owns S slots. The scheduler fills free slots with requests (`prefill`), lets every
occupied slot generate some tokens (`step`, then `wait`), reads what has finished and frees the
slots again (`read`, `release`). How a token is chosen from both models' logits is not the backend's
business: `qstar.slots.advance` does that, in the compiled step of the JAX decoder and on logits
handed over from another framework alike, with the same random keys.

    prefill([0, 1], requests) -> step() -> (host work) -> wait() -> read([1]) -> release([1]) -> ...
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

BACKENDS = ("jax", "transformers", "vllm")


@dataclasses.dataclass(frozen=True)
class Request:
    """One continuation that is wanted.

    Attributes:
        sample_idx: row of the data set; with `repeat` it decides the randomness.
        repeat: which of several samples of the same row.
        prompt_theta, prompt_t: token ids each model reads, in its own vocabulary, none empty. They
            may differ in length and content.
    """

    sample_idx: int
    repeat: int
    prompt_theta: Sequence[int]
    prompt_t: Sequence[int]

    @property
    def key(self) -> tuple[int, int]:
        """(sample_idx, repeat)."""
        return self.sample_idx, self.repeat


@dataclasses.dataclass(frozen=True)
class Output:
    """What a slot holds: a whole continuation, or as much of one as there is so far.

    Attributes:
        columns: [n] int32 tokens as columns of the common vocabulary; the end token included.
        stopped: the last token is an end token.
        failed: a model's logits were unusable after these tokens (NaN, +inf, nothing possible), or
            the rules left nothing to draw.
        values: per-token arrays [n] by the names of `qstar.slots.FIELDS`, float64; NaN = undefined.
    """

    columns: np.ndarray
    stopped: bool
    failed: bool
    values: Mapping[str, np.ndarray]


class Progress(NamedTuple):
    """State of all slots after a step.

    Attributes:
        counts: [S] int, tokens each slot holds.
        done: [S] bool, occupied slots that have stopped, failed or reached the limit.
        tokens: tokens generated in this step, over all slots.
        seconds: wall time of the step's device work, as far as the host can tell.
    """

    counts: np.ndarray
    done: np.ndarray
    tokens: int
    seconds: float


class Backend(Protocol):
    """Runs both models on S slots.

    Attributes:
        slots: S.
    """

    slots: int

    def prefill(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """Puts requests into free slots, distinct, one request each."""
        ...

    def step(self, leave_at: int = 0) -> None:
        """Starts generating up to a burst of tokens in every occupied slot.

        May return before the work is done; nothing but `wait` may be called until then.

        Args:
            leave_at: the burst ends early once so many slots have finished in it; 0 = only when
                all have.
        """
        ...

    def wait(self) -> Progress:
        """Blocks until the step is done."""
        ...

    def read(self, slots: Sequence[int]) -> list[Output]:
        """What these slots hold, finished or not, on the host."""
        ...

    def release(self, slots: Sequence[int]) -> None:
        """Frees slots; unfinished ones are abandoned."""
        ...

    def describe(self) -> dict[str, Any]:
        """Sizes worth logging: slots, bytes of weights and caches, capacity."""
        ...
