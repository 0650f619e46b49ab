"""Counting token positions per row."""

import numpy as np

from common.engines.base import Work


class Ledger:
    """What the rows in S slots have cost."""

    def __init__(self, slots: int) -> None:
        """Args: slots: S."""
        self._counts = {name: np.zeros(slots, np.int64) for name in Work._fields}

    def start(self, slot: int, prefill: int) -> None:
        """A new row in a slot, whose prompt took `prefill` positions."""
        for name, counts in self._counts.items():
            counts[slot] = prefill if name == "prefill" else 0

    def add(self, purpose: str, positions: np.ndarray) -> None:
        """Adds positions [S] to a field of `Work`."""
        self._counts[purpose] += positions

    def add_one(self, slot: int, purpose: str, positions: int) -> None:
        """Adds positions of one slot to a field of `Work`."""
        self._counts[purpose][slot] += positions

    def work(self) -> list[Work]:
        """Per slot."""
        columns = [self._counts[name].tolist() for name in Work._fields]
        return [Work(*row) for row in zip(*columns, strict=True)]
