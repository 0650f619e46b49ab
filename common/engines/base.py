"""The contract between methods that steer a language model and the engines that run it.

Everything is token-native: prompts and results are token ids, text exists only at the edges. Layers
count from 0; h[l, t] is the residual stream after block l at position t, before the final norm.

A steering *tool* adds strength * vector to h[layer, t_m] in the one pass that reads t_m, the last
committed token before a segment; nothing is added at generated positions. Under the scope "segment"
its trace in the cache lasts until the segment's end, after which the committed tokens are read
again unsteered; under "persistent" the steered cache is kept.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from common.errors import require

Finish = Literal["delimiter", "eos", "length"]
SCOPES = ("segment", "persistent")
CAPABILITIES = ("sample", "states", "steer")
NO_TOOL = -1


class Rollout(NamedTuple):
    """One continuation.

    Attributes:
        token_ids: generated ids, a final stop token included.
        log_probs: log-probability of each under the (steered) model at temperature 1 over the whole
            vocabulary.
        finish: "eos" for a stop token, "delimiter" for a completed delimiter, "length" otherwise.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish: Finish


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are drawn; static.

    Attributes:
        temperature: 0 = greedy.
        top_p: nucleus of the tempered distribution; 1 = all.
        stop_ids: ids that end a row.
        seed: row r's n-th token draws from fold_in(fold_in(key(seed), r), n).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Toolbox:
    """Steering vectors a stream may inject; a tool is a row of it.

    Attributes:
        names: N distinct names.
        layers: [N] int32.
        vectors: [N, H] float32, used as they are (not normalised).
    """

    names: tuple[str, ...]
    layers: np.ndarray
    vectors: np.ndarray

    def __post_init__(self) -> None:
        """Raises UserError where the parts do not fit together."""
        require(
            self.layers.shape == (len(self.names),)
            and self.vectors.ndim == 2
            and len(self.vectors) == len(self.names),
            f"toolbox: {len(self.names)} names, layers {self.layers.shape}, vectors "
            f"{self.vectors.shape} do not belong together",
        )

    @classmethod
    def empty(cls, hidden_size: int) -> "Toolbox":
        """No tools, for a model whose states have `hidden_size` entries."""
        return cls((), np.zeros(0, np.int32), np.zeros((0, hidden_size), np.float32))


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """What a stream is opened with; static for its life.

    Attributes:
        slots: S, rows decoded side by side.
        capacity: most tokens of a row, prompt included.
        layers: distinct layers whose states `query` returns, in this order.
        delimiter: text that ends a segment.
        probe_tokens: most tokens of a probe.
        probe_branches: L, most tools probed at once.
        decoding: drawing of tokens, in probes and segments alike.
        scope: "segment" | "persistent".
    """

    slots: int
    capacity: int
    layers: tuple[int, ...]
    delimiter: str
    probe_tokens: int
    probe_branches: int
    decoding: Decoding
    scope: str = "segment"

    def __post_init__(self) -> None:
        """Raises UserError for an unknown scope or empty sizes."""
        require(self.scope in SCOPES, f"scope {self.scope!r} is none of {', '.join(SCOPES)}")
        require(self.slots > 0 and self.capacity > 0, "a stream needs at least one slot and token")
        require(bool(self.delimiter), "a stream needs a delimiter")


class Probe(NamedTuple):
    """Short continuations of every slot, discarded afterwards; branch 0 is unsteered.

    Attributes:
        lengths: [S, L + 1] int32, tokens of each branch, stop and delimiter tokens included; 0 for
            a branch without a tool and for an idle slot.
        mean_log_probs: [S, L + 1] float32, mean log-probability of the branch's tokens under the
            (steered) model at temperature 1; 0 for an empty branch.
        token_ids: [S, L + 1, probe_tokens] int32, 0 behind a branch's end.
    """

    lengths: np.ndarray
    mean_log_probs: np.ndarray
    token_ids: np.ndarray


class Work(NamedTuple):
    """Token positions sent through the model since the stream was opened, by purpose.

    Attributes:
        prefill: prompts. commit: segments. probe: probes, the unsteered branch included.
        reread: committed tokens read again to clear a steered cache (or, in an engine that resends
            prefixes, every resent position).
        probe_reused: probe tokens that became the beginning of a segment without another pass.
    """

    prefill: int = 0
    commit: int = 0
    probe: int = 0
    reread: int = 0
    probe_reused: int = 0


OnRollout = Callable[[int, int, Rollout], None]
"""Called as soon as a rollout is complete: index of its prompt, its place among the prompt's rows,
the rollout. Prompts complete in any order."""


class Stream(Protocol):
    """S rows that advance segment by segment."""

    settings: StreamSettings

    def refill(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> None:
        """Starts new rows in slots (whatever they held is dropped); `rows` fix their randomness."""
        ...

    def query(self, active: np.ndarray) -> np.ndarray:
        """Clean states at the last committed token, float32 [S, LQ, H]; zeros where not active."""
        ...

    def probe(self, tools: np.ndarray, strengths: np.ndarray, active: np.ndarray) -> Probe:
        """Tries tools ([S, L] int32, NO_TOOL = none; strengths [S, L] float32); changes nothing."""
        ...

    def commit(
        self,
        tools: np.ndarray,
        strengths: np.ndarray,
        budgets: np.ndarray,
        until_delimiter: np.ndarray,
    ) -> list[Rollout | None]:
        """Advances every slot by one segment.

        Args:
            tools: [S] int32, NO_TOOL = unsteered.
            strengths: [S] float32.
            budgets: [S] int32, most tokens; 0 = the slot stays as it is (result None).
            until_delimiter: [S] bool; False = to the end of the text (a tail).
        """
        ...

    def work(self) -> list[Work]:
        """Per slot, for the row it holds: what it has cost."""
        ...


class Engine(Protocol):
    """A frozen model. `capabilities` is checked before weights are loaded."""

    name: str
    capabilities: frozenset[str]
    num_layers: int
    hidden_size: int

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        decoding: Decoding,
        max_new_tokens: int,
        on_rollout: OnRollout | None = None,
        task_rows: int = 0,
    ) -> list[list[Rollout]]:
        """Continues prompt i once for every entry of rows[i] (its randomness), unsteered.

        A task that is resumed gives all its prompts, with no rows where nothing is left, and
        `task_rows`, the number of rows of the whole: the sizes of what is computed, and with them
        the last bits, are then those of the uninterrupted task.
        """
        ...

    def states_at(
        self,
        token_ids: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
    ) -> list[np.ndarray]:
        """Teacher-forced states: per sequence float32 [P_i, LQ, H] at its positions."""
        ...

    def open(self, settings: StreamSettings, tools: Toolbox) -> Stream:
        """A stream with empty slots."""
        ...


def require_capabilities(name: str, available: frozenset[str], needed: Sequence[str]) -> None:
    """Refuses an engine that lacks something.

    Raises:
        UserError: names the engine, what is missing and what can be chosen instead.
    """
    missing = [item for item in needed if item not in available]
    require(
        not missing,
        f"backend '{name}' cannot {', '.join(missing)}; use backend=jax or hf for it",
    )
