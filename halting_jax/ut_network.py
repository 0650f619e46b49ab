"""The weights of a Universal Transformer and its pieces; the loops over hops stand outside."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from halting_jax.types import TaskShape
from halting_jax.ut_layers import (
    DecoderBlock,
    Dense,
    EncoderBlock,
    KeyValue,
    LayerNorm,
    uniform_fan_in,
)
from halting_jax.ut_settings import UtSettings

PAD = 0  # token whose embedding is zero, in sequences of tokens


class Embedding(nn.Module):
    """Rows of a table of N(0, 1) entries.

    Attributes:
      num_tokens, features: its shape.
      pad: token whose row is zero and stays so, None for none.
    """

    num_tokens: int
    features: int
    pad: int | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens int32 [B, S] -> [B, S, features]."""
        table = self.param("table", self._init, (self.num_tokens, self.features), jnp.float32)
        rows = table[tokens]  # gather: its gradient is a scatter, no one-hot product
        if self.pad is None:
            return rows
        return jnp.where((tokens != self.pad)[..., None], rows, 0)

    def _init(self, key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
        table = jax.random.normal(key, shape, dtype)
        return table if self.pad is None else table.at[self.pad].set(0)


class Halting(nn.Module):
    """x w + b in float32 or wider, the logit of the halting probability.

    Attributes:
      settings: of the model.
    """

    settings: UtSettings

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x [B, S, H] -> logits [B, S]; with level "example" the mean over mask [B, S]."""
        s = self.settings
        zero = s.halt_kernel == "zero"
        init = nn.initializers.zeros if zero else uniform_fan_in(s.hidden_size)
        kernel = self.param("kernel", init, (s.hidden_size, 1), jnp.float32)
        bias = self.param("bias", nn.initializers.constant(s.halt_bias), (1,), jnp.float32)
        flat = x.reshape(-1, s.hidden_size)
        # A reduced-precision product would move positions across the threshold.
        logits = jnp.matmul(flat, kernel, precision=jax.lax.Precision.HIGHEST) + bias
        logits = logits.reshape(x.shape[:2])
        if s.act_level == "example":
            count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
            mean = jnp.sum(jnp.where(mask, logits, 0), axis=1, keepdims=True) / count
            logits = jnp.broadcast_to(mean, logits.shape)
        return logits


class Encoder(nn.Module):
    """The hopping part; its pieces are called one by one.

    Attributes:
      settings: of the model.
      causal: whether positions see only those before them.
      projected: whether embeddings are narrower than the state.
    """

    settings: UtSettings
    causal: bool
    projected: bool

    def setup(self) -> None:
        """Declares projection, block, halting unit and final norm."""
        s = self.settings
        if self.projected:
            self.embedding_proj = Dense(s.hidden_size, s.dtype, use_bias=False)
        self.block = EncoderBlock(s)
        if s.act:
            self.halting = Halting(s)
        self.norm = LayerNorm()


class Decoder(nn.Module):
    """Weights of the decoder: the shared block and the final norm."""

    settings: UtSettings

    def setup(self) -> None:
        """Declares block and final norm."""
        self.block = DecoderBlock(self.settings)
        self.norm = LayerNorm()


class UniversalTransformer(nn.Module):
    """All weights of the model.

    Attributes:
      shape: of the task.
      settings: sizes and switches.
    """

    shape: TaskShape
    settings: UtSettings

    def setup(self) -> None:
        """Declares what this form of task needs."""
        shape, s = self.shape, self.settings
        projected = shape.form == "grid" and s.embedding_size != s.hidden_size
        if shape.form == "grid":
            self.embedding = Embedding(shape.features, s.embedding_size)
        elif shape.form == "seq2seq":
            self.embedding = Embedding(shape.features, s.hidden_size, PAD)
        else:
            self.input_proj = Dense(s.hidden_size, s.dtype)
        self.encoder = Encoder(s, s.causal(shape), projected)
        if shape.form == "seq2seq":
            self.decoder = Decoder(s)
        # Logits stay in float32: "float32" leaves the operands as they are.
        self.readout = Dense(shape.places * shape.classes)

    def __call__(self, inputs: jax.Array, mask: jax.Array) -> jax.Array:
        """Touches every weight once, for `init`; the loops call the pieces below."""
        state = self.embed(inputs, mask)
        if self.settings.act:
            self.halting_logits(state, mask)
        state = self.encoder_norm(self.encoder_block(state, mask))
        if self.shape.form == "seq2seq":
            memory = self.decoder_memory(state)
            state = self.decoder_block(state, mask, memory, mask)
            state = self.decoder_norm(state)
        return self.logits(state)

    def embed(self, inputs: jax.Array, mask: jax.Array) -> jax.Array:
        """The state before the first hop.

        Args:
          inputs: tokens [B, S], a vector [B, bits] or frames [B, T, features].
          mask: bool [B, S]; what stands under False never matters.

        Returns:
          [B, S, H], float32 or wider.
        """
        if self.shape.form in ("grid", "seq2seq"):
            embedded = self.embedding(jnp.where(mask, inputs, PAD))
            if self.encoder.projected:
                embedded = self.encoder.embedding_proj(embedded)
            return _at_least_float32(embedded)
        if self.shape.form == "vector":
            inputs = inputs[..., None]
        return _at_least_float32(self.input_proj(jnp.where(mask[..., None], inputs, 0)))

    def halting_logits(self, state: jax.Array, mask: jax.Array) -> jax.Array:
        """state [B, S, H] with the signals added -> [B, S]."""
        return self.encoder.halting(state, mask)

    def encoder_block(self, state: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, S, H] -> [B, S, H], one hop without signals."""
        return self.encoder.block(state, mask, self.encoder.causal)

    def encoder_norm(self, state: jax.Array) -> jax.Array:
        """[B, S, H] -> [B, S, H], after the last hop."""
        return self.encoder.norm(state)

    def decoder_memory(self, encoded: jax.Array) -> KeyValue:
        """Keys and values of the encoder's output [B, S, H], the same at every hop."""
        return self.decoder.block.project_memory(encoded)

    def decoder_own(self, state: jax.Array) -> KeyValue:
        """Keys and values that decoder states [B, T, H] offer to later positions at this hop."""
        return self.decoder.block.project_own(state)

    def decoder_block(
        self,
        state: jax.Array,
        mask: jax.Array,
        memory: KeyValue,
        memory_mask: jax.Array,
        own: KeyValue | None = None,
    ) -> jax.Array:
        """One hop of the decoder without signals.

        Args:
          state: [B, T, H].
          mask: bool [B, T] of target positions, or [B, L] when `own` is given.
          memory, memory_mask: keys and values of the source, bool [B, S].
          own: keys and values of positions 0..L-1 for a state that stands behind them; None: the
            state's own, causally.

        Returns:
          [B, T, H].
        """
        causal = own is None
        own = self.decoder_own(state) if own is None else own
        return self.decoder.block(state, own, mask, memory, memory_mask, causal)

    def decoder_norm(self, state: jax.Array) -> jax.Array:
        """[B, T, H] -> [B, T, H], after the last hop."""
        return self.decoder.norm(state)

    def logits(self, state: jax.Array) -> jax.Array:
        """[..., H] -> [..., places * classes], float32 or wider."""
        return self.readout(state)


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
