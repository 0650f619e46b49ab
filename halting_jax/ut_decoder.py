"""Decoder of the encoder-decoder Universal Transformer: teacher-forced states and greedy decoding.

It always takes `max_hops` hops and has no halting. The keys and values of the source are computed
once, because neither the source nor the weights change from hop to hop. In decoding a position's
hops depend on earlier positions only, so one cache of keys and values per hop makes a new token
cost one position.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from halting_jax import ut_act
from halting_jax.signals import Signals
from halting_jax.types import Batch
from halting_jax.ut_layers import KeyValue
from halting_jax.ut_network import PAD, UniversalTransformer

EOS = 2


def decode_states(
    net: UniversalTransformer,
    batch: Batch,
    encoded: jax.Array,
    signals: Signals,
) -> jax.Array:
    """Normalised states of all target positions under teacher forcing.

    Args:
      net: the network, bound to its weights.
      batch: `decoder_inputs` and `target_mask` [B, T_out] are read.
      encoded: [B, S, H], normalised output of the encoder.
      signals: tables of at least T_out positions.

    Returns:
      [B, T_out, H].
    """
    mask, memory_mask = batch.target_mask, batch.input_mask
    memory = net.decoder_memory(encoded)
    state = net.embed(batch.decoder_inputs, mask)

    def block(state: jax.Array) -> jax.Array:
        return net.decoder_block(state, mask, memory, memory_mask)

    hops, remat = net.settings.max_hops, net.settings.remat
    state = ut_act.fixed_hops(state, signals, block, hops, remat)
    return net.decoder_norm(state)


class _Decoding(NamedTuple):
    """Carry of the decoding loop.

    Attributes:
      position: int32 [], target position to be computed.
      token: int32 [B], its input.
      done: bool [B], rows behind their end.
      tokens: int32 [B, T], what was written.
      keys, values: [N, B, T, heads, .], what earlier positions offer at every hop.
    """

    position: jax.Array
    token: jax.Array
    done: jax.Array
    tokens: jax.Array
    keys: jax.Array
    values: jax.Array


def greedy_tokens(
    net: UniversalTransformer,
    batch: Batch,
    encoded: jax.Array,
    signals: Signals,
    max_len: int,
    eos: int = EOS,
) -> jax.Array:
    """The most probable next token, again and again.

    Args:
      net: the network, bound to its weights.
      batch: `input_mask` [B, S] and the first column of `decoder_inputs` are read.
      encoded: [B, S, H], normalised output of the encoder.
      signals: tables of at least max_len positions.
      max_len: T, most tokens (static).
      eos: token that ends a row.

    Returns:
      int32 [B, T], the tokens up to and including `eos`, zeros behind it.
    """
    settings, rows = net.settings, encoded.shape[0]
    memory = net.decoder_memory(encoded)
    keys, values = (
        jnp.zeros((settings.max_hops, rows, max_len, *part.shape[2:]), part.dtype)
        for part in memory
    )

    def step(now: _Decoding) -> _Decoding:
        present = jnp.ones((rows, 1), bool)
        state = net.embed(now.token[:, None], present)  # [B, 1, H]
        place = signals.position[now.position]  # [H]
        seen = jnp.broadcast_to(jnp.arange(max_len) <= now.position, (rows, max_len))

        def hop(state: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, KeyValue]:
            row, keys, values = xs
            state = state + place + row
            own = net.decoder_own(state)
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(cache, new, now.position, axis=1)
                for cache, new in zip((keys, values), own, strict=True)
            )
            state = net.decoder_block(state, seen, memory, batch.input_mask, (keys, values))
            return state, (keys, values)

        xs = (signals.hop[: settings.max_hops], now.keys, now.values)
        state, (keys, values) = jax.lax.scan(hop, state, xs)
        state = net.decoder_norm(state[:, 0])
        logits = net.logits(state)  # [B, V]
        token = jnp.where(now.done, PAD, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return _Decoding(
            now.position + 1,
            token,
            now.done | (token == eos),
            now.tokens.at[:, now.position].set(token),
            keys,
            values,
        )

    def going(now: _Decoding) -> jax.Array:
        return (now.position < max_len) & ~jnp.all(now.done)

    first = batch.decoder_inputs[:, 0]
    begin = _Decoding(
        jnp.int32(0),
        first.astype(jnp.int32),
        jnp.zeros_like(first, bool),
        jnp.full((rows, max_len), PAD, jnp.int32),
        keys,
        values,
    )
    return jax.lax.while_loop(going, step, begin).tokens
