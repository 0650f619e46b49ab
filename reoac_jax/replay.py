"""First-in-first-out memory of episodes on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from common.errors import UserError

Episode = Any  # a pytree of NumPy arrays of fixed shapes, without a batch axis


@dataclass(frozen=True)
class ReplayBuffer:
    """The newest episodes, oldest first.

    Attributes:
        capacity: most episodes kept.
        episodes: pytrees of read-only arrays, all of the same structure.
    """

    capacity: int
    episodes: tuple[Episode, ...] = ()

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise UserError(f"buffer_size={self.capacity} must be at least 1")

    def __len__(self) -> int:
        return len(self.episodes)


class ReplayState(NamedTuple):
    """A buffer as arrays of static shape, for checkpoints.

    Attributes:
        episodes: pytree of [capacity, ...] arrays, zeros behind the last episode.
        size: [] int32, number of episodes.
    """

    episodes: Episode
    size: np.ndarray


def unstack(batch: Episode) -> list[Episode]:
    """Splits a batch of episodes along its first axis.

    Args:
        batch: pytree of [B, ...] arrays, on the host or a device.

    Returns:
        B episodes of [...] arrays that own their memory.
    """
    leaves, structure = jax.tree.flatten(jax.device_get(batch))
    size = len(leaves[0]) if leaves else 0
    return [
        jax.tree.unflatten(structure, [_frozen(leaf[b]) for leaf in leaves]) for b in range(size)
    ]


def push(buffer: ReplayBuffer, episodes: Sequence[Episode]) -> ReplayBuffer:
    """Appends episodes; the oldest leave when there is no room (buffer rule).

    Args:
        buffer: the buffer so far.
        episodes: pytrees of arrays, of the structure and shapes already in the buffer.

    Returns:
        The new buffer.

    Raises:
        ValueError: if an episode has another structure, shape or dtype.
    """
    held = [*buffer.episodes, *(jax.tree.map(_frozen, episode) for episode in episodes)]
    for episode in held[len(buffer.episodes) :]:
        if _form(episode) != _form(held[0]):
            raise ValueError("all episodes of a buffer must have the same structure and shapes")
    return ReplayBuffer(buffer.capacity, tuple(held[-buffer.capacity :]))


def stack(buffer: ReplayBuffer) -> Episode:
    """Returns all episodes, oldest first, as one pytree of [N, ...] arrays.

    Raises:
        ValueError: if the buffer is empty.
    """
    return _stacked(buffer.episodes)


def sample(buffer: ReplayBuffer, count: int, rng: np.random.Generator) -> Episode:
    """Draws episodes uniformly without replacement (buffer rule).

    Args:
        buffer: the buffer.
        count: how many; all of them, oldest first, when there are not more.
        rng: source of randomness, advanced only when there is something to choose.

    Returns:
        Pytree of [min(count, N), ...] arrays.

    Raises:
        ValueError: if the buffer is empty or `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if count >= len(buffer):
        return stack(buffer)
    chosen = rng.choice(len(buffer), size=count, replace=False)
    return _stacked([buffer.episodes[i] for i in chosen])


def to_state(buffer: ReplayBuffer, example: Episode) -> ReplayState:
    """Returns the buffer as arrays whose shapes depend on the capacity only.

    Args:
        buffer: the buffer, possibly empty.
        example: an episode of the right structure, shapes and dtypes (values are not used).

    Returns:
        The state; that of an empty buffer is a valid target for a restore.

    Raises:
        ValueError: if the episodes differ in form from the example.
    """
    if len(buffer) and _form(buffer.episodes[0]) != _form(example):
        raise ValueError("the example differs from the episodes in structure or shapes")

    def fill(leaf: Any, *held: np.ndarray) -> np.ndarray:
        leaf = np.asarray(leaf)
        out = np.zeros((buffer.capacity, *leaf.shape), leaf.dtype)  # [capacity, ...]
        for slot, value in enumerate(held):
            out[slot] = value
        return out

    return ReplayState(
        jax.tree.map(fill, example, *buffer.episodes), np.asarray(len(buffer), np.int32)
    )


def from_state(state: ReplayState) -> ReplayBuffer:
    """Returns the buffer that `to_state` described.

    Raises:
        ValueError: if the size does not fit the arrays.
    """
    leaves, structure = jax.tree.flatten(jax.device_get(state.episodes))
    count, capacity = int(state.size), len(leaves[0])
    if not 0 <= count <= capacity:
        raise ValueError(f"a buffer of capacity {capacity} cannot hold {count} episodes")
    episodes = [
        jax.tree.unflatten(structure, [_frozen(leaf[b]) for leaf in leaves]) for b in range(count)
    ]
    return ReplayBuffer(capacity, tuple(episodes))


def _stacked(episodes: Sequence[Episode]) -> Episode:
    if not episodes:
        raise ValueError("the buffer is empty")
    return jax.tree.map(lambda *leaves: np.stack(leaves), *episodes)


def _frozen(leaf: Any) -> np.ndarray:
    if isinstance(leaf, np.ndarray) and leaf.base is None and not leaf.flags.writeable:
        return leaf
    # A copy, not a view: one kept row must not keep its whole batch alive.
    value = np.array(leaf)
    value.setflags(write=False)
    return value


def _form(episode: Episode) -> tuple[Any, list[tuple[tuple[int, ...], Any]]]:
    leaves, structure = jax.tree.flatten(episode)
    return structure, [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves]
