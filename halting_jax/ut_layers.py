"""Layers of the Universal Transformer: linear maps, layer norm, attention, the shared blocks.

Activations flow in float32 (or wider); only the operands of matrix products are narrowed to
`settings.dtype`. Heads are contiguous parts of the last axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.lm.layers import dense
from halting_jax.grid_conv import grid_conv, init_grid_conv
from halting_jax.ut_settings import UtSettings

LAYER_NORM_EPS = 1e-6
KeyValue = tuple[jax.Array, jax.Array]  # keys [B, S, heads, K], values [B, S, heads, K_v]
Initializer = Callable[..., jax.Array]


def uniform_fan_in(fan_in: int) -> Initializer:
    """Initializer U(-1/sqrt(fan_in), 1/sqrt(fan_in)), of kernels and biases alike."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """x W + b on the last axis, with the other axes merged.

    Attributes:
      features: width of the result.
      dtype: of the operands; "float32" leaves x as it is.
      use_bias: whether b is there.
    """

    features: int
    dtype: str = "float32"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., features], in the dtype of the operands."""
        init = uniform_fan_in(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        if self.dtype == "bfloat16":
            x = x.astype(jnp.bfloat16)
        y = dense(x, kernel)
        if self.use_bias:
            y = y + self.param("bias", init, (self.features,), jnp.float32).astype(y.dtype)
        return y


class LayerNorm(nn.Module):
    """gamma (x - mean) / (std + eps) + beta with the population std; eps outside the root."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        gamma = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        beta = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        # Recomputed in the backward pass: what it would store outweighs what it costs.
        return jax.checkpoint(layer_norm, prevent_cse=False)(x, gamma, beta)


def layer_norm(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
    """gamma (x - mean) / (std + eps) + beta over the last axis of x [..., D]."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    # The root has no finite slope at 0, where a position stands that never got any output.
    varies = variance > 0
    std = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0)
    return gamma * (centred / (std + LAYER_NORM_EPS)) + beta


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array,
    *,
    causal: bool = False,
    impl: str = "auto",
) -> jax.Array:
    """softmax(Q K^T / sqrt(K)) V per head, over the keys that are there.

    Args:
      query: [B, T, heads, K].
      key: [B, S, heads, K].
      value: [B, S, heads, K_v].
      key_mask: bool [B, S], True = may be attended; a row without any gives finite, meaningless
        output.
      causal: position t sees keys 0..t only.
      impl: see `UtSettings.attn_impl`.

    Returns:
      [B, T, heads, K_v] in query's dtype.
    """
    impl = _choose(query, value) if impl == "auto" else impl
    mask = key_mask[:, None, None, :]  # [B, 1, 1, S]
    if impl != "plain":
        # The fused kernels take no mask that is broadcast over queries.
        mask = jnp.broadcast_to(mask, (query.shape[0], 1, query.shape[1], key.shape[1]))
        fused: Any = impl
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=causal, implementation=fused
        )
    # Heads in front of positions: the layout in which the CPU's batched matmul is fastest.
    q = query.transpose(0, 2, 1, 3) * query.shape[-1] ** -0.5  # [B, heads, T, K]
    out = _weighted_values(q, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), mask, causal)
    return out.transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_values(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool
) -> jax.Array:
    """softmax(Q K^T) V on [B, heads, L, .] under mask bool [B, 1, 1, S]."""
    return _attend_forward(query, key, value, mask, causal)[0]


def _attend_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = jnp.matmul(query, key.swapaxes(2, 3))  # [B, heads, T, S]
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    seen = _seen(mask, causal, scores.shape)
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1)
    weights = weights.astype(value.dtype)
    return jnp.matmul(weights, value), (query, key, value, mask, weights)


def _attend_backward(
    causal: bool, kept: tuple[jax.Array, ...], slope: jax.Array
) -> tuple[jax.Array | None, ...]:
    """The gradient from the weights alone; left to itself, JAX stores three such arrays and masks.

    dV = W^T g, dW = g V^T, dScores = W * (dW - rowsum(W * dW)), dQ = dScores K, dK = dScores^T Q.
    """
    query, key, value, mask, weights = kept
    exact = jnp.promote_types(weights.dtype, jnp.float32)
    into_weights = jnp.matmul(slope, value.swapaxes(2, 3)).astype(exact) * weights
    into_scores = into_weights - weights * jnp.sum(into_weights, axis=-1, keepdims=True)
    into_scores = jnp.where(_seen(mask, causal, weights.shape), into_scores, 0).astype(query.dtype)
    return (
        jnp.matmul(into_scores, key),
        jnp.matmul(into_scores.swapaxes(2, 3), query),
        jnp.matmul(weights.swapaxes(2, 3), slope),
        None,
    )


_weighted_values.defvjp(_attend_forward, _attend_backward)


def _seen(mask: jax.Array, causal: bool, shape: tuple[int, ...]) -> jax.Array:
    """Which of [B, heads, T, S] may be attended, as a broadcastable mask."""
    return mask & jnp.tril(jnp.ones(shape[2:], bool)) if causal else mask


def _choose(query: jax.Array, value: jax.Array) -> str:
    """The fastest implementation that applies to these shapes on this backend."""
    depth = query.shape[-1]
    if jax.default_backend() != "gpu" or depth != value.shape[-1]:
        return "plain"
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if half and depth % 8 == 0 and depth <= 128 else "xla"


class MultiHeadAttention(nn.Module):
    """Attention without biases; keys and values may be projected ahead of the queries."""

    settings: UtSettings

    def setup(self) -> None:
        """Declares the four linear maps."""
        s = self.settings

        def linear(features: int) -> Dense:
            return Dense(features, s.dtype, use_bias=False)

        self.query = linear(s.key_depth)
        self.key = linear(s.key_depth)
        self.value = linear(s.value_depth)
        self.output = linear(s.hidden_size)

    def project(self, memory: jax.Array) -> KeyValue:
        """memory [B, S, H] -> keys [B, S, heads, K], values [B, S, heads, K_v]."""
        rows = memory.shape[0]
        # Flattened once: every reshape of its own would be stored for the backward pass.
        flat = memory.reshape(-1, memory.shape[-1])
        return self._split(self.key(flat), rows), self._split(self.value(flat), rows)

    def __call__(
        self, x: jax.Array, memory: KeyValue | None, key_mask: jax.Array, causal: bool = False
    ) -> jax.Array:
        """x [B, T, H] attends to `memory` under key_mask [B, S] -> [B, T, H] in x's dtype.

        Without `memory` it attends to itself.
        """
        rows, flat = x.shape[0], x.reshape(-1, x.shape[-1])
        query = self._split(self.query(flat), rows)
        if memory is None:
            memory = self._split(self.key(flat), rows), self._split(self.value(flat), rows)
        impl = self.settings.attn_impl
        out = attend(query, *memory, key_mask, causal=causal, impl=impl)
        return self.output(out.reshape(flat.shape[0], -1)).reshape(x.shape).astype(x.dtype)

    def _split(self, flat: jax.Array, rows: int) -> jax.Array:
        return flat.reshape(rows, -1, self.settings.heads, flat.shape[-1] // self.settings.heads)


class FeedForward(nn.Module):
    """H -> filter -> H with ReLU, position by position.

    With `settings.conv_size` the inner vectors also pass through a depth-wise convolution over the
    grid: the separable convolution that the Universal Transformer paper offers as its transition.
    """

    settings: UtSettings

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [B, T, H] -> [B, T, H] in x's dtype; a convolution reads zeros outside mask [B, T]."""
        s = self.settings
        hidden = Dense(s.filter_size, s.dtype, name="fc1")(x)
        if s.conv_size:
            assert mask is not None
            size = (s.conv_size, s.conv_size, s.filter_size)
            kernel = self.param("conv", init_grid_conv, size)
            hidden = grid_conv(jnp.where(mask[..., None], hidden, 0), kernel)
        return Dense(s.hidden_size, s.dtype, name="fc2")(nn.relu(hidden)).astype(x.dtype)


class EncoderBlock(nn.Module):
    """x <- x + Attn(LN(x)); x <- x + FFN(LN(x))."""

    settings: UtSettings

    def setup(self) -> None:
        """Declares attention, position-wise network and their norms."""
        self.attention = MultiHeadAttention(self.settings)
        self.feed_forward = FeedForward(self.settings)
        self.norm_attention = LayerNorm()
        self.norm_feed_forward = LayerNorm()

    def __call__(self, x: jax.Array, mask: jax.Array, causal: bool) -> jax.Array:
        """x [B, S, H] under mask bool [B, S] -> [B, S, H]."""
        x = x + self.attention(self.norm_attention(x), None, mask, causal)
        return x + self.feed_forward(self.norm_feed_forward(x), mask)


class DecoderBlock(nn.Module):
    """Self-attention, attention to the encoder's output, position-wise network; pre-norm each."""

    settings: UtSettings

    def setup(self) -> None:
        """Declares both attentions, the position-wise network and the three norms."""
        self.self_attention = MultiHeadAttention(self.settings)
        self.cross_attention = MultiHeadAttention(self.settings)
        self.feed_forward = FeedForward(self.settings)
        self.norm_self = LayerNorm()
        self.norm_cross = LayerNorm()
        self.norm_feed_forward = LayerNorm()

    def project_memory(self, encoded: jax.Array) -> KeyValue:
        """Keys and values of the encoder's output [B, S, H]; the same at every hop."""
        return self.cross_attention.project(encoded)

    def project_own(self, x: jax.Array) -> KeyValue:
        """Keys and values that x [B, T, H] offers to the self-attention of later positions."""
        return self.self_attention.project(self.norm_self(x))

    def __call__(
        self,
        x: jax.Array,
        own: KeyValue,
        own_mask: jax.Array,
        memory: KeyValue,
        memory_mask: jax.Array,
        causal: bool,
    ) -> jax.Array:
        """One hop of x [B, T, H].

        Args:
          x: [B, T, H].
          own: keys and values of the target positions [B, L, heads, .]; of x itself, or of x and
            the positions before it.
          own_mask: bool [B, L].
          memory: keys and values of the encoder's output [B, S, heads, .].
          memory_mask: bool [B, S], source positions that are there.
          causal: position t of x sees own positions 0..t only.

        Returns:
          [B, T, H].
        """
        x = x + self.self_attention(self.norm_self(x), own, own_mask, causal)
        x = x + self.cross_attention(self.norm_cross(x), memory, memory_mask)
        return x + self.feed_forward(self.norm_feed_forward(x))
