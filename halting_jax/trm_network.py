"""Network of the tiny recursive model: two layers, applied to their own latents again and again.

Two latents of the grid's shape are carried: y, the current answer, and z, the reasoning behind it.
With x the embedded question and f the shared network,

    cycle:             z <- f(z + x + y)   n times,   then   y <- f(y + z)
    supervision step:  T cycles; training differentiates the last one only
    inference:         up to N_sup supervision steps; a row stops once its halting logit q(y) > 0

(published idea: "Tiny Recursive Model", 2025; `trm_supervision` trains it). f adds
each sub-layer to its input and normalises the sum, so latents have unit root mean square however
often they pass through it. They start from two fixed orthogonal vectors, the same at every
position: learned ones would never receive a gradient, because the first cycle has none.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.errors import require
from common.lm import layers
from halting_jax.grid_conv import grid_conv, init_grid_conv
from halting_jax.types import Params, TaskShape

MIXERS = ("attention", "mlp")
POSITIONS = ("rope2d", "learned", "none")
DTYPES = ("float32", "bfloat16")
RMS_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class TrmSettings:
    """Static description of a tiny recursive model.

    Attributes:
      hidden_size: H.
      layers: layers of the shared network.
      heads: attention heads; they divide H.
      expansion: the SwiGLU is 2/3 * expansion * H wide (expansion * S for `mixer="mlp"`).
      conv_size: odd width of a depth-wise convolution over the grid on the inner vectors of the
        SwiGLU, before its output product (ConvSwiGLU); 0 = none.
      inner_cycles: n, updates of z per cycle.
      cycles: T, cycles per supervision step.
      supervision_steps: N_sup, most supervision steps of one example.
      mixer: what mixes positions: "attention" | "mlp", a SwiGLU over the sequence axis.
      pos: "rope2d" (rotary over row and column of a square grid) | "learned" | "none".
      rope_theta: base of the rotary frequencies; 100 suits coordinates up to a few dozens.
      dtype: of activations, "float32" | "bfloat16"; weights, logits and halting are float32.
      halt_bias: initial bias of the halting logit; negative = nobody halts before it is learnt.
      halt_exploration: share of the training examples that must think a random number of steps.
      halt_at_eval: inference stops rows early; otherwise every row takes N_sup steps.
      halt_loss_weight: weight of the halting head's loss.
      attn_impl: "auto" | "xla" | "cudnn".
    """

    hidden_size: int = 512
    layers: int = 2
    heads: int = 8
    conv_size: int = 0
    expansion: float = 4.0
    inner_cycles: int = 6
    cycles: int = 3
    supervision_steps: int = 16
    mixer: str = "attention"
    pos: str = "rope2d"
    rope_theta: float = 100.0
    dtype: str = "float32"
    halt_bias: float = -5.0
    halt_exploration: float = 0.1
    halt_at_eval: bool = True
    halt_loss_weight: float = 0.5
    attn_impl: str = "auto"


class Latents(NamedTuple):
    """The answer y and the reasoning z, each [B, S, H]."""

    y: jax.Array
    z: jax.Array


# --------------------------------------------------------------------------------------------------
# The network


def _swiglu_shapes(size: int, expansion: float) -> dict[str, Any]:
    """Kernels of a SwiGLU on vectors of `size`, its width rounded up to a multiple of 8."""
    width = math.ceil(2 * expansion * size / 3 / 8) * 8
    return {
        "gate": {"kernel": (size, width)},
        "up": {"kernel": (size, width)},
        "down": {"kernel": (width, size)},
    }


def _layer_shapes(shape: TaskShape, settings: TrmSettings) -> dict[str, Any]:
    """Nested {name: shape} of one shared layer, in the layout of `common.lm.layers`."""
    hidden, split = settings.hidden_size, (settings.heads, settings.hidden_size // settings.heads)
    spec: dict[str, Any] = {"mlp": _swiglu_shapes(hidden, settings.expansion)}
    if settings.conv_size:
        width = spec["mlp"]["down"]["kernel"][0]
        spec["conv"] = {"kernel": (settings.conv_size, settings.conv_size, width)}
    if settings.mixer == "mlp":
        return spec | {"mixer": _swiglu_shapes(shape.length, settings.expansion)}
    attn = {name: {"kernel": (hidden, *split)} for name in ("q", "k", "v")}
    return spec | {"attn": attn | {"o": {"kernel": (*split, hidden)}}}


def _init_layer(key: jax.Array, spec: dict[str, Any]) -> dict[str, Any]:
    """Truncated normals of variance 1 / fan_in."""
    leaves, tree = jax.tree.flatten_with_path(spec, is_leaf=lambda x: isinstance(x, tuple))
    values = []
    for i, (path, shape) in enumerate(leaves):
        if path[0].key == "conv":
            values.append(init_grid_conv(jax.random.fold_in(key, i), shape))
            continue
        # Only the output projection sums over two axes, its heads and their channels.
        inputs = (0, 1) if path[-2].key == "o" else (0,)
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=inputs, out_axis=-1
        )
        values.append(init(jax.random.fold_in(key, i), shape, jnp.float32))
    return jax.tree.unflatten(tree, values)


def _rope_2d(length: int, head_dim: int, theta: float) -> layers.Rope:
    """Rotary angles [1, S, K/2] of a square grid: half of the pairs turn with the row, half with
    the column."""
    side = math.isqrt(length)
    row, column = jnp.divmod(jnp.arange(length, dtype=jnp.int32)[None], side)
    by_row = layers.rope_angles(row, head_dim // 2, theta)
    by_column = layers.rope_angles(column, head_dim // 2, theta)
    return layers.Rope(
        jnp.concatenate([by_row.cos, by_column.cos], axis=-1),
        jnp.concatenate([by_row.sin, by_column.sin], axis=-1),
    )


def shared_layer(
    layer: Params, h: jax.Array, rope: layers.Rope | None, mask: jax.Array, attn_impl: str
) -> jax.Array:
    """h <- norm(h + mix(h)), h <- norm(h + SwiGLU(h)), with mix = attention or a SwiGLU over S.

    Args:
      layer: weights as in `_layer_shapes`.
      h: [B, S, H].
      rope: angles of the positions, None = no rotation.
      mask: bool [B, S], True = part of the example.
      attn_impl: see `common.lm.layers.attention`.
    """
    unit = jnp.ones(())  # norms without learned scale: the next product can absorb one
    if "mixer" in layer:
        valid = jnp.where(mask[..., None], h, 0).transpose(0, 2, 1)  # [B, H, S]
        mixed = layers.swiglu(layer["mixer"], valid).transpose(0, 2, 1)
    else:
        query, key, value = (layers.dense(h, layer["attn"][n]["kernel"]) for n in ("q", "k", "v"))
        if rope is not None:
            query, key = layers.apply_rope(query, rope), layers.apply_rope(key, rope)
        heads = layers.attention(query, key, value, mask[:, None, :], attn_impl)
        mixed = layers.merge_heads(heads, layer["attn"]["o"]["kernel"])
    h = layers.rms_norm(h + mixed, unit, RMS_EPS)
    return layers.rms_norm(h + _transition(layer, h, mask), unit, RMS_EPS)


def _transition(layer: Params, h: jax.Array, mask: jax.Array) -> jax.Array:
    """The SwiGLU, its inner vectors convolved over the grid where the layer has a kernel."""
    if "conv" not in layer:
        return layers.swiglu(layer["mlp"], h)
    mlp = layer["mlp"]
    gate, up = (layers.dense(h, mlp[name]["kernel"]) for name in ("gate", "up"))
    inner = jnp.where(mask[..., None], jax.nn.silu(gate) * up, 0)
    return layers.dense(grid_conv(inner, layer["conv"]["kernel"]), mlp["down"]["kernel"])


class TrmNet(nn.Module):
    """The shared network with its embedding, readout and halting head.

    Attributes:
      shape: of the task.
      settings: static description.
    """

    shape: TaskShape
    settings: TrmSettings

    def setup(self) -> None:
        """Declares the weights."""
        shape, settings = self.shape, self.settings
        hidden, spec = settings.hidden_size, _layer_shapes(shape, settings)
        normal = nn.initializers.normal(hidden**-0.5)
        self.tokens = self.param("embedding", normal, (shape.features, hidden))
        if settings.pos == "learned":
            self.positions = self.param("position_embedding", normal, (shape.length, hidden))
        self.shared = [self.param(f"layer_{i}", _init_layer, spec) for i in range(settings.layers)]
        self.readout = self.param("readout", self._init_readout)
        self.halt = self.param("halt", self._init_halt)

    def _init_readout(self, key: jax.Array) -> dict[str, jax.Array]:
        size = (self.settings.hidden_size, self.shape.classes)
        kernel = nn.initializers.lecun_normal()(key, size)
        return {"kernel": kernel, "bias": jnp.zeros(size[1])}

    def _init_halt(self, key: jax.Array) -> dict[str, jax.Array]:
        # A zero kernel: before it is learnt the halting logit is its bias, whatever the row.
        del key
        kernel = jnp.zeros((self.settings.hidden_size, 1))
        return {"kernel": kernel, "bias": jnp.full(1, self.settings.halt_bias)}

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One supervision step from fresh latents; touches every weight."""
        start = initial_latents(self.settings, *tokens.shape)
        latents = self.think(start, self.embed(tokens, mask), mask, self.settings.cycles)
        return self.logits(latents), self.halting_logits(latents, mask)

    def embed(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """The question x [B, S, H] of tokens [B, S] int32, components of variance 1."""
        # Padding may hold any number; one outside of the table would give NaN.
        x = jnp.take(self.tokens, jnp.where(mask, tokens, 0), axis=0)  # [B, S, H]
        if self.settings.pos == "learned":
            x = (x + self.positions) * 0.5**0.5
        return (x * self.settings.hidden_size**0.5).astype(self.settings.dtype)

    def think(
        self, latents: Latents, x: jax.Array, mask: jax.Array, cycles: int, unroll: bool = False
    ) -> Latents:
        """Runs `cycles` cycles of n updates of z and one of y.

        Args:
          latents: y, z [B, S, H].
          x: [B, S, H] embedded question.
          mask: bool [B, S], True = part of the example.
          cycles: static.
          unroll: write the updates of z out: compiles longer, and its gradient runs faster.
        """
        settings = self.settings
        kernels, rope = self.shared, None
        if settings.pos == "rope2d":
            head_dim = settings.hidden_size // settings.heads
            rope = _rope_2d(self.shape.length, head_dim, settings.rope_theta)

        def network(h: jax.Array) -> jax.Array:
            for layer in kernels:
                h = shared_layer(layer, h, rope, mask, settings.attn_impl)
            return h

        def cycle(latents: Latents, _: None) -> tuple[Latents, None]:
            y, z = latents
            question = x + y
            z, _ = jax.lax.scan(
                lambda z, _: (network(z + question), None),
                z,
                length=settings.inner_cycles,
                unroll=unroll,
            )
            return Latents(network(y + z), z), None

        return jax.lax.scan(cycle, latents, length=cycles, unroll=unroll)[0]

    def logits(self, latents: Latents) -> jax.Array:
        """Logits [B, S, V] of the answer y, float32."""
        y = latents.y.astype(jnp.float32)
        return layers.dense(y, self.readout["kernel"]) + self.readout["bias"]

    def halting_logits(self, latents: Latents, mask: jax.Array) -> jax.Array:
        """q [B] float32, from the mean of y over the valid positions; > 0 = believed right."""
        y = latents.y.astype(jnp.float32)
        count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        pooled = jnp.sum(jnp.where(mask[..., None], y, 0.0), axis=1) / count  # [B, H]
        return (pooled @ self.halt["kernel"] + self.halt["bias"])[:, 0]


def initial_latents(settings: TrmSettings, batch_size: int, length: int) -> Latents:
    """y, z [B, S, H] before any thought: sqrt(2) cos(a_j) and sqrt(2) sin(a_j) with
    a_j = 2 pi (j + 1/2) / H, which have unit root mean square and are orthogonal."""
    hidden = settings.hidden_size
    angle = 2 * jnp.pi * (jnp.arange(hidden, dtype=jnp.float32) + 0.5) / hidden
    full = (batch_size, length, hidden)
    y, z = 2**0.5 * jnp.cos(angle), 2**0.5 * jnp.sin(angle)
    return Latents(*(jnp.broadcast_to(v.astype(settings.dtype), full) for v in (y, z)))


def make_net(shape: TaskShape, settings: TrmSettings) -> TrmNet:
    """The network of a task.

    Raises:
      UserError: if the task is no grid or a setting does not fit.
    """
    require(
        shape.form == "grid",
        f"model.type=trm works on grids of tokens, not on {shape.form!r}: take act_rnn or "
        "universal_transformer",
    )
    for name, choices in (("mixer", MIXERS), ("pos", POSITIONS), ("dtype", DTYPES)):
        value = getattr(settings, name)
        require(value in choices, f"trm.{name}={value!r} is none of {', '.join(choices)}")
    for name in ("hidden_size", "layers", "heads", "inner_cycles", "cycles", "supervision_steps"):
        require(getattr(settings, name) >= 1, f"trm.{name} must be at least 1")
    require(
        0.0 <= settings.halt_exploration <= 1.0,
        f"trm.halt_exploration={settings.halt_exploration} is no share between 0 and 1",
    )
    head_dim, rest = divmod(settings.hidden_size, settings.heads)
    require(rest == 0, f"trm.hidden_size={settings.hidden_size} must be a multiple of trm.heads")
    require(
        settings.conv_size == 0 or settings.conv_size % 2 == 1,
        f"trm.conv_size={settings.conv_size} must be odd, or 0 for none",
    )
    require(
        settings.conv_size == 0 or math.isqrt(shape.length) ** 2 == shape.length,
        f"trm.conv_size needs a square grid, not {shape.length} tokens",
    )
    if settings.pos == "rope2d":
        side = math.isqrt(shape.length)
        require(settings.mixer == "attention", "trm.pos=rope2d needs trm.mixer=attention")
        require(
            side * side == shape.length,
            f"trm.pos=rope2d needs a square grid, not {shape.length} tokens: take learned",
        )
        require(
            head_dim % 4 == 0,
            f"trm.pos=rope2d needs hidden_size / heads in fours, not {head_dim}",
        )
    return TrmNet(shape, settings)


def select_rows(choose: jax.Array, new: Any, old: Any) -> Any:
    """Per row, `new` where choose [B] and `old` elsewhere, for trees of arrays [B, ...]."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(choose.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)
