"""Layer functions of the Llama/Qwen3 family: pure functions over explicit parameters.

One copy of RMSNorm, rotary embedding, grouped-query attention, SwiGLU and the pre-norm layer serves
every network here: the E2D2 encoder and decoder and any decoder-only language model.

A layer's parameters are one dict

    norm_attn/scale [D]   attn/q/kernel [D, H, K]   attn/{k,v}/kernel [D, H_kv, K]
    attn/o/kernel [H, K, D]   attn/{q,k}_norm/scale [K] (optional)
    norm_mlp/scale [D]    mlp/{gate,up}/kernel [D, I]   mlp/down/kernel [I, D]

and a stack of layers is the same dict with a leading layer axis, run by `jax.lax.scan`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Mapping[str, Any]
UNROLL_LAYERS = 8
KeyValue = tuple[jax.Array, jax.Array]  # keys, values: each [B, S, H_kv, K]


class Rope(NamedTuple):
    """Cosines and sines of the rotary angles, each [B, L, K/2] float32."""

    cos: jax.Array
    sin: jax.Array


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """y = scale * x / sqrt(mean(x^2) + eps), statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(variance + eps) * scale.astype(jnp.float32)).astype(x.dtype)


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> Rope:
    """Rotary angles p * theta^(-2j/K) for positions [B, L] int32, in float32."""
    inv_freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # [K/2]
    angles = positions.astype(jnp.float32)[..., None] * inv_freq  # [B, L, K/2]
    return Rope(jnp.cos(angles), jnp.sin(angles))


def apply_rope(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotate the two halves of each head of x [B, L, H, K] (the rotate-half convention)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] times kernel [D, *out] -> [..., *out], in x's dtype.

    The leading axes are merged first: on CPU a weight gradient that contracts over two axes is
    more than twice as slow as the same gradient of a plain matrix product.
    """
    flat = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[0], -1).astype(x.dtype)
    return flat.reshape(*x.shape[:-1], *kernel.shape[1:])


def merge_heads(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, L, H, K] times the output kernel [H, K, D] -> [B, L, D]."""
    return dense(x.reshape(*x.shape[:-2], -1), kernel.reshape(-1, kernel.shape[-1]))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    impl: str = "auto",
) -> jax.Array:
    """Grouped-query attention with 1/sqrt(K) scaling and a float32 softmax.

    Args:
      query: [B, T, H, K].
      key, value: [B, S, H_kv, K]; query head h uses key head h // (H / H_kv).
      mask: bool, broadcastable to [B, T, S]; True = may attend. A row without any True gives
        finite, meaningless output.
      impl: "auto" | "xla" | "cudnn". "auto" takes cuDNN on a GPU with 16-bit inputs.

    Returns:
      [B, T, H, K] in query's dtype.
    """
    batch, length, num_heads, head_dim = query.shape
    if impl == "auto":
        half = query.dtype in (jnp.bfloat16, jnp.float16)
        impl = "cudnn" if half and head_dim <= 128 and jax.default_backend() == "gpu" else "xla"
    if impl == "cudnn":
        full = (
            None
            if mask is None
            else jnp.broadcast_to(mask[:, None], (batch, 1, length, key.shape[1]))
        )
        return jax.nn.dot_product_attention(query, key, value, mask=full, implementation="cudnn")
    if impl != "xla":
        raise ValueError(f"attention implementation {impl!r} is none of auto, xla, cudnn")
    num_kv = key.shape[2]
    # Heads in front of positions: the layout in which the CPU's batched matmul is fastest.
    q = query.transpose(0, 2, 1, 3).reshape(batch, num_kv, -1, head_dim)  # [B, H_kv, g*T, K]
    k, v = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    scores = jnp.matmul(q, k).astype(jnp.float32) * head_dim**-0.5  # [B, H_kv, g*T, S]
    scores = scores.reshape(batch, num_kv, -1, length, key.shape[1])  # [B, H_kv, g, T, S]
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out = jnp.matmul(weights.reshape(batch, num_kv, -1, key.shape[1]), v)
    return out.reshape(batch, num_heads, length, head_dim).transpose(0, 2, 1, 3)


def project_query(attn: Params, u: jax.Array, rope: Rope, eps: float) -> jax.Array:
    """Rotated queries [B, T, H, K] of the normalised input u [B, T, D]."""
    query = dense(u, attn["q"]["kernel"])
    if "q_norm" in attn:
        query = rms_norm(query, attn["q_norm"]["scale"], eps)
    return apply_rope(query, rope)


def project_key_value(attn: Params, u: jax.Array, rope: Rope, eps: float) -> KeyValue:
    """Rotated keys and values, each [B, S, H_kv, K], of the normalised input u [B, S, D]."""
    key = dense(u, attn["k"]["kernel"])
    if "k_norm" in attn:
        key = rms_norm(key, attn["k_norm"]["scale"], eps)
    return apply_rope(key, rope), dense(u, attn["v"]["kernel"])


def swiglu(mlp: Params, x: jax.Array) -> jax.Array:
    """W_down(silu(W_gate x) * W_up x) on x [..., D]."""
    hidden = jax.nn.silu(dense(x, mlp["gate"]["kernel"])) * dense(x, mlp["up"]["kernel"])
    return dense(hidden, mlp["down"]["kernel"])


def transformer_layer(
    layer: Params,
    x: jax.Array,
    *,
    rope: Rope,
    mask: jax.Array | None,
    context_kv: KeyValue | None = None,
    eps: float = 1e-6,
    attn_impl: str = "auto",
) -> tuple[jax.Array, KeyValue]:
    """One pre-norm layer: attention, then SwiGLU, each added to the residual stream.

    Args:
      layer: the parameters of one layer (module docstring).
      x: [B, T, D].
      rope: angles of x's positions.
      mask: bool [B, T, S + T], True = may attend; the first S columns are the context's.
      context_kv: rotated keys and values [B, S, H_kv, K] put in front of x's own.

    Returns:
      x after the layer [B, T, D], and the layer's own (keys, values) [B, T, H_kv, K].
    """
    attn = layer["attn"]
    u = rms_norm(x, layer["norm_attn"]["scale"], eps)
    query = project_query(attn, u, rope, eps)
    own_kv = project_key_value(attn, u, rope, eps)
    key, value = own_kv
    if context_kv is not None:
        key = jnp.concatenate([context_kv[0].astype(key.dtype), key], axis=1)
        value = jnp.concatenate([context_kv[1].astype(value.dtype), value], axis=1)
    x = x + merge_heads(attention(query, key, value, mask, attn_impl), attn["o"]["kernel"])
    return x + swiglu(layer["mlp"], rms_norm(x, layer["norm_mlp"]["scale"], eps)), own_kv


def run_stack(
    layers: Params,
    x: jax.Array,
    *,
    rope: Rope,
    mask: jax.Array | None,
    context_kv: KeyValue | None = None,
    eps: float = 1e-6,
    attn_impl: str = "auto",
    remat: bool = False,
) -> tuple[jax.Array, KeyValue]:
    """Scan x [B, T, D] through stacked layers.

    Args:
      layers: layer parameters with a leading axis n.
      context_kv: per layer context, each [n, B, S, H_kv, K], or None.
      remat: recompute each layer in the backward pass.

    Returns:
      x after the last layer [B, T, D], and every layer's own keys and values
      (each [n, B, T, H_kv, K]).
    """

    def step(carry: jax.Array, inputs: tuple[Params, KeyValue | None]) -> tuple[Any, KeyValue]:
        layer, kv = inputs
        return transformer_layer(
            layer, carry, rope=rope, mask=mask, context_kv=kv, eps=eps, attn_impl=attn_impl
        )

    body = jax.checkpoint(step) if remat else step
    # A shallow stack is written out: on CPU the gradient of a loop over layers takes twice as long.
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    unroll = num_layers <= UNROLL_LAYERS
    return jax.lax.scan(body, x, (layers, context_kv), unroll=unroll)
