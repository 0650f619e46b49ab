"""The token loop of the JAX engine.

Row r's n-th token draws from fold_in(row_keys[r], n).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.lm.cache import Cache
from common.lm.config import DecoderConfig
from common.lm.decoder import Capture, extend, head_logits
from common.lm.layers import Params
from common.lm.sampling import fold_rows, make_sampling, sample

RUNNING, EOS, DELIMITER = 0, 1, 2
"""Why a row ended; a row that is cut off by its limit stays RUNNING."""


class Drawing(NamedTuple):
    """How tokens are drawn; static.

    Attributes:
        temperature: 0 = greedy.
        top_p: 1 = all.
    """

    temperature: float
    top_p: float


class Ends(NamedTuple):
    """What ends a row.

    Attributes:
        stop_ids: [E] int32; -1 = none.
        next: [V, n] int32 of the delimiter's automaton.
        hit: [V, n] bool of the delimiter's automaton.
    """

    stop_ids: jax.Array
    next: jax.Array
    hit: jax.Array

    def step(self, token: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """State behind the tokens and what they end: both [B] int32."""
        stopped = jnp.any(token[:, None] == self.stop_ids, axis=1)
        ended = jnp.where(self.hit[token, state], DELIMITER, RUNNING)
        return self.next[token, state], jnp.where(stopped, EOS, ended)


class Entry(NamedTuple):
    """Where S rows stand when a segment begins or goes on.

    Attributes:
        token: [S] int32, last token, unread; unused in fresh rows.
        fresh: [S] bool, the next token comes from `first_hidden` instead.
        state: [S] int32, of the delimiter's automaton.
        drawn: [S] int32, tokens the row has drawn before.
        limits: [S] int32, most tokens; 0 = the row is idle.
        until: [S] bool, a delimiter ends the segment.
    """

    token: jax.Array
    fresh: jax.Array
    state: jax.Array
    drawn: jax.Array
    limits: jax.Array
    until: jax.Array


class Chunk(NamedTuple):
    """Tokens of one call.

    Attributes:
        tokens: [S, C] int32; 0 behind a row's end.
        log_probs: [S, C] float32, at temperature 1; 0 behind a row's end.
        lengths: [S] int32.
        state: [S] int32, of the automaton.
        ended: [S] int32, RUNNING, EOS or DELIMITER.
    """

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    state: jax.Array
    ended: jax.Array


class _Loop(NamedTuple):
    """Carry of the segment loop; `trail` as `decode_chunk` returns it."""

    cache: Cache
    chunk: Chunk
    token: jax.Array
    active: jax.Array
    reads: jax.Array  # [S] tokens read
    trail: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "drawing", "num_tokens", "trail_layer"),
    donate_argnames="cache",
)
def decode_chunk(
    params: Params,
    cache: Cache,
    first_hidden: jax.Array,
    entry: Entry,
    row_keys: jax.Array,
    ends: Ends,
    quorum: jax.Array,
    *,
    cfg: DecoderConfig,
    drawing: Drawing,
    num_tokens: int,
    trail_layer: int | None = None,
) -> tuple[Cache, Chunk, jax.Array]:
    """Generates until every row has ended, or one has filled its chunk.

    Args:
        params: Parameter tree.
        cache: S slots; donated.
        first_hidden: [S, D], states the fresh rows' next tokens come from.
        entry: Where the rows stand.
        row_keys: [S] typed keys.
        ends: What ends a row.
        quorum: [] int32 >= 1, leaves as soon as fewer rows than this are running.
        cfg: The decoder.
        drawing: How tokens are drawn.
        num_tokens: C.
        trail_layer: Layer whose states are kept, or None.

    Returns:
        The cache, which holds every token but each row's last; the tokens; and the residual stream
        [S, C, D] behind the trail layer of the tokens read, in the order of their reading ([S, C,
        0] without a trail layer).
    """
    slots = cache.slots
    rows = jnp.arange(slots)
    kept = jnp.asarray([-1 if trail_layer is None else trail_layer], jnp.int32)
    width = 0 if trail_layer is None else cfg.hidden_size
    sampling = make_sampling(slots, drawing.temperature, top_p=drawing.top_p)

    def choose(loop: _Loop, logits: jax.Array, mine: jax.Array) -> _Loop:
        chunk = loop.chunk
        keys = fold_rows(row_keys, entry.drawn + chunk.lengths)
        token, log_prob = sample(logits, keys, sampling)
        at = jnp.where(mine, chunk.lengths, num_tokens)  # out of range: not written
        state, ended = ends.step(token, chunk.state)
        ended = jnp.where((ended == DELIMITER) & ~entry.until, RUNNING, ended)
        lengths = chunk.lengths + mine
        chunk = Chunk(
            tokens=chunk.tokens.at[rows, at].set(token, mode="drop"),
            log_probs=chunk.log_probs.at[rows, at].set(log_prob, mode="drop"),
            lengths=lengths,
            state=jnp.where(mine, state, chunk.state),
            ended=jnp.where(mine, ended, chunk.ended),
        )
        going = loop.active & (chunk.ended == RUNNING) & (lengths < entry.limits)
        return loop._replace(chunk=chunk, token=jnp.where(mine, token, loop.token), active=going)

    def going_on(loop: _Loop) -> jax.Array:
        longest = jnp.max(jnp.where(loop.active, loop.chunk.lengths, 0))
        return (jnp.sum(loop.active) >= quorum) & (longest < num_tokens)

    def body(loop: _Loop) -> _Loop:
        capture = None if not width else Capture(kept, loop.cache.lengths[:, None])
        count = loop.active.astype(jnp.int32)
        read = extend(params, cfg, loop.cache, loop.token[:, None], count, capture=capture)
        trail = loop.trail
        if read.captured is not None:
            at = jnp.where(loop.active, loop.reads, num_tokens)
            states = read.captured[0, :, 0].astype(trail.dtype)  # [S, D]
            trail = trail.at[rows, at].set(states, mode="drop")
        logits = head_logits(params, cfg, read.hidden[:, 0])
        loop = loop._replace(cache=read.cache, reads=loop.reads + count, trail=trail)
        return choose(loop, logits, loop.active)

    zeros = jnp.zeros((slots,), jnp.int32)
    start = _Loop(
        cache=cache,
        chunk=Chunk(
            tokens=jnp.zeros((slots, num_tokens), jnp.int32),
            log_probs=jnp.zeros((slots, num_tokens), jnp.float32),
            lengths=zeros,
            state=entry.state,
            ended=zeros,
        ),
        token=entry.token,
        active=entry.limits > 0,
        reads=zeros,
        trail=jnp.zeros((slots, num_tokens, width), cfg.activation_dtype),
    )
    first = jax.lax.cond(
        jnp.any(entry.fresh),
        lambda: head_logits(params, cfg, first_hidden),
        lambda: jnp.zeros((slots, cfg.vocab_size), jnp.float32),
    )
    end: Any = jax.lax.while_loop(
        going_on, body, choose(start, first, entry.fresh & (entry.limits > 0))
    )
    return end.cache, end.chunk, end.trail
