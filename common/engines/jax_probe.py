"""Probes of the JAX engine: short continuations of every row that leave the rows as they are.

Branches of a probe share their row's randomness: what the unsteered branch shows is what an
unsteered segment would begin with, which is why its tokens and cache can become that beginning.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.engines.jax_decode import RUNNING, Drawing, Ends
from common.engines.jax_rows import Rows, inject, redo_last
from common.lm import layers as blocks
from common.lm.cache import Cache, write_tokens
from common.lm.config import DecoderConfig
from common.lm.decoder import head_logits
from common.lm.layers import Context, KeyValue, Params
from common.lm.sampling import fold_rows, make_sampling, sample


class Branches(NamedTuple):
    """What B branches of S rows try; branch 0 is unsteered.

    Attributes:
        captured: [S, B - 1] int32, index of each tool's layer among the captured ones.
        layer: [S, B - 1] int32, the tools' layers; >= first.
        additions: [S, B - 1, D] float32.
        active: [S, B] bool.
    """

    captured: jax.Array
    layer: jax.Array
    additions: jax.Array
    active: jax.Array


class Probed(NamedTuple):
    """Tokens of the branches.

    Attributes:
        tokens: [S, B, P] int32; 0 behind a branch's end.
        log_probs: [S, B, P] float32; 0 behind a branch's end.
        lengths: [S, B] int32.
        ended: [S, B] int32, RUNNING, EOS or DELIMITER.
        null_keys: Per layer [S, P - 1, H_kv, K] of the unsteered branch's tokens.
        null_values: Per layer [S, P - 1, H_kv, K].
    """

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    ended: jax.Array
    null_keys: tuple[jax.Array, ...]
    null_values: tuple[jax.Array, ...]


class _ProbeLoop(NamedTuple):
    """Carry of the probe loop; suffixes per layer [S, H_kv, K, B, P] and [S, H_kv, B, P, K].

    Column 0 of a branch's suffix is the steered last token of its row, column n its n-th token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    state: jax.Array
    ended: jax.Array
    hidden: jax.Array
    active: jax.Array
    step: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "first", "drawing", "num_tokens"))
def probe_branches(
    params: Params,
    rows: Rows,
    branches: Branches,
    state: jax.Array,
    drawn: jax.Array,
    row_keys: jax.Array,
    ends: Ends,
    *,
    cfg: DecoderConfig,
    first: int,
    drawing: Drawing,
    num_tokens: int,
) -> Probed:
    """Continues every branch by up to P tokens; the rows stay as they are.

    All branches of a row read its cache together, as one query of B positions: nothing of the
    prefix is copied. What is their own lies in suffixes of P columns.

    Args:
        params: Parameter tree.
        rows: Settled rows.
        branches: What is tried.
        state: [S] int32, of the delimiter's automaton.
        drawn: [S] int32, tokens the rows have drawn.
        row_keys: [S] typed keys.
        ends: What ends a branch.
        cfg: The decoder.
        first: Lowest layer of any tool.
        drawing: How tokens are drawn.
        num_tokens: P >= 1.

    Returns:
        The tokens.
    """
    slots, width = branches.active.shape
    flat = slots * width
    sampling = make_sampling(flat, drawing.temperature, top_p=drawing.top_p)
    keys = jnp.repeat(row_keys, width)
    last = rows.cache.lengths - 1  # [S]
    # Branch 0 steers at a layer no block lies above.
    layer = jnp.pad(branches.layer, ((0, 0), (1, 0)), constant_values=cfg.num_layers)  # [S, B]
    columns = jnp.arange(rows.cache.capacity)
    below, itself = columns < last[:, None], columns == last[:, None]  # [S, M]
    same = jnp.eye(width, dtype=bool)

    suffix_keys, suffix_values, hidden = _steered_suffixes(
        params, rows, branches, cfg=cfg, first=first, num_tokens=num_tokens
    )

    def read(loop: _ProbeLoop, token: jax.Array) -> tuple[jax.Array, list[jax.Array], Any]:
        position = jnp.broadcast_to((last + 1 + loop.step)[:, None], (slots, width))
        rope = blocks.rope_angles(position, cfg.head_dim, cfg.rope_theta, cfg.rope_divisors)
        x = params["embed"]["embedding"][token].astype(cfg.activation_dtype)  # [S, B, D]
        offset = jnp.arange(num_tokens)
        new_keys, new_values = list(loop.keys), list(loop.values)
        for i in range(cfg.num_layers):
            replaced = layer < i  # [S, B], the branch's own last token instead of the row's
            mask = below[:, None] | (itself[:, None] & ~replaced[:, :, None])  # [S, B, M]
            visible = (offset > 0) & (offset <= loop.step + 1)
            visible = visible | ((offset == 0) & replaced[:, :, None])  # [S, B, P]
            private = same[None, :, :, None] & visible[:, :, None]  # [S, B, B, P]

            def attend_fn(
                query: jax.Array,
                own: KeyValue,
                i: int = i,
                mask: jax.Array = mask,
                private: jax.Array = private,
            ) -> tuple[jax.Array, KeyValue]:
                key, value = _put_suffix(loop.keys[i], loop.values[i], own, loop.step + 1)
                suffix = Context(
                    key.reshape(*key.shape[:3], -1),
                    value.reshape(*value.shape[:2], -1, value.shape[-1]),
                    private.reshape(slots, width, -1),
                )
                prefix = Context(rows.cache.keys[i], rows.cache.values[i], mask)
                return blocks.attend(query, prefix, suffix), (key, value)

            x, stored = blocks.pre_norm_layer(params["layers"][i], x, rope, cfg.rms_eps, attend_fn)
            new_keys[i], new_values[i] = stored
        hidden = blocks.rms_norm(x, params["norm_final"]["scale"], cfg.rms_eps)
        return hidden, new_keys, new_values

    def body(loop: _ProbeLoop) -> _ProbeLoop:
        logits = head_logits(params, cfg, loop.hidden.reshape(flat, -1))
        index = jnp.repeat(drawn, width) + loop.step
        token, log_prob = sample(logits, fold_rows(keys, index), sampling)
        next_state, ended = ends.step(token, loop.state.reshape(flat))
        token, log_prob = token.reshape(slots, width), log_prob.reshape(slots, width)
        mine = loop.active
        loop = loop._replace(
            tokens=loop.tokens.at[:, :, loop.step].set(jnp.where(mine, token, 0)),
            log_probs=loop.log_probs.at[:, :, loop.step].set(jnp.where(mine, log_prob, 0.0)),
            lengths=loop.lengths + mine,
            state=jnp.where(mine, next_state.reshape(slots, width), loop.state),
            ended=jnp.where(mine, ended.reshape(slots, width), loop.ended),
        )
        active = mine & (loop.ended == RUNNING) & (loop.step + 1 < num_tokens)

        def read_on(loop: _ProbeLoop) -> _ProbeLoop:
            hidden, keys, values = read(loop, token)
            return loop._replace(hidden=hidden, keys=tuple(keys), values=tuple(values))

        loop = jax.lax.cond(jnp.any(active), read_on, lambda loop: loop, loop)
        return loop._replace(active=active, step=loop.step + 1)

    grid = (slots, width)
    start = _ProbeLoop(
        keys=suffix_keys,
        values=suffix_values,
        tokens=jnp.zeros((*grid, num_tokens), jnp.int32),
        log_probs=jnp.zeros((*grid, num_tokens), jnp.float32),
        lengths=jnp.zeros(grid, jnp.int32),
        state=jnp.broadcast_to(state[:, None], grid),
        ended=jnp.zeros(grid, jnp.int32),
        hidden=hidden,
        active=branches.active,
        step=jnp.zeros((), jnp.int32),
    )
    end: Any = jax.lax.while_loop(lambda loop: jnp.any(loop.active), body, start)
    return Probed(
        end.tokens,
        end.log_probs,
        end.lengths,
        end.ended,
        tuple(key[:, :, :, 0, 1:].transpose(0, 3, 1, 2) for key in end.keys),
        tuple(value[:, :, 0, 1:].transpose(0, 2, 1, 3) for value in end.values),
    )


def _steered_suffixes(
    params: Params,
    rows: Rows,
    branches: Branches,
    *,
    cfg: DecoderConfig,
    first: int,
    num_tokens: int,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]:
    """Suffixes that hold the steered last tokens, and the states [S, B, D] to draw from."""
    slots, width = branches.active.shape
    shape = (slots, cfg.num_kv_heads, cfg.head_dim)
    empty_key = jnp.zeros((*shape, width, num_tokens), cfg.activation_dtype)
    empty_value = jnp.zeros((*shape[:2], width, num_tokens, shape[2]), cfg.activation_dtype)
    keys = [empty_key] * cfg.num_layers
    values = [empty_value] * cfg.num_layers
    hidden = rows.hidden[:, None]
    if width == 1:
        return tuple(keys), tuple(values), hidden
    injected = inject(rows, branches.captured, branches.additions, cfg.activation_dtype)
    steered, kept = redo_last(params, rows, injected, branches.layer, cfg=cfg, first=first)
    for j, i in enumerate(range(first + 1, cfg.num_layers)):
        own = (jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))) for x in kept[j])
        keys[i], values[i] = _put_suffix(empty_key, empty_value, tuple(own), 0)
    return tuple(keys), tuple(values), jnp.concatenate([hidden, steered], axis=1)


def _put_suffix(key: jax.Array, value: jax.Array, own: Any, column: jax.Array | int) -> KeyValue:
    """Suffixes with own keys and values [S, B, H_kv, K] at one column of every branch."""
    own_key = own[0].transpose(0, 2, 3, 1)[..., None].astype(key.dtype)
    own_value = own[1].transpose(0, 2, 1, 3)[:, :, :, None].astype(value.dtype)
    return (
        jax.lax.dynamic_update_slice_in_dim(key, own_key, column, axis=4),
        jax.lax.dynamic_update_slice_in_dim(value, own_value, column, axis=3),
    )


@functools.partial(jax.jit, donate_argnames="cache")
def adopt_null(
    cache: Cache,
    null_keys: tuple[jax.Array, ...],
    null_values: tuple[jax.Array, ...],
    counts: jax.Array,
) -> Cache:
    """Takes the unsteered branches' tokens into the cache.

    Args:
        cache: S slots; donated.
        null_keys, null_values: As in `Probed`.
        counts: [S] int32, how many of the P - 1 columns; 0 = none.

    Returns:
        The cache, longer by the counts.
    """
    offsets = jnp.arange(null_keys[0].shape[1])
    columns = cache.lengths[:, None] + offsets
    columns = jnp.where(offsets < counts[:, None], columns, cache.capacity)
    stored = [
        write_tokens(cache, i, own, columns)
        for i, own in enumerate(zip(null_keys, null_values, strict=True))
    ]
    return Cache(
        keys=tuple(key for key, _ in stored),
        values=tuple(value for _, value in stored),
        lengths=cache.lengths + counts,
    )
