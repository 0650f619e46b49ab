"""What the JAX engine keeps on the device for S rows, and the passes that read given tokens.

A row is *settled* when its last token has been read without steering: its final hidden state gives
the next token's logits, its residual stream at the asked layers is the query, and steering starts
from it, so that only the blocks above a tool's layer are run again. Reading the last token is put
off until one of these is needed.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from common.lm import layers as blocks
from common.lm.cache import Cache, empty_cache, resize, write_prompts, write_tokens
from common.lm.config import DecoderConfig
from common.lm.decoder import Capture, extend, forward
from common.lm.layers import Context, KeyValue, Params


@flax.struct.dataclass
class Rows:
    """S rows on the device.

    Attributes:
        cache: Keys and values of every token that has been read.
        hidden: [S, D] final normed state of the last token read; meaningful in settled rows.
        residuals: [LC, S, D] float32, residual stream of that token behind the captured layers.
        prompt_hidden: [S, D] as `hidden`, of the prompt's last token.
        prompt_residuals: [LC, S, D] as `residuals`, of the prompt's last token.
    """

    cache: Cache
    hidden: jax.Array
    residuals: jax.Array
    prompt_hidden: jax.Array
    prompt_residuals: jax.Array


class Columns(NamedTuple):
    """One position's keys and values in the blocks above some layer.

    Attributes:
        keys: Per block [S, H_kv, K].
        values: Per block [S, H_kv, K].
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def empty_rows(cfg: DecoderConfig, slots: int, capacity: int, num_captured: int) -> Rows:
    """Rows without tokens."""
    hidden = jnp.zeros((slots, cfg.hidden_size), cfg.activation_dtype)
    residuals = jnp.zeros((num_captured, slots, cfg.hidden_size), jnp.float32)
    # Buffers are donated one by one, so no two fields may share one.
    return Rows(
        empty_cache(cfg, slots, capacity), hidden, residuals, hidden.copy(), residuals.copy()
    )


@functools.partial(jax.jit, static_argnames="capacity")
def grow_cache(cache: Cache, *, capacity: int) -> Cache:
    """The same sequences with room for more tokens."""
    return resize(cache, capacity)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="rows")
def read_prompts(
    params: Params,
    rows: Rows,
    token_ids: jax.Array,
    lengths: jax.Array,
    slots: jax.Array,
    layers: jax.Array,
    *,
    cfg: DecoderConfig,
) -> Rows:
    """Reads R prompts into slots, whose rows are settled then.

    Args:
        params: Parameter tree.
        rows: The rows; donated.
        token_ids: [R, P] int32, padded on the right.
        lengths: [R] int32.
        slots: [R] int32, distinct; one outside 0..S-1 drops its prompt.
        layers: [LC] int32, the captured layers.
        cfg: The decoder.

    Returns:
        The rows.
    """
    slots = jnp.where(slots < 0, rows.cache.slots, slots)
    last = (lengths - 1)[:, None]  # [R, 1]
    read = forward(params, cfg, token_ids, capture=Capture(layers, last))
    stored = [write_prompts(rows.cache, i, own, slots) for i, own in enumerate(read.key_values)]
    cache = Cache(
        keys=tuple(key for key, _ in stored),
        values=tuple(value for _, value in stored),
        lengths=rows.cache.lengths.at[slots].set(lengths, mode="drop"),
    )
    hidden = jnp.take_along_axis(read.hidden, last[:, :, None], axis=1)[:, 0]  # [R, D]
    assert read.captured is not None
    states = read.captured[:, :, 0]  # [LC, R, D]
    return Rows(
        cache=cache,
        hidden=rows.hidden.at[slots].set(hidden, mode="drop"),
        residuals=rows.residuals.at[:, slots].set(states, mode="drop"),
        prompt_hidden=rows.prompt_hidden.at[slots].set(hidden, mode="drop"),
        prompt_residuals=rows.prompt_residuals.at[:, slots].set(states, mode="drop"),
    )


@functools.partial(jax.jit, donate_argnames="rows")
def copy_prompts(rows: Rows, sources: jax.Array, targets: jax.Array, lengths: jax.Array) -> Rows:
    """Starts rows with the prompts of other slots, without reading them again.

    Args:
        rows: The rows; donated. A source may have gone on since: its prompt's columns stay.
        sources: [R] int32.
        targets: [R] int32, distinct; one outside 0..S-1 does nothing.
        lengths: [R] int32, of the prompts.

    Returns:
        The rows.
    """
    targets = jnp.where(targets < 0, rows.cache.slots, targets)

    def move(x: jax.Array, origin: jax.Array | None = None) -> jax.Array:
        return x.at[targets].set((x if origin is None else origin)[sources], mode="drop")

    cache = Cache(
        keys=tuple(move(x) for x in rows.cache.keys),
        values=tuple(move(x) for x in rows.cache.values),
        lengths=rows.cache.lengths.at[targets].set(lengths, mode="drop"),
    )
    over_layers = jax.vmap(move)
    return Rows(
        cache=cache,
        hidden=move(rows.hidden, rows.prompt_hidden),
        residuals=over_layers(rows.residuals, rows.prompt_residuals),
        prompt_hidden=move(rows.prompt_hidden),
        prompt_residuals=over_layers(rows.prompt_residuals),
    )


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="rows")
def read_pending(
    params: Params,
    rows: Rows,
    token: jax.Array,
    active: jax.Array,
    layers: jax.Array,
    *,
    cfg: DecoderConfig,
) -> Rows:
    """Settles rows that have one unread token.

    Args:
        params: Parameter tree.
        rows: The rows; donated.
        token: [S] int32.
        active: [S] bool.
        layers: [LC] int32.
        cfg: The decoder.

    Returns:
        The rows.
    """
    capture = Capture(layers, rows.cache.lengths[:, None])
    count = active.astype(jnp.int32)
    read = extend(params, cfg, rows.cache, token[:, None], count, capture=capture)
    assert read.captured is not None
    return dataclasses.replace(
        rows,
        cache=read.cache,
        hidden=jnp.where(active[:, None], read.hidden[:, 0], rows.hidden),
        residuals=jnp.where(active[:, None], read.captured[:, :, 0], rows.residuals),
    )


@functools.partial(jax.jit, static_argnames=("cfg", "first", "num_tokens"), donate_argnames="cache")
def reread(
    params: Params,
    cache: Cache,
    trail: jax.Array,
    counts: jax.Array,
    slots: jax.Array,
    anchors: jax.Array,
    clean: Columns,
    *,
    cfg: DecoderConfig,
    first: int,
    num_tokens: int,
) -> Cache:
    """Overwrites the trace of steered segments, in one pass over them.

    A tool acts on the blocks above its layer only. Up to the lowest layer of any tool, what the
    steered segment computed is what an unsteered one would: only the blocks above are run again,
    from the residual stream that was kept.

    Args:
        params: Parameter tree.
        cache: S slots; donated.
        trail: [S, W, D], residual stream behind layer `first` of the segments' tokens.
        counts: [R] int32, tokens to overwrite; 0 = the steered column alone.
        slots: [R] int32, distinct; one outside 0..S-1 is left out.
        anchors: [R] int32, the steered positions; the segments begin behind them.
        clean: The unsteered columns of these positions, as `steer` returned them for S rows.
        cfg: The decoder.
        first: Lowest layer of any tool.
        num_tokens: T <= W, at least the largest count.

    Returns:
        The cache, as long as before.
    """
    targets = jnp.where(slots < 0, cache.slots, slots)
    origins = jnp.clip(slots, 0, cache.slots - 1)
    index = jnp.arange(slots.shape[0])
    offsets = jnp.arange(num_tokens)
    positions = anchors[:, None] + 1 + offsets  # [R, T]
    columns = jnp.where(offsets < counts[:, None], positions, cache.capacity)
    mask = jnp.arange(cache.capacity) <= positions[:, :, None]  # [R, T, M]
    rope = blocks.rope_angles(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_divisors)
    x = trail[origins, :num_tokens]
    keys, values = list(cache.keys), list(cache.values)
    for j, i in enumerate(range(first + 1, cfg.num_layers)):
        key = keys[i][origins].at[index, :, :, anchors].set(clean.keys[j][origins])
        value = values[i][origins].at[index, :, anchors].set(clean.values[j][origins])

        def attend_fn(
            query: jax.Array, own: KeyValue, key: jax.Array = key, value: jax.Array = value
        ) -> tuple[jax.Array, KeyValue]:
            part = Cache((key,), (value,), anchors)
            written = write_tokens(part, 0, own, columns)
            return blocks.attend(query, Context(*written, mask)), written

        x, stored = blocks.pre_norm_layer(params["layers"][i], x, rope, cfg.rms_eps, attend_fn)
        keys[i] = keys[i].at[targets].set(stored[0], mode="drop")
        values[i] = values[i].at[targets].set(stored[1], mode="drop")
    return Cache(tuple(keys), tuple(values), cache.lengths)


def redo_last(
    params: Params,
    rows: Rows,
    injected: jax.Array,
    layer: jax.Array,
    *,
    cfg: DecoderConfig,
    first: int,
) -> tuple[jax.Array, list[KeyValue]]:
    """Runs the blocks above each branch's layer again for the last token of settled rows.

    Args:
        params: Parameter tree.
        rows: Settled rows.
        injected: [S, B, D], the residual stream to go on with.
        layer: [S, B] int32 >= first, the layer it belongs behind.
        cfg: The decoder.
        first: Lowest layer of any branch.

    Returns:
        Final normed states [S, B, D] and, for the blocks from first + 1 on, the branches' keys and
        values [S, B, H_kv, K]; in blocks up to a branch's layer they mean nothing.
    """
    branches = layer.shape[1]
    last = (rows.cache.lengths - 1)[:, None]  # [S, 1]
    positions = jnp.broadcast_to(last, layer.shape)
    rope = blocks.rope_angles(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_divisors)
    before = (jnp.arange(rows.cache.capacity) < last)[:, None]  # [S, 1, M]
    itself = jnp.eye(branches, dtype=bool)[None]
    x, kept = injected, []
    for i in range(first + 1, cfg.num_layers):
        x = jnp.where((layer == i - 1)[:, :, None], injected, x)

        def attend_fn(query: jax.Array, own: KeyValue, i: int = i) -> tuple[jax.Array, KeyValue]:
            prefix = Context(rows.cache.keys[i], rows.cache.values[i], before)
            return blocks.attend(query, prefix, Context(*blocks.cache_layout(*own), itself)), own

        x, own = blocks.pre_norm_layer(params["layers"][i], x, rope, cfg.rms_eps, attend_fn)
        kept.append(own)
    x = jnp.where((layer == cfg.num_layers - 1)[:, :, None], injected, x)
    return blocks.rms_norm(x, params["norm_final"]["scale"], cfg.rms_eps), kept


def inject(rows: Rows, captured: jax.Array, additions: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Residual streams [S, B, D] of the last tokens plus vectors, as steering adds them.

    Args:
        rows: Settled rows.
        captured: [S, B] int32, index of each branch's layer among the captured ones.
        additions: [S, B, D] float32, strength * vector.
        dtype: Of the activations.
    """
    index = jnp.arange(captured.shape[0])[:, None]
    residual = rows.residuals[captured, index]  # [S, B, D]
    return residual.astype(dtype) + additions.astype(dtype)


@functools.partial(jax.jit, static_argnames=("cfg", "first"), donate_argnames=("rows", "clean"))
def steer(
    params: Params,
    rows: Rows,
    clean: Columns,
    captured: jax.Array,
    layer: jax.Array,
    additions: jax.Array,
    active: jax.Array,
    *,
    cfg: DecoderConfig,
    first: int,
) -> tuple[Rows, Columns, jax.Array]:
    """Puts a tool's trace into the cache column of the last token.

    Args:
        params: Parameter tree.
        rows: Settled rows (the active ones); donated.
        clean: Columns saved before; donated.
        captured: [S] int32, index of the tool's layer among the captured ones.
        layer: [S] int32, the tool's layer; >= first.
        additions: [S, D] float32.
        active: [S] bool.
        cfg: The decoder.
        first: Lowest layer of any tool.

    Returns:
        The rows, the saved columns with the active rows' present ones, and the states [S, D] the
        next token comes from (`rows.hidden` where not active).
    """
    injected = inject(rows, captured[:, None], additions[:, None], cfg.activation_dtype)
    hidden, kept = redo_last(params, rows, injected, layer[:, None], cfg=cfg, first=first)
    cache, last = rows.cache, rows.cache.lengths - 1
    index = jnp.arange(cache.slots)
    keys, values = list(cache.keys), list(cache.values)
    saved_keys, saved_values = [], []
    for j, i in enumerate(range(first + 1, cfg.num_layers)):
        at = jnp.clip(last, 0, cache.capacity - 1)
        mine = active[:, None, None]
        saved_keys.append(jnp.where(mine, keys[i][index, :, :, at], clean.keys[j]))
        saved_values.append(jnp.where(mine, values[i][index, :, at], clean.values[j]))
        columns = jnp.where(active & (layer < i), last, cache.capacity)[:, None]
        keys[i], values[i] = write_tokens(cache, i, kept[j], columns)
    steered = dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))
    return (
        dataclasses.replace(rows, cache=steered),
        Columns(tuple(saved_keys), tuple(saved_values)),
        jnp.where(active[:, None], hidden[:, 0], rows.hidden),
    )


def empty_columns(cfg: DecoderConfig, slots: int, first: int) -> Columns:
    """Saved columns before anything was steered."""
    shape = (slots, cfg.num_kv_heads, cfg.head_dim)
    count = range(first + 1, cfg.num_layers)
    return Columns(
        tuple(jnp.zeros(shape, cfg.activation_dtype) for _ in count),
        tuple(jnp.zeros(shape, cfg.activation_dtype) for _ in count),
    )
