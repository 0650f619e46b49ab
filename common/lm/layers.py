"""Layer functions of the Llama/Qwen3 family: pure functions over explicit parameters.

One copy of RMSNorm, rotary embedding, grouped-query attention, SwiGLU and the pre-norm layer serves
every network here: the E2D2 encoder and decoder and any decoder-only language model.

A layer's parameters are one dict

    norm_attn/scale [D]   attn/q/kernel [D, H, K]   attn/{k,v}/kernel [D, H_kv, K]
    attn/o/kernel [H, K, D]   attn/{q,k}_norm/scale [K] (optional)
    attn/q/bias [H, K]    attn/{k,v}/bias [H_kv, K] (optional)
    norm_mlp/scale [D]    mlp/{gate,up}/kernel [D, I]   mlp/down/kernel [I, D]

and a stack of layers is the same dict with a leading layer axis, run by `jax.lax.scan`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from common.lm.lora import LoraKernel

Params = Mapping[str, Any]
UNROLL_LAYERS = 8
KeyValue = tuple[jax.Array, jax.Array]  # keys, values: each [B, S, H_kv, K]
Extra = TypeVar("Extra")


class Rope(NamedTuple):
    """Cosines and sines of the rotary angles, each [B, L, K/2] float32."""

    cos: jax.Array
    sin: jax.Array


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """y = scale * x / sqrt(mean(x^2) + eps), statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(variance + eps) * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """y = scale * (x - mean) / sqrt(var + eps), statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps) * scale.astype(jnp.float32)).astype(x.dtype)


def rope_angles(
    positions: jax.Array, head_dim: int, theta: float, divisors: Sequence[float] | None = None
) -> Rope:
    """Rotary angles p * theta^(-2j/K) / divisor_j for positions [B, L] int32, in float32.

    Args:
      positions: [B, L] int32.
      head_dim: K.
      theta: base of the frequencies.
      divisors: K/2 numbers by which a scaled variant slows the frequencies; None = none.

    Returns:
      The angles' cosines and sines.
    """
    inv_freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # [K/2]
    if divisors is not None:
        inv_freq = inv_freq / jnp.asarray(divisors, jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * inv_freq  # [B, L, K/2]
    return Rope(jnp.cos(angles), jnp.sin(angles))


def apply_rope(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotate the two halves of each head of x [B, L, H, K] (the rotate-half convention)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def matmul(x: jax.Array, y: jax.Array, *, round_to: Any = None) -> jax.Array:
    """x [..., M, D] @ y [..., D, N] of one dtype, summed in float32.

    CPUs are asked for float32 results, and rounding follows: their kernels for 16-bit results
    convert both operands first, which takes two to ten times as long where the processor has
    bfloat16 instructions. So does a single row.

    Args:
      x, y: the operands.
      round_to: dtype of the result; None = x's.

    Returns:
      [..., M, N].
    """
    dtype = jnp.dtype(round_to or x.dtype)
    if x.dtype.itemsize > 2 or jax.default_backend() != "cpu":
        return jnp.matmul(x, y, preferred_element_type=dtype)
    single = x.ndim == 2 and x.shape[0] == 1
    sums = jnp.matmul(
        jnp.pad(x, ((0, 1), (0, 0))) if single else x, y, preferred_element_type=jnp.float32
    )
    return (sums[:1] if single else sums).astype(dtype)


def between_products(dtype: Any) -> Any:
    """The dtype in which activations of `dtype` are kept from one product to the next.

    CPUs emulate 16-bit arithmetic: there, rounding once, before the next product, is faster.
    """
    dtype = jnp.dtype(dtype)
    return (
        jnp.dtype(jnp.float32) if dtype.itemsize < 4 and jax.default_backend() == "cpu" else dtype
    )


def dense(x: jax.Array, kernel: jax.Array | LoraKernel, *, round_to: Any = None) -> jax.Array:
    """x [..., D] times kernel [D, *out] -> [..., *out], in x's dtype; plus an adapter's part.

    `round_to` names another dtype for the result, as float32 for logits.

    The leading axes are merged first: on CPU a weight gradient that contracts over two axes is
    more than twice as slow as the same gradient of a plain matrix product.
    """
    if isinstance(kernel, LoraKernel):
        y = dense(x, kernel.base, round_to=round_to)
        return y + kernel.delta(x).reshape(y.shape)
    matrix = kernel.reshape(kernel.shape[0], -1).astype(x.dtype)
    flat = matmul(x.reshape(-1, x.shape[-1]), matrix, round_to=round_to)
    return flat.reshape(*x.shape[:-1], *kernel.shape[1:])


def merge_heads(x: jax.Array, kernel: jax.Array | LoraKernel) -> jax.Array:
    """x [B, L, H, K] times the output kernel [H, K, D] -> [B, L, D]."""
    if isinstance(kernel, LoraKernel):
        base = kernel.base.reshape(-1, kernel.base.shape[-1])
        return dense(x.reshape(*x.shape[:-2], -1), dataclasses.replace(kernel, base=base))
    return dense(x.reshape(*x.shape[:-2], -1), kernel.reshape(-1, kernel.shape[-1]))


class Context(NamedTuple):
    """Keys and values in cache layout, and which of them a query may see.

    Heads lie in front of positions and keys are transposed: the layout in which no step of a
    decoder transposes a cache and the CPU's batched matmul is fastest.

    Attributes:
      key: [B, H_kv, K, S], rotated.
      value: [B, H_kv, S, K].
      mask: bool, broadcastable to [B, T, S], True = may attend; None = everything.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array | None


def cache_layout(key: jax.Array, value: jax.Array) -> KeyValue:
    """Keys and values [B, S, H_kv, K] as the [B, H_kv, K, S] and [B, H_kv, S, K] of a Context."""
    return key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)


def attend(query: jax.Array, *contexts: Context) -> jax.Array:
    """Grouped-query attention with 1/sqrt(K) scaling and one float32 softmax over all contexts.

    Scores of several contexts are joined, not their keys: scores are smaller by the head size.

    Args:
      query: [B, T, H, K], rotated; query head h uses key head h // (H / H_kv).
      contexts: at least one. A query that may attend to nothing gives finite, meaningless output.

    Returns:
      [B, T, H, K] in query's dtype.
    """
    batch, length, heads, head_dim = query.shape
    groups = contexts[0].key.shape[1]
    q = query.transpose(0, 2, 1, 3).reshape(batch, groups, -1, head_dim)  # [B, H_kv, g*T, K]
    lowest, wide = jnp.finfo(jnp.float32).min, between_products(query.dtype)

    def scores_of(context: Context) -> jax.Array:
        scores = jnp.matmul(q, context.key, preferred_element_type=jnp.float32) * head_dim**-0.5
        if context.mask is None:
            return scores  # [B, H_kv, g*T, S]
        grid = scores.reshape(batch, groups, -1, length, context.key.shape[3])
        return jnp.where(context.mask[:, None, None], grid, lowest).reshape(scores.shape)

    scores = [scores_of(context) for context in contexts]
    if len(contexts) == 1:
        weights = jax.nn.softmax(scores[0], axis=-1).astype(query.dtype)
        out = matmul(weights, contexts[0].value, round_to=wide)
    else:
        peak = jnp.stack([part.max(-1, keepdims=True) for part in scores]).max(0)
        powers = [jnp.exp(part - peak) for part in scores]
        total = sum(part.sum(-1, keepdims=True) for part in powers)
        parts = [
            matmul(power.astype(query.dtype), context.value, round_to=wide)
            for power, context in zip(powers, contexts, strict=True)
        ]
        out = sum(parts[1:], parts[0]) / jnp.asarray(total).astype(wide)
    out = out.astype(query.dtype)
    return out.reshape(batch, heads, length, head_dim).transpose(0, 2, 1, 3)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    impl: str = "auto",
    *,
    causal: bool = False,
) -> jax.Array:
    """`attend` over keys and values [B, S, H_kv, K] that are not kept, by the fastest kernel.

    Args:
      query: [B, T, H, K].
      key, value: [B, S, H_kv, K]; query head h uses key head h // (H / H_kv).
      mask: bool, broadcastable to [B, T, S]; True = may attend. A row without any True gives
        finite, meaningless output.
      impl: "auto" | "xla" | "cudnn". "auto" takes cuDNN on a GPU with 16-bit inputs.
      causal: instead of a mask: query t sees keys 0..t.

    Returns:
      [B, T, H, K] in query's dtype.
    """
    batch, length, _, head_dim = query.shape
    if causal and mask is not None:
        raise ValueError("attention takes a mask or causal=True, not both")
    if impl == "auto":
        half = query.dtype in (jnp.bfloat16, jnp.float16)
        fits = half and head_dim <= 128 and head_dim % 8 == 0
        impl = "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
    if impl == "cudnn":
        full = (
            None
            if mask is None
            else jnp.broadcast_to(mask[:, None], (batch, 1, length, key.shape[1]))
        )
        return jax.nn.dot_product_attention(
            query, key, value, mask=full, is_causal=causal, implementation="cudnn"
        )
    if impl != "xla":
        raise ValueError(f"attention implementation {impl!r} is none of auto, xla, cudnn")
    if causal:
        mask = jnp.tri(length, key.shape[1], dtype=bool)[None]
    return attend(query, Context(*cache_layout(key, value), mask))


def project(x: jax.Array, linear: Params, *, round_to: Any = None) -> jax.Array:
    """x [..., D] through a linear map: kernel [D, *out] and, where there is one, bias [*out]."""
    y = dense(x, linear["kernel"], round_to=round_to)
    return y + linear["bias"].astype(y.dtype) if "bias" in linear else y


def project_query(attn: Params, u: jax.Array, rope: Rope, eps: float) -> jax.Array:
    """Rotated queries [B, T, H, K] of the normalised input u [B, T, D]."""
    query = project(u, attn["q"], round_to=between_products(u.dtype))
    if "q_norm" in attn:
        query = rms_norm(query, attn["q_norm"]["scale"], eps)
    return apply_rope(query, rope).astype(u.dtype)


def project_key_value(attn: Params, u: jax.Array, rope: Rope, eps: float) -> KeyValue:
    """Rotated keys and values, each [B, S, H_kv, K], of the normalised input u [B, S, D]."""
    key = project(u, attn["k"], round_to=between_products(u.dtype))
    if "k_norm" in attn:
        key = rms_norm(key, attn["k_norm"]["scale"], eps)
    return apply_rope(key, rope).astype(u.dtype), project(u, attn["v"])


def swiglu(mlp: Params, x: jax.Array) -> jax.Array:
    """W_down(silu(W_gate x) * W_up x) on x [..., D]."""
    wide = between_products(x.dtype)
    gate = dense(x, mlp["gate"]["kernel"], round_to=wide)
    hidden = jax.nn.silu(gate) * dense(x, mlp["up"]["kernel"], round_to=wide)
    return dense(hidden.astype(x.dtype), mlp["down"]["kernel"])


def pre_norm_layer(
    layer: Params,
    x: jax.Array,
    rope: Rope,
    eps: float,
    attend_fn: Callable[[jax.Array, KeyValue], tuple[jax.Array, Extra]],
) -> tuple[jax.Array, Extra]:
    """Attention, then SwiGLU, each on normalised input and added to the residual stream.

    Args:
      layer: the parameters of one layer (module docstring).
      x: [B, T, D].
      rope: angles of x's positions.
      eps: of the RMS norms.
      attend_fn: (rotated queries [B, T, H, K], x's own keys and values) -> (attention's output
        [B, T, H, K], anything to hand back).

    Returns:
      x after the layer [B, T, D], and what attend_fn handed back.
    """
    attn = layer["attn"]
    u = rms_norm(x, layer["norm_attn"]["scale"], eps)
    own_kv = project_key_value(attn, u, rope, eps)
    out, extra = attend_fn(project_query(attn, u, rope, eps), own_kv)
    x = x + merge_heads(out, attn["o"]["kernel"])
    return x + swiglu(layer["mlp"], rms_norm(x, layer["norm_mlp"]["scale"], eps)), extra


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
    """One pre-norm layer whose attention reads a context of given keys and its own tokens.

    Args:
      layer: the parameters of one layer (module docstring).
      x: [B, T, D].
      rope: angles of x's positions.
      mask: bool [B, T, S + T], True = may attend; the first S columns are the context's.
      context_kv: rotated keys and values [B, S, H_kv, K] put in front of x's own.

    Returns:
      x after the layer [B, T, D], and the layer's own (keys, values) [B, T, H_kv, K].
    """

    def attend_fn(query: jax.Array, own_kv: KeyValue) -> tuple[jax.Array, KeyValue]:
        key, value = own_kv
        if context_kv is not None:
            key = jnp.concatenate([context_kv[0].astype(key.dtype), key], axis=1)
            value = jnp.concatenate([context_kv[1].astype(value.dtype), value], axis=1)
        return attention(query, key, value, mask, attn_impl), own_kv

    return pre_norm_layer(layer, x, rope, eps, attend_fn)


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
