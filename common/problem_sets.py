"""What every generator of problems shares: splits, seeded draws, and the read-only list."""

import abc
import hashlib
import random
from collections.abc import Sequence
from typing import Any, overload

from common.errors import UserError

SPLITS = ("train", "test")
TEST_SHARE = 10  # one problem in TEST_SHARE belongs to the test split


def _stable_hash(text: str) -> int:
    """A hash of 64 bits that is the same in every process and version of Python."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of_text(text: str, share: int = TEST_SHARE) -> str:
    """Split decided by what a problem asks, so that no seed brings it into the other split.

    Args:
        text: what makes the problem what it is, for example its numbers and signs.
        share: one problem in `share` is a test problem.

    Returns:
        "train" or "test".
    """
    return "test" if _stable_hash(text) % share == 0 else "train"


def seeded(*name: object) -> random.Random:
    """Generator whose draws depend on the given parts alone, joined by bars."""
    return random.Random(_stable_hash("|".join(map(str, name))))


def check_split(split: str) -> None:
    """Refuse an unknown split.

    Raises:
        UserError: it is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise UserError(f"problem split '{split}' is unknown: use one of {', '.join(SPLITS)}")


def check_place(split: str, index: int) -> None:
    """Refuse what names no problem.

    Raises:
        UserError: unknown split or negative index.
    """
    check_split(split)
    if index < 0:
        raise UserError(f"problem index {index} is negative: indices start at 0")


class GeneratedProblems(Sequence[dict[str, Any]], abc.ABC):
    """A fixed number of generated problems that behaves like a read-only list of records."""

    def __init__(self, split: str, size: int, seed: int = 0) -> None:
        """Describe the set; nothing is generated before it is read.

        Args:
            split: "train" or "test".
            size: number of problems.
            seed: seed of the whole set.

        Raises:
            UserError: unknown split or negative size.
        """
        check_split(split)
        if size < 0:
            raise UserError(f"problem set size {size} is negative: use 0 or more")
        self.split = split
        self.size = size
        self.seed = seed

    @abc.abstractmethod
    def problem(self, position: int) -> dict[str, Any]:
        """The record at a position, 0 <= position < size."""

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        position = index + self.size if index < 0 else index
        if not 0 <= position < self.size:
            raise IndexError(f"problem {index} of a set of {self.size}")
        return self.problem(position)
