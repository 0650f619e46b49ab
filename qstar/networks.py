"""What the engine needs of a language model: slots to read prompts into, one token at a time out.

Each network is a bundle of pure functions, static and hashable, without arrays; parameters and
caches are arguments.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from common.lm.cache import (
    Cache,
    bytes_per_token,
    clear_slots,
    empty_cache,
    refit,
    write_prompts,
)
from common.lm.config import DecoderConfig
from common.lm.decoder import decode_step, forward
from common.lm.layers import KeyValue, Params


class Network(Protocol):
    """A causal language model over S slots; caches are trees of arrays with their own lengths."""

    @property
    def vocab_size(self) -> int:
        """W, columns of the logits."""
        ...

    @property
    def max_positions(self) -> int:
        """Longest sequence."""
        ...

    @property
    def token_bytes(self) -> int:
        """Memory of one cached token."""
        ...

    def empty(self, slots: int, capacity: int) -> Any:
        """A cache of S slots with room for M tokens each."""
        ...

    def read(self, params: Any, token_ids: jax.Array) -> Any:
        """What a cache keeps of tokens [R, P], each row read from its beginning."""
        ...

    def store(self, cache: Any, kept: Any, lengths: jax.Array, slots: jax.Array) -> Any:
        """The cache with what `read` gave at the start of slots [R].

        `lengths` [R] of the tokens are real, 0..P. A slot outside 0..S-1 drops its row.
        """
        ...

    def decode(
        self, params: Any, cache: Any, tokens: jax.Array, active: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Reads one token [S] per active slot: logits [S, W] of the next, and the cache."""
        ...

    def resize(self, cache: Any, capacity: int) -> Any:
        """The cache with room for another number of tokens; the old one is given up."""
        ...

    def clear(self, cache: Any, cleared: jax.Array) -> Any:
        """The cache with the slots marked in `cleared` [S] zeroed."""
        ...


@dataclasses.dataclass(frozen=True)
class DecoderNetwork:
    """The decoder of `common.lm`.

    Attributes:
        cfg: its sizes.
    """

    cfg: DecoderConfig

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; may exceed the tokenizer's size."""
        return self.cfg.vocab_size

    @property
    def max_positions(self) -> int:
        """The model's context."""
        return self.cfg.max_positions

    @property
    def token_bytes(self) -> int:
        """Keys and values over all layers."""
        return bytes_per_token(self.cfg)

    def empty(self, slots: int, capacity: int) -> Cache:
        """See `Network`."""
        return empty_cache(self.cfg, slots, capacity)

    def read(self, params: Params, token_ids: jax.Array) -> tuple[KeyValue, ...]:
        """See `Network`; keys and values [R, P, H_kv, K] per layer, no logits."""
        return tuple(forward(params, self.cfg, token_ids).key_values)

    def store(
        self, cache: Cache, kept: Sequence[KeyValue], lengths: jax.Array, slots: jax.Array
    ) -> Cache:
        """See `Network`."""
        slots = jnp.where(slots < 0, cache.slots, slots)
        stored = [write_prompts(cache, i, own, slots) for i, own in enumerate(kept)]
        return Cache(
            keys=tuple(key for key, _ in stored),
            values=tuple(value for _, value in stored),
            lengths=cache.lengths.at[slots].set(lengths, mode="drop"),
        )

    def decode(
        self, params: Params, cache: Cache, tokens: jax.Array, active: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """See `Network`; logits are float32."""
        return decode_step(params, self.cfg, cache, tokens, active)

    def resize(self, cache: Cache, capacity: int) -> Cache:
        """See `Network`."""
        return refit(cache, capacity)

    def clear(self, cache: Cache, cleared: jax.Array) -> Cache:
        """See `Network`."""
        return clear_slots(cache, cleared)


@flax.struct.dataclass
class TableCache:
    """A table model remembers how long its sequences are, nothing else.

    Attributes:
        lengths: [S] int32.
    """

    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class TableNetwork:
    """A bigram model: parameters are a table [W, W] of logits, row = the token before.

    The smallest model there is whose outputs have known probabilities.

    Attributes:
        vocab_size: W.
        max_positions: longest sequence.
    """

    vocab_size: int
    max_positions: int = 1 << 20
    token_bytes: int = 0

    def empty(self, slots: int, capacity: int) -> TableCache:
        """See `Network`."""
        del capacity
        return TableCache(jnp.zeros((slots,), jnp.int32))

    def read(self, params: jax.Array, token_ids: jax.Array) -> tuple[()]:
        """See `Network`; a table needs nothing of earlier tokens."""
        del params, token_ids
        return ()

    def store(
        self, cache: TableCache, kept: tuple[()], lengths: jax.Array, slots: jax.Array
    ) -> TableCache:
        """See `Network`."""
        del kept
        slots = jnp.where(slots < 0, cache.lengths.shape[0], slots)
        return TableCache(cache.lengths.at[slots].set(lengths, mode="drop"))

    def decode(
        self, params: jax.Array, cache: TableCache, tokens: jax.Array, active: jax.Array
    ) -> tuple[jax.Array, TableCache]:
        """See `Network`."""
        return params[tokens], TableCache(cache.lengths + active.astype(jnp.int32))

    def resize(self, cache: TableCache, capacity: int) -> TableCache:
        """See `Network`."""
        del capacity
        return cache

    def clear(self, cache: TableCache, cleared: jax.Array) -> TableCache:
        """See `Network`."""
        return TableCache(jnp.where(cleared, 0, cache.lengths))
