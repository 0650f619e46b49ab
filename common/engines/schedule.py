"""Many rollouts through few slots: a slot whose row has ended takes the next one."""

import collections
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from common.engines.base import NO_TOOL, OnRollout, Rollout, StreamSettings


class Advancing(Protocol):
    """A stream whose `commit` can be left early; streams inherit `commit` from it."""

    settings: StreamSettings

    def refill(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> None:
        """As `Stream.refill`."""
        ...

    def advance(
        self,
        tools: np.ndarray,
        strengths: np.ndarray,
        budgets: np.ndarray,
        until_delimiter: np.ndarray,
        quorum: int = 1,
        max_chunks: int | None = None,
    ) -> list[Rollout | None]:
        """`commit` that may return early; rows it cuts off have finish "length" and can go on.

        Args:
            tools, strengths, budgets, until_delimiter: As in `Stream.commit`.
            quorum: Leaves as soon as fewer rows than this are running.
            max_chunks: Leaves after so many chunks of tokens.

        Returns:
            What `commit` returns.
        """
        ...

    def commit(
        self,
        tools: np.ndarray,
        strengths: np.ndarray,
        budgets: np.ndarray,
        until_delimiter: np.ndarray,
    ) -> list[Rollout | None]:
        """As `Stream.commit`.

        Raises:
            UserError: A budget exceeds what is left of a row's capacity.
        """
        return self.advance(tools, strengths, budgets, until_delimiter)


def sample_through(
    stream: Advancing,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_rollout: OnRollout | None = None,
) -> list[list[Rollout]]:
    """Continues prompt i once for every entry of rows[i], in their order, unsteered.

    Args:
        stream: Empty slots.
        prompts: Token ids.
        rows: Randomness of the rollouts.
        max_new_tokens: Longest rollout.
        on_rollout: Told about each complete rollout.

    Returns:
        The rollouts.
    """
    waiting = collections.deque(
        (i, j) for i, row_ids in enumerate(rows) for j in range(len(row_ids))
    )
    parts = [[Rollout([], [], "length") for _ in row_ids] for row_ids in rows]
    slots = stream.settings.slots
    owners: dict[int, tuple[int, int]] = {}  # by slot
    none, strengths = np.full(slots, NO_TOOL), np.zeros(slots, np.float32)
    while waiting or owners:
        free = [slot for slot in range(slots) if slot not in owners][: len(waiting)]
        started = {slot: waiting.popleft() for slot in free}
        if started:
            stream.refill(
                list(started),
                [prompts[i] for i, _ in started.values()],
                [rows[i][j] for i, j in started.values()],
            )
            owners |= started
        budgets = np.zeros(slots, np.int32)
        for slot, (i, j) in owners.items():
            budgets[slot] = max_new_tokens - len(parts[i][j].token_ids)
        # While work waits, a quarter of idle slots is reason enough to refill.
        quorum = max(1, -(-3 * len(owners) // 4)) if waiting else 1
        pieces = stream.advance(
            none, strengths, budgets, np.zeros(slots, bool), quorum, max_chunks=1
        )
        for slot, (i, j) in list(owners.items()):
            piece, before = pieces[slot], parts[i][j]
            assert piece is not None
            parts[i][j] = Rollout(
                before.token_ids + piece.token_ids,
                before.log_probs + piece.log_probs,
                piece.finish,
            )
            if piece.finish == "eos" or len(parts[i][j].token_ids) == max_new_tokens:
                del owners[slot]
                if on_rollout is not None:
                    on_rollout(i, j, parts[i][j])
    return parts
