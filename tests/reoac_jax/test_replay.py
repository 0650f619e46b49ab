"""The episode buffer: order, sampling, and its state for checkpoints."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from reoac_jax.replay import ReplayBuffer, from_state, push, sample, stack, to_state, unstack


class _Episode(NamedTuple):
    tokens: Any  # [T, G]
    reward: Any  # []


def _batch(first: int, size: int) -> _Episode:
    rewards = np.arange(first, first + size, dtype=np.float32)
    tokens = np.arange(size * 6, dtype=np.int32).reshape(size, 2, 3) + 100 * first
    return _Episode(tokens, rewards)


def test_push_keeps_the_newest_in_order() -> None:
    buffer = ReplayBuffer(4)
    for first in (0, 3, 6):
        before = buffer
        buffer = push(buffer, unstack(_batch(first, 3)))
        assert before is not buffer
    assert len(buffer) == 4
    held = stack(buffer)
    np.testing.assert_array_equal(held.reward, [5, 6, 7, 8])
    np.testing.assert_array_equal(held.tokens[1:], _batch(6, 3).tokens)


def test_episodes_are_copies_that_cannot_change() -> None:
    batch = _batch(0, 2)
    buffer = push(ReplayBuffer(2), unstack(batch))
    batch.tokens[:] = -1
    assert stack(buffer).tokens.min() >= 0
    assert buffer.episodes[0].tokens.base is None
    with pytest.raises(ValueError, match="read-only"):
        buffer.episodes[0].tokens[0, 0] = 5


def test_device_batches_become_host_arrays() -> None:
    (episode, _) = unstack(jax.tree.map(jnp.asarray, _batch(0, 2)))
    assert all(isinstance(leaf, np.ndarray) for leaf in episode)


def test_sampling_is_uniform_without_replacement() -> None:
    buffer = push(ReplayBuffer(10), unstack(_batch(0, 5)))
    rng = np.random.default_rng(0)
    counts = np.zeros(5)
    for _ in range(400):
        drawn = sample(buffer, 2, rng).reward.astype(int)
        assert len(set(drawn)) == 2
        counts[drawn] += 1
    # 400 draws of 2 out of 5: expectation 160 each, standard deviation below 10.
    assert np.abs(counts - 160).max() < 50
    np.testing.assert_array_equal(sample(buffer, 5, rng).reward, np.arange(5))
    np.testing.assert_array_equal(sample(buffer, 99, rng).reward, np.arange(5))


@pytest.mark.parametrize("filled", [0, 2, 5])
def test_state_round_trip(filled: int) -> None:
    example = unstack(_batch(0, 1))[0]
    buffer = push(ReplayBuffer(3), unstack(_batch(0, filled)))
    state = to_state(buffer, example)
    assert state.episodes.tokens.shape == (3, 2, 3)
    restored = from_state(state)
    assert restored.capacity == 3 and len(restored) == min(filled, 3)
    for ours, theirs in zip(restored.episodes, buffer.episodes, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_state_goes_through_orbax(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    example = unstack(_batch(0, 1))[0]
    buffer = push(ReplayBuffer(3), unstack(_batch(0, 2)))
    target = to_state(ReplayBuffer(3), example)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "buffer", to_state(buffer, example))
        checkpointer.wait_until_finished()
        restored = from_state(checkpointer.restore(tmp_path / "buffer", target))
    jax.tree.map(np.testing.assert_array_equal, stack(restored), stack(buffer))
    assert isinstance(restored.episodes[0], _Episode)


def test_errors() -> None:
    with pytest.raises(UserError, match="buffer_size"):
        ReplayBuffer(0)
    buffer = push(ReplayBuffer(3), unstack(_batch(0, 2)))
    with pytest.raises(ValueError, match="same structure"):
        push(buffer, [_Episode(np.zeros((2, 4), np.int32), np.float32(0))])
    with pytest.raises(ValueError, match="example"):
        to_state(buffer, _Episode(np.zeros((2, 3), np.int64), np.float32(0)))
    with pytest.raises(ValueError, match="empty"):
        stack(ReplayBuffer(3))
    with pytest.raises(ValueError, match="at least 1"):
        sample(buffer, 0, np.random.default_rng(0))
