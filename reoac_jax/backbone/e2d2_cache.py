"""E2D2 with exact key/value caches: weights and caches laid out for decoding block by block.

The maths is that of `reoac_jax.backbone.e2d2`; the layout differs. Layers are separate (slicing a
stacked array inside a loop copies the layer's weights each time), projections of one input are one
matrix, and cached keys lie as [B, H_kv, K, C], so that no step transposes or concatenates a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.lm import layers
from common.lm.layers import Params, Rope
from reoac_jax.backbone import few_rows
from reoac_jax.backbone.e2d2 import E2D2Config, rope_of
from reoac_jax.sampling import best_of_rows, summarise_scores

_PARTS = 4  # sizes of the head's input


class LayerWeights(NamedTuple):
    """One layer; matrices are [inputs, outputs] in the activation dtype."""

    norm_attn: jax.Array  # [D]
    query: jax.Array  # [D, H*K]
    key_value: jax.Array  # [D, 2*H_kv*K], keys first
    query_bias: jax.Array | None  # [H*K]
    key_value_bias: jax.Array | None  # [2*H_kv*K]
    query_norm: jax.Array | None  # [K]
    key_norm: jax.Array | None  # [K]
    output: jax.Array  # [H*K, D]
    norm_mlp: jax.Array  # [D]
    gate_up: jax.Array  # [D, 2*I], gate first
    down: jax.Array  # [I, D]


class DecodeWeights(NamedTuple):
    """A network laid out for decoding; made once by `decode_weights`."""

    embedding: jax.Array  # [V, D]
    head: jax.Array | None  # [D, V], None = the embedding
    encoder: tuple[LayerWeights, ...]
    encoder_norm: jax.Array  # [D]
    decoder: tuple[LayerWeights, ...]
    decoder_norm: jax.Array  # [D]


class LayerCache(NamedTuple):
    """Rotated keys [B, H_kv, K, C] and values [B, H_kv, C, K] of one layer's context."""

    key: jax.Array
    value: jax.Array


class Caches(NamedTuple):
    """Context of the encoder's own layers and of the decoder ("shared KV": the same, so empty)."""

    encoder: tuple[LayerCache, ...]
    decoder: tuple[LayerCache, ...]


def encoder_depth(cfg: E2D2Config) -> int:
    """Encoder layers that matter: with shared keys and values nothing reads what lies above."""
    return max(cfg.kv_layers) + 1 if cfg.share_kv else cfg.num_encoder_layers


def decode_weights(params: Params, cfg: E2D2Config) -> DecodeWeights:
    """Copies a parameter tree into the layout for decoding.

    Args:
        params: Parameter tree of `e2d2.init_params`.
        cfg: The network.

    Returns:
        The weights in the activation dtype; pass them instead of `params` when decoding often.
    """
    dtype = cfg.activation_dtype

    def matrix(*kernels: jax.Array, inputs: int = 1) -> jax.Array:
        flat = []
        for kernel in kernels:
            rows = 1
            for size in kernel.shape[:inputs]:
                rows *= size
            flat.append(jnp.asarray(kernel).reshape(rows, -1))
        return jnp.concatenate(flat, axis=1).astype(dtype)

    def bias(*maps: Params) -> jax.Array | None:
        if not cfg.qkv_bias:
            return None
        return jnp.concatenate([jnp.asarray(m["bias"]).reshape(-1) for m in maps]).astype(dtype)

    def split(stack: Params, count: int) -> tuple[LayerWeights, ...]:
        result = []
        total = stack["norm_attn"]["scale"].shape[0]
        for i in range(total - count, total):
            layer: Any = jax.tree.map(lambda x, i=i: x[i], stack)
            attn, mlp = layer["attn"], layer["mlp"]
            result.append(
                LayerWeights(
                    norm_attn=jnp.asarray(layer["norm_attn"]["scale"]),
                    query=matrix(attn["q"]["kernel"]),
                    key_value=matrix(attn["k"]["kernel"], attn["v"]["kernel"]),
                    query_bias=bias(attn["q"]),
                    key_value_bias=bias(attn["k"], attn["v"]),
                    query_norm=jnp.asarray(attn["q_norm"]["scale"]) if cfg.qk_norm else None,
                    key_norm=jnp.asarray(attn["k_norm"]["scale"]) if cfg.qk_norm else None,
                    output=matrix(attn["o"]["kernel"], inputs=2),
                    norm_mlp=jnp.asarray(layer["norm_mlp"]["scale"]),
                    gate_up=matrix(mlp["gate"]["kernel"], mlp["up"]["kernel"]),
                    down=matrix(mlp["down"]["kernel"]),
                )
            )
        return tuple(result)

    encoder = split(params["encoder"]["layers"], cfg.num_encoder_layers)
    encoder_norm = jnp.asarray(params["encoder"]["norm_final"]["scale"])
    if cfg.tie_encoder_decoder:
        decoder, decoder_norm = encoder[-cfg.num_decoder_layers :], encoder_norm
    else:
        decoder = split(params["decoder"]["layers"], cfg.num_decoder_layers)
        decoder_norm = jnp.asarray(params["decoder"]["norm_final"]["scale"])
    embedding = jnp.asarray(params["embed"]["embedding"]).astype(dtype)
    head = None if cfg.tie_head else matrix(params["head"]["kernel"])
    if head is None and dtype.itemsize < 4 and jax.default_backend() == "cpu":
        # CPUs have no 16-bit routine for a transposed matrix: without this copy the head would
        # take ten times as long.
        head = jax.lax.optimization_barrier(embedding.T)
    return DecodeWeights(
        embedding=embedding,
        head=head,
        encoder=encoder[: encoder_depth(cfg)],
        encoder_norm=encoder_norm,
        decoder=decoder,
        decoder_norm=decoder_norm,
    )


# ---------------------------------------------------------------------------------------- layers
def _linear(x: jax.Array, matrix: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = layers.dense(x, matrix, round_to=layers.between_products(x.dtype))
    return y if bias is None else y + bias


def _key_value(weights: LayerWeights, cfg: E2D2Config, u: jax.Array, rope: Rope) -> LayerCache:
    """Keys and values of the normalised input u [B, T, D] in cache layout."""
    both = _linear(u, weights.key_value, weights.key_value_bias)
    both = both.reshape(*u.shape[:2], 2, cfg.num_kv_heads, cfg.head_dim)  # [B, T, 2, H_kv, K]
    key = both[:, :, 0]
    if weights.key_norm is not None:
        key = layers.rms_norm(key, weights.key_norm, cfg.rms_eps)
    key = layers.apply_rope(key, rope).astype(u.dtype)
    return LayerCache(*layers.cache_layout(key, both[:, :, 1].astype(u.dtype)))


def _attend(
    query: jax.Array,
    own: LayerCache,
    own_mask: jax.Array | None,
    context: LayerCache | None,
    context_mask: jax.Array | None,
) -> jax.Array:
    """Attention of query [B, T, H, K] over cached context and the tokens themselves.

    Args:
        query: Rotated queries.
        own: Keys and values of the same T tokens.
        own_mask: bool, broadcastable to [B, T, T], or None = everything.
        context: Cache, or None.
        context_mask: bool [B, C], True = filled.

    Returns:
        [B, T, H*K].
    """
    contexts = [layers.Context(own.key, own.value, own_mask)]
    if context is not None and context_mask is not None:
        contexts.insert(0, layers.Context(context.key, context.value, context_mask[:, None]))
    return layers.attend(query, *contexts).reshape(*query.shape[:2], -1)


def _layer(
    weights: LayerWeights,
    cfg: E2D2Config,
    x: jax.Array,
    rope: Rope,
    own_mask: jax.Array | None,
    context: LayerCache | None,
    context_mask: jax.Array | None,
) -> tuple[jax.Array, LayerCache]:
    """One layer on x [B, T, D]; also returns its own keys and values."""
    u = layers.rms_norm(x, weights.norm_attn, cfg.rms_eps)
    query = _linear(u, weights.query, weights.query_bias)
    query = query.reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)
    if weights.query_norm is not None:
        query = layers.rms_norm(query, weights.query_norm, cfg.rms_eps)
    query = layers.apply_rope(query, rope).astype(x.dtype)
    own = _key_value(weights, cfg, u, rope)
    x = x + layers.dense(_attend(query, own, own_mask, context, context_mask), weights.output)
    u = layers.rms_norm(x, weights.norm_mlp, cfg.rms_eps)
    gate, up = jnp.split(_linear(u, weights.gate_up, None), 2, axis=-1)
    return x + layers.dense((jax.nn.silu(gate) * up).astype(x.dtype), weights.down), own


# ---------------------------------------------------------------------------------- the network
def empty_caches(cfg: E2D2Config, batch: int, capacity: int) -> Caches:
    """Zeroed caches for C = capacity context tokens per row."""
    dtype, heads, size = cfg.activation_dtype, cfg.num_kv_heads, cfg.head_dim

    def cache() -> LayerCache:
        return LayerCache(
            jnp.zeros((batch, heads, size, capacity), dtype),
            jnp.zeros((batch, heads, capacity, size), dtype),
        )

    count = 0 if cfg.share_kv else cfg.num_decoder_layers
    encoder = tuple(cache() for _ in range(encoder_depth(cfg)))
    return Caches(encoder, tuple(cache() for _ in range(count)))


def _write(
    cache: LayerCache, new: LayerCache, start: jax.Array | int, rows: jax.Array | None
) -> LayerCache:
    """Puts T tokens into a cache: at column `start`, or where each of `rows` [R] starts [R]."""
    if rows is None:
        key = jax.lax.dynamic_update_slice_in_dim(cache.key, new.key, start, axis=3)
        value = jax.lax.dynamic_update_slice_in_dim(cache.value, new.value, start, axis=2)
        return LayerCache(key, value)
    columns = jnp.asarray(start)[:, None] + jnp.arange(new.key.shape[3])  # [R, T]
    key = cache.key.at[rows[:, None], :, :, columns].set(new.key.transpose(0, 3, 1, 2))
    value = cache.value.at[rows[:, None], :, columns].set(new.value.transpose(0, 2, 1, 3))
    return LayerCache(key, value)


def commit(
    weights: DecodeWeights,
    cfg: E2D2Config,
    ids: jax.Array,
    positions: jax.Array,
    caches: Caches,
    start: jax.Array | int,
    own_mask: jax.Array | None,
    context_mask: jax.Array | None,
    rows: jax.Array | None = None,
) -> tuple[Caches, jax.Array]:
    """Encodes finished tokens and appends what later blocks need of them.

    Args:
        weights: From `decode_weights`.
        cfg: The network.
        ids: [R, T] int32 finished tokens.
        positions: [R, T] int32.
        caches: Of B rows; extended in columns start .. start + T - 1.
        start: Column, or with `rows` one per row [R].
        own_mask: bool, broadcastable to [R, T, T], or None = all-to-all.
        context_mask: bool [R, C] filled columns, or None = there is no context yet.
        rows: [R] int32, which rows of the caches these are; None = all of them, R = B.

    Returns:
        The extended caches, and the encoder's states [R, T, D] behind its final norm; with shared
        keys and values those of the last layer that is read.
    """
    x, rope = weights.embedding[ids], rope_of(cfg, positions)
    new = []
    for layer, cache in zip(weights.encoder, caches.encoder, strict=True):
        context = None if context_mask is None else cache
        if context is not None and rows is not None:
            context = LayerCache(context.key[rows], context.value[rows])
        x, own = _layer(layer, cfg, x, rope, own_mask, context, context_mask)
        new.append(own)
    # Nothing else says that the caches are read before they are written, and a compiler that
    # cannot see it copies every one of them.
    x, new = jax.lax.optimization_barrier((x, new))
    encoder = [
        _write(cache, own, start, rows) for cache, own in zip(caches.encoder, new, strict=True)
    ]
    decoder = []
    hidden = layers.rms_norm(x, weights.encoder_norm, cfg.rms_eps)
    if caches.decoder:
        for layer, cache in zip(weights.decoder, caches.decoder, strict=True):
            u = layers.rms_norm(hidden, layer.norm_attn, cfg.rms_eps)
            decoder.append(_write(cache, _key_value(layer, cfg, u, rope), start, rows))
    return Caches(tuple(encoder), tuple(decoder)), hidden


def denoise_hidden(
    weights: DecodeWeights,
    cfg: E2D2Config,
    ids: jax.Array,
    rope: Rope,
    caches: Caches,
    context_mask: jax.Array,
    own_mask: jax.Array | None = None,
) -> jax.Array:
    """Decoder states of one block given its context, ready for `head_logits`.

    Args:
        weights: From `decode_weights`.
        cfg: The network.
        ids: [B, S] int32 noisy tokens.
        rope: Angles of their positions.
        caches: The context.
        context_mask: bool [B, C] filled columns.
        own_mask: bool, broadcastable to [B, S, S], or None = everything.

    Returns:
        [B, S, D].
    """
    context = tuple(caches.encoder[i] for i in cfg.kv_layers) if cfg.share_kv else caches.decoder
    x = weights.embedding[ids]
    for layer, cache in zip(weights.decoder, context, strict=True):
        x, _ = _layer(layer, cfg, x, rope, own_mask, cache, context_mask)
    return layers.rms_norm(x, weights.decoder_norm, cfg.rms_eps)


def head_logits(weights: DecodeWeights, hidden: jax.Array) -> jax.Array:
    """Raw logits [..., V] float32 of decoder states [..., D]."""
    kernel = weights.embedding.T if weights.head is None else weights.head
    return layers.dense(hidden, kernel, round_to=jnp.float32)


def _vocabulary_in_front(weights: DecodeWeights) -> bool:
    """Whether `few_rows` serves the head: what it is faster than is a routine of CPUs."""
    return weights.head is None and jax.default_backend() == "cpu"


def best_tokens(
    weights: DecodeWeights, states: jax.Array, suppress_id: int
) -> tuple[jax.Array, jax.Array]:
    """Best token [R] and its probability [R] of states [R, D]; `suppress_id` is never the best."""
    few = states.shape[0] <= few_rows.MAX_ROWS
    if few and _vocabulary_in_front(weights):
        return few_rows.best_tokens(weights.embedding, states, suppress_id)
    logits = head_logits(weights, states)
    if few and jax.default_backend() == "cpu":
        return best_of_rows(logits, suppress_id)
    summary = summarise_scores(logits[None], suppress_id=suppress_id)
    return summary.best[0], summary.confidence[0]


def head_sizes(weights: DecodeWeights, total: int) -> list[int]:
    """Numbers of states, ascending, among which `best_tokens` of up to `total` states may choose.

    Sizes are static; quarters keep what is computed in vain below a quarter. Small ones are rounded
    up where `few_rows` is used, which is faster with 32 rows than with 24.
    """
    quarters = [-(-total * part // _PARTS) for part in range(1, _PARTS + 1)]
    if _vocabulary_in_front(weights):
        few = few_rows.MAX_ROWS
        quarters = [few_rows.padded_rows(n) if n <= few else n for n in quarters]
    return sorted(set(quarters))
