"""Keys and values of earlier tokens: a fixed number of slots, each with its own length.

A slot holds one sequence from its first token on, so the column of a token is its position and no
row is ever padded or shifted for another's sake. Columns from `lengths` on hold anything finite;
attention masks them. Layers are separate arrays: a loop that carries the cache then extends each
in place, where slices of one stacked array would be copied.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from common.errors import require
from common.lm.config import DecoderConfig
from common.lm.layers import KeyValue, cache_layout
from common.memory import trim


@flax.struct.dataclass
class Cache:
    """Keys and values of S slots with room for M tokens each.

    Attributes:
        keys: Per layer [S, H_kv, K, M], rotated.
        values: Per layer [S, H_kv, M, K].
        lengths: [S] int32, filled columns of each slot.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array

    @property
    def slots(self) -> int:
        """S."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """M."""
        return self.keys[0].shape[-1]


def empty_cache(cfg: DecoderConfig, slots: int, capacity: int) -> Cache:
    """A cache of zeros.

    Args:
        cfg: The decoder.
        slots: S.
        capacity: M, the longest sequence a slot can hold, prompt included.

    Returns:
        The cache, in the activation dtype.

    Raises:
        UserError: A size is not positive, or the model cannot address that many positions.
    """
    require(slots > 0 and capacity > 0, f"a cache of {slots} slots x {capacity} tokens is empty")
    require(
        capacity <= cfg.max_positions,
        f"sequences of {capacity} tokens exceed the {cfg.max_positions} positions of the model",
    )
    heads, size, dtype = cfg.num_kv_heads, cfg.head_dim, cfg.activation_dtype
    every = range(cfg.num_layers)
    return Cache(
        keys=tuple(jnp.zeros((slots, heads, size, capacity), dtype) for _ in every),
        values=tuple(jnp.zeros((slots, heads, capacity, size), dtype) for _ in every),
        lengths=jnp.zeros((slots,), jnp.int32),
    )


def bytes_per_token(cfg: DecoderConfig) -> int:
    """Memory of one cached token over all layers: 2 * layers * H_kv * K * itemsize."""
    item = np.dtype(cfg.activation_dtype).itemsize
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * item


def write_prompts(cache: Cache, layer: int, own: KeyValue, slots: jax.Array) -> KeyValue:
    """Puts whole prompts at the beginning of slots.

    Args:
        cache: The cache before.
        layer: Which layer's.
        own: Keys and values [R, P, H_kv, K] of R prompts, P <= M.
        slots: [R] int32, distinct; a slot outside 0..S-1 drops its row.

    Returns:
        The layer's keys and values after.
    """
    length = own[0].shape[1]
    key, value = cache_layout(*own)
    before = cache.keys[layer], cache.values[layer]
    return (
        before[0].at[slots, :, :, :length].set(key.astype(before[0].dtype), mode="drop"),
        before[1].at[slots, :, :length].set(value.astype(before[1].dtype), mode="drop"),
    )


def write_tokens(cache: Cache, layer: int, own: KeyValue, columns: jax.Array) -> KeyValue:
    """Puts T tokens of every slot at columns of their own.

    Args:
        cache: The cache before.
        layer: Which layer's.
        own: Keys and values [S, T, H_kv, K].
        columns: [S, T] int32; a column outside 0..M-1 drops its token.

    Returns:
        The layer's keys and values after.
    """
    rows = jnp.arange(columns.shape[0], dtype=jnp.int32)[:, None]
    key, value = cache.keys[layer], cache.values[layer]
    # The two indices stand apart, so their axes [S, T] come first in what is written.
    return (
        key.at[rows, :, :, columns].set(own[0].astype(key.dtype), mode="drop"),
        value.at[rows, :, columns].set(own[1].astype(value.dtype), mode="drop"),
    )


def resize(cache: Cache, capacity: int) -> Cache:
    """The same sequences with room for another number of tokens each.

    A decoding step reads all M columns; growing the cache as its longest row grows, in steps of a
    few hundred columns, saves the reading of columns nobody has filled.

    Args:
        cache: The cache.
        capacity: New M; the caller sees to it that no slot is longer.

    Returns:
        The cache with columns cut off or zeros appended.
    """
    return _with_arrays(cache, lambda x, axis: _fit(x, axis, capacity))


def refit(cache: Cache, capacity: int) -> Cache:
    """`resize` on the host that gives up the old cache, array by array.

    Both caches never stand in memory side by side, as they would around one compiled call.

    Args:
        cache: The cache; its arrays are deleted.
        capacity: New M, as in `resize`.

    Returns:
        What `resize` returns.
    """
    if capacity == cache.capacity:
        return cache

    def change(x: jax.Array, axis: int) -> jax.Array:
        fitted = _compiled_fit(x, axis, capacity).block_until_ready()
        x.delete()
        trim()  # the freed array is too small for the next one, and would stay beside it
        return fitted

    return _with_arrays(cache, change)


def _with_arrays(cache: Cache, change: Callable[[jax.Array, int], jax.Array]) -> Cache:
    """The cache with its arrays changed; `change` is told which axis holds the columns."""
    return dataclasses.replace(
        cache,
        keys=tuple(change(x, 3) for x in cache.keys),
        values=tuple(change(x, 2) for x in cache.values),
    )


def _fit(x: jax.Array, axis: int, capacity: int) -> jax.Array:
    """Columns cut off or zeros appended."""
    extra = capacity - x.shape[axis]
    if extra <= 0:
        return jax.lax.slice_in_dim(x, 0, capacity, axis=axis)
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, extra)
    return jnp.pad(x, pads)


_compiled_fit = jax.jit(_fit, static_argnums=(1, 2))


def take_slots(cache: Cache, slots: jax.Array) -> Cache:
    """A cache whose slot i is a copy of slot `slots[i]` ([S'] int32): forks and reorderings."""
    return jax.tree.map(lambda x: x[slots], cache)


def rewind(cache: Cache, lengths: jax.Array) -> Cache:
    """Forgets the tokens from `lengths` ([S] int32) on; nothing is moved or cleared."""
    return dataclasses.replace(cache, lengths=jnp.minimum(cache.lengths, lengths))


def clear_slots(cache: Cache, cleared: jax.Array) -> Cache:
    """Zeroes the slots marked in `cleared` ([S] bool).

    Only needed after a row has produced a NaN: masked columns have weight zero, but zero times NaN
    is NaN, so what such a row left behind would spoil the slot's next sequence.
    """

    def clear(x: jax.Array) -> jax.Array:
        return jnp.where(cleared.reshape(-1, *([1] * (x.ndim - 1))), jnp.zeros_like(x), x)

    return jax.tree.map(clear, cache)
