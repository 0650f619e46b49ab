"""One decoder-only language model for Llama, Qwen2/2.5 and Qwen3: pure functions over parameters.

Parameters are the tree

    embed/embedding [V, D]   layers/(0..n-1)   norm_final/scale [D]   head/kernel [D, V] (free head)

with layers as in `common.lm.layers`, one dict each in a tuple. Three passes share one block:
`forward` reads whole sequences, `prefill` does so and fills cache slots, `extend` continues
cached sequences by a few tokens (`decode_step`: by one).

Layers are counted from 0. The hidden state h[l, t] is the residual stream after block l at
position t, before the final norm; a steering vector is added to it there, so it acts on the blocks
above l and, through their keys and values, on every later token.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.lm import layers as blocks
from common.lm.cache import Cache, write_prompts, write_tokens
from common.lm.config import DecoderConfig
from common.lm.layers import Context, KeyValue, Params, Rope
from common.torch_bridge import unflatten


class Steering(NamedTuple):
    """One addition to the residual stream per row: h[layer, position] += strength * vector.

    Attributes:
        layer: [B] int32; -1 leaves the row alone.
        position: [B] int32, position in the sequence; acts in the pass that reads this token.
        vector: [B, D] float.
        strength: [B] float32.
    """

    layer: jax.Array
    position: jax.Array
    vector: jax.Array
    strength: jax.Array


class Capture(NamedTuple):
    """Which hidden states to hand out.

    Attributes:
        layers: [LQ] int32, distinct; a number outside 0..n-1 gives zeros.
        positions: [B, P] int32, positions in the sequence; one that this pass does not read gives
            zeros.
    """

    layers: jax.Array
    positions: jax.Array


class Forward(NamedTuple):
    """Result of a pass over whole sequences.

    Attributes:
        hidden: [B, T, D] after the final norm; `head_logits` makes logits of it.
        key_values: Per layer rotated keys and values, each [B, T, H_kv, K].
        captured: [LQ, B, P, D] float32 hidden states, None without a Capture.
    """

    hidden: jax.Array
    key_values: tuple[KeyValue, ...]
    captured: jax.Array | None


class Extended(NamedTuple):
    """Result of a pass that continues cached sequences.

    Attributes:
        hidden: [B, T, D] after the final norm.
        cache: With the new tokens.
        captured: [LQ, B, P, D] float32 hidden states, None without a Capture.
    """

    hidden: jax.Array
    cache: Cache
    captured: jax.Array | None


class Prefilled(NamedTuple):
    """Result of reading prompts into slots.

    Attributes:
        logits: [R, V] float32 at each prompt's last token.
        cache: With the prompts.
        captured: [LQ, R, P, D] float32 hidden states, None without a Capture.
    """

    logits: jax.Array
    cache: Cache
    captured: jax.Array | None


# ------------------------------------------------------------------------------------ parameters
def param_shapes(cfg: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path `a/b/c`."""
    d, k, inner = cfg.hidden_size, cfg.head_dim, cfg.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"embed/embedding": (cfg.vocab_size, d)}
    for i in range(cfg.num_layers):
        at = f"layers/{i}"
        shapes[f"{at}/norm_attn/scale"] = (d,)
        for name, heads in (("q", cfg.num_heads), ("k", cfg.num_kv_heads), ("v", cfg.num_kv_heads)):
            shapes[f"{at}/attn/{name}/kernel"] = (d, heads, k)
            if cfg.qkv_bias:
                shapes[f"{at}/attn/{name}/bias"] = (heads, k)
        shapes[f"{at}/attn/o/kernel"] = (cfg.num_heads, k, d)
        if cfg.qk_norm:
            shapes[f"{at}/attn/q_norm/scale"] = (k,)
            shapes[f"{at}/attn/k_norm/scale"] = (k,)
        shapes[f"{at}/norm_mlp/scale"] = (d,)
        shapes[f"{at}/mlp/gate/kernel"] = (d, inner)
        shapes[f"{at}/mlp/up/kernel"] = (d, inner)
        shapes[f"{at}/mlp/down/kernel"] = (inner, d)
    shapes["norm_final/scale"] = (d,)
    if not cfg.tie_embeddings:
        shapes["head/kernel"] = (d, cfg.vocab_size)
    return shapes


def build_params(by_path: dict[str, Any]) -> dict[str, Any]:
    """Parameter tree (layers as a tuple) from parameters by path."""
    tree = unflatten(by_path)
    tree["layers"] = tuple(tree["layers"][str(i)] for i in range(len(tree["layers"])))
    return tree


def params_by_path(params: Params) -> dict[str, Any]:
    """Inverse of `build_params`."""
    flat: dict[str, Any] = {}

    def visit(node: Any, prefix: str) -> None:
        if isinstance(node, tuple):
            node = {str(i): part for i, part in enumerate(node)}
        if not isinstance(node, dict):
            flat[prefix] = node
            return
        for key, part in node.items():
            visit(part, f"{prefix}/{key}" if prefix else key)

    visit(dict(params), "")
    return flat


def init_params(key: jax.Array, cfg: DecoderConfig, stddev: float = 0.02) -> dict[str, Any]:
    """Random parameters: normal matrices, unit scales, zero biases, in cfg.dtype."""
    shapes = param_shapes(cfg)
    by_path = {}
    for path, part in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        if path.endswith("/scale"):
            value = jnp.ones(shapes[path])
        elif path.endswith("/bias"):
            value = jnp.zeros(shapes[path])
        else:
            value = stddev * jax.random.normal(part, shapes[path])
        by_path[path] = value.astype(cfg.activation_dtype)
    return build_params(by_path)


# ---------------------------------------------------------------------------------------- passes
def forward(
    params: Params,
    cfg: DecoderConfig,
    token_ids: jax.Array,
    *,
    steering: Steering | None = None,
    capture: Capture | None = None,
    attn_impl: str = "auto",
) -> Forward:
    """Reads whole sequences, each from position 0 on.

    Args:
        params: Parameter tree.
        cfg: The decoder.
        token_ids: [B, T] int32. Shorter rows are padded on the right with any id: attention is
            causal, so padding reaches no real token.
        steering: Additions to the residual stream.
        capture: Hidden states to hand out.
        attn_impl: Kernel of `layers.attention`.

    Returns:
        Hidden states, keys and values, captured states.
    """
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)

    def attend_fn(layer: int, query: jax.Array, own: KeyValue) -> tuple[jax.Array, KeyValue]:
        return blocks.attention(query, *own, None, attn_impl, causal=True), own

    hidden, own, captured = _run(params, cfg, token_ids, positions, attend_fn, steering, capture)
    return Forward(hidden, own, captured)


def extend(
    params: Params,
    cfg: DecoderConfig,
    cache: Cache,
    token_ids: jax.Array,
    num_new: jax.Array,
    *,
    steering: Steering | None = None,
    capture: Capture | None = None,
) -> Extended:
    """Continues every slot's sequence by up to T tokens.

    Args:
        params: Parameter tree.
        cfg: The decoder.
        cache: S slots; row b's first new token has position cache.lengths[b].
        token_ids: [S, T] int32, left-aligned.
        num_new: [S] int32, how many of the T are real; 0 leaves the slot as it is. The caller
            sees to it that lengths + num_new stays within the capacity.
        steering: Additions to the residual stream.
        capture: Hidden states to hand out.

    Returns:
        Hidden states (meaningless beyond num_new), the extended cache, captured states.
    """
    offsets = jnp.arange(token_ids.shape[1], dtype=jnp.int32)
    positions = cache.lengths[:, None] + offsets  # [S, T]
    real = offsets < num_new[:, None]
    columns = jnp.where(real, positions, cache.capacity)  # out of range: not written
    # Written before it is read, so a token's own column is part of what it sees.
    mask = jnp.arange(cache.capacity) <= positions[:, :, None]  # [S, T, M]

    def attend_fn(layer: int, query: jax.Array, own: KeyValue) -> tuple[jax.Array, KeyValue]:
        key, value = write_tokens(cache, layer, own, columns)
        return blocks.attend(query, Context(key, value, mask)), (key, value)

    hidden, stored, captured = _run(params, cfg, token_ids, positions, attend_fn, steering, capture)
    grown = Cache(
        keys=tuple(key for key, _ in stored),
        values=tuple(value for _, value in stored),
        lengths=cache.lengths + num_new,
    )
    return Extended(hidden, grown, captured)


def prefill(
    params: Params,
    cfg: DecoderConfig,
    cache: Cache,
    token_ids: jax.Array,
    lengths: jax.Array,
    slots: jax.Array,
    *,
    steering: Steering | None = None,
    capture: Capture | None = None,
    attn_impl: str = "auto",
) -> Prefilled:
    """Reads R prompts into slots, whatever these held before; the other slots stay untouched.

    Args:
        params: Parameter tree.
        cfg: The decoder.
        cache: S slots of capacity M >= P.
        token_ids: [R, P] int32, padded on the right with any id.
        lengths: [R] int32, tokens of each prompt, 1..P.
        slots: [R] int32, distinct slots; one outside 0..S-1 drops its row (how a batch is filled
            up to a fixed R).
        steering: Additions to the residual stream; rows are the R prompts.
        capture: Hidden states to hand out; rows are the R prompts.
        attn_impl: Kernel of `layers.attention`.

    Returns:
        Logits of each prompt's next token, the cache, captured states.
    """
    slots = jnp.where(slots < 0, cache.slots, slots)  # negative indices would count from the end
    read = forward(params, cfg, token_ids, steering=steering, capture=capture, attn_impl=attn_impl)
    stored = [write_prompts(cache, i, own, slots) for i, own in enumerate(read.key_values)]
    filled = Cache(
        keys=tuple(key for key, _ in stored),
        values=tuple(value for _, value in stored),
        lengths=cache.lengths.at[slots].set(lengths, mode="drop"),
    )
    last = jnp.take_along_axis(read.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [R, D]
    return Prefilled(head_logits(params, cfg, last), filled, read.captured)


def decode_step(
    params: Params,
    cfg: DecoderConfig,
    cache: Cache,
    token_ids: jax.Array,
    active: jax.Array,
    *,
    steering: Steering | None = None,
) -> tuple[jax.Array, Cache]:
    """Reads one token per slot and predicts the next.

    Args:
        params: Parameter tree.
        cfg: The decoder.
        cache: S slots.
        token_ids: [S] int32.
        active: [S] bool; an inactive slot's cache stays as it is and its logits mean nothing.
        steering: Additions to the residual stream.

    Returns:
        Logits [S, V] float32, and the cache one token longer in the active slots.
    """
    step = extend(
        params, cfg, cache, token_ids[:, None], active.astype(jnp.int32), steering=steering
    )
    return head_logits(params, cfg, step.hidden[:, 0]), step.cache


def head_logits(params: Params, cfg: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Logits [..., V], accumulated and kept in float32, of normed hidden states [..., D]."""
    kernel = params["embed"]["embedding"].T if cfg.tie_embeddings else params["head"]["kernel"]
    return blocks.dense(hidden, kernel, round_to=jnp.float32)


def _run(
    params: Params,
    cfg: DecoderConfig,
    token_ids: jax.Array,
    positions: jax.Array,
    attend_fn: Any,
    steering: Steering | None,
    capture: Capture | None,
) -> tuple[jax.Array, tuple[KeyValue, ...], jax.Array | None]:
    """The stack: embedding, blocks, final norm.

    Args:
        params: Parameter tree.
        cfg: The decoder.
        token_ids: [B, T] int32.
        positions: [B, T] int32.
        attend_fn: (layer, query, own keys and values) -> (attention output, what to keep).
        steering: Additions, or None.
        capture: What to hand out, or None.

    Returns:
        Normed hidden states [B, T, D], what attend_fn kept per layer, captured states.
    """
    x = params["embed"]["embedding"][token_ids].astype(cfg.activation_dtype)
    rope: Rope = blocks.rope_angles(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_divisors)
    kept = []
    captured = None if capture is None else _no_states(capture, cfg)
    for i, layer in enumerate(params["layers"]):
        x, extra = blocks.pre_norm_layer(
            layer, x, rope, cfg.rms_eps, functools.partial(attend_fn, i)
        )
        kept.append(extra)
        if steering is not None:
            x = _steer(x, i, positions, steering)
        if capture is not None and captured is not None:
            captured = _store_states(captured, x, i, positions, capture)
    hidden = blocks.rms_norm(x, params["norm_final"]["scale"], cfg.rms_eps)
    if captured is not None:
        captured = captured[:-1]
    return hidden, tuple(kept), captured


def _steer(x: jax.Array, layer: int, positions: jax.Array, steering: Steering) -> jax.Array:
    """x [B, T, D] after block `layer`, with the rows' vectors added at their positions."""
    here = (positions == steering.position[:, None]) & (steering.layer == layer)[:, None]  # [B, T]
    # Selected, not multiplied by 0 or 1: an unused vector may hold anything.
    added = (steering.strength[:, None] * steering.vector.astype(jnp.float32)).astype(x.dtype)
    return jnp.where(here[:, :, None], x + added[:, None], x)


def _no_states(capture: Capture, cfg: DecoderConfig) -> jax.Array:
    """Zeros [LQ + 1, B, P, D]; the last row collects the layers nobody asked for."""
    count = capture.layers.shape[0] + 1
    return jnp.zeros((count, *capture.positions.shape, cfg.hidden_size), jnp.float32)


def _store_states(
    captured: jax.Array, x: jax.Array, layer: int, positions: jax.Array, capture: Capture
) -> jax.Array:
    """`captured` with x [B, T, D] after block `layer` at the asked positions."""
    column = capture.positions - positions[:, :1]  # [B, P], index into T
    inside = (column >= 0) & (column < x.shape[1])
    index = jnp.clip(column, 0, x.shape[1] - 1)[:, :, None]
    states = jnp.take_along_axis(x, index, axis=1).astype(jnp.float32)  # [B, P, D]
    states = jnp.where(inside[:, :, None], states, 0.0)
    asked = capture.layers == layer
    row = jnp.where(jnp.any(asked), jnp.argmax(asked), capture.layers.shape[0])
    return jax.lax.dynamic_update_index_in_dim(captured, states, row, axis=0)
