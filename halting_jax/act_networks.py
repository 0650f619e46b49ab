"""The networks around the ponder loop: what turns a batch into calls, and states into logits.

Parameters: `embedding` [V, E] for tokens, `context/{kernel,bias}` where a linear layer and ReLU
stand before the cell, `act/...` (see `act_step`), `summary/{kernel,bias}` between encoder and
decoder, `readout/{kernel,bias}`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from common.errors import require
from halting_jax.act_calls import ActCalls, act_calls, zero_state
from halting_jax.act_step import ActSettings, init_act
from halting_jax.cells import State, find_cell, init_linear, input_product, linear
from halting_jax.types import Batch, Outputs, Ponder, TaskShape

KINDS = ("act", "pondernet", "none")
PAD = 0


@dataclasses.dataclass(frozen=True)
class ActRnnSettings:
    """Sizes and choices of an ACT-RNN; static.

    Attributes:
      hidden_size: H.
      embedding_size: E of grid tokens; sequence tokens have width H.
      cell: gru | lstm | tanh_rnn.
      time_limit: M, the most inner steps.
      epsilon: halting slack.
      halt_bias: initial bias of the halting unit.
      lstm_reset_cell: the memory of the LSTM starts at 0 in every call and is not mixed.
      input_proj: vectors pass a linear layer and ReLU before the cell.
      kind: act | pondernet | none (one inner step per call, no halting unit, cost 0).
      execution: while | chunked | scan.
      chunk: inner steps per chunk of "chunked".
      dtype: of the matrix products, float32 | bfloat16.

    Raises:
      UserError: a value is out of range.
    """

    hidden_size: int = 512
    embedding_size: int = 16
    cell: str = "gru"
    time_limit: int = 16
    epsilon: float = 0.01
    halt_bias: float = 1.0
    lstm_reset_cell: bool = False
    input_proj: bool = False
    kind: str = "act"
    execution: str = "while"
    chunk: int = 4
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"act.kind={self.kind} is none of {', '.join(KINDS)}")
        for name in ("hidden_size", "embedding_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1")
        limit = self.act.time_limit  # building the loop's settings checks the others
        require(limit >= 1, f"time_limit={limit} must be at least 1")

    @property
    def act(self) -> ActSettings:
        """What concerns the ponder loop."""
        return ActSettings(
            cell=self.cell,
            time_limit=1 if self.kind == "none" else self.time_limit,
            epsilon=self.epsilon,
            execution=self.execution,
            chunk=self.chunk,
            dtype=self.dtype,
        )

    @property
    def num_states(self) -> int:
        """Entries of the state that is carried from call to call."""
        return 1 if self.lstm_reset_cell else find_cell(self.cell).num_states

    @property
    def unit_bias(self) -> float | None:
        """Initial bias of the halting unit; None without one."""
        return None if self.kind == "none" else self.halt_bias

    def fixed_steps(self, asked: int) -> int:
        """Steps without halting; 0 = halt."""
        return max(asked, 1) if self.kind == "none" else asked


class CallsNetwork(nn.Module):
    """Grids and vectors (one call per row) and frames (one call per frame).

    Attributes:
      shape: of the task.
      settings: sizes and choices.
    """

    shape: TaskShape
    settings: ActRnnSettings

    def setup(self) -> None:
        shape, settings = self.shape, self.settings
        hidden, width = settings.hidden_size, shape.features
        if shape.form == "grid":
            size = (shape.features, settings.embedding_size)
            self.embedding = self.param("embedding", nn.initializers.normal(1.0), size)
            width = shape.length * settings.embedding_size
        if self._has_context:
            self.context = self.param("context", init_linear, width, hidden)
            width = hidden
        self.act = self.param("act", init_act, settings.cell, width, hidden, settings.unit_bias)
        answers = shape.places * shape.classes * (shape.length if shape.form == "grid" else 1)
        self.readout = self.param("readout", init_linear, hidden, answers)

    @property
    def _has_context(self) -> bool:
        return self.shape.form == "grid" or (
            self.shape.form == "vector" and self.settings.input_proj
        )

    def begin(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """What the calls read: input products [B, C, G*H], and which calls are valid, bool [B, C].

        Content under a False mask is replaced, so it never matters.
        """
        mask, dtype = batch.input_mask, self.settings.dtype
        if self.shape.form == "grid":
            tokens = jnp.where(mask, batch.inputs, PAD)
            x = self.embedding[tokens].reshape(tokens.shape[0], -1)  # [B, S * E]
        else:
            mask = mask[..., None] if batch.inputs.ndim == 3 else mask
            x = jnp.where(mask, batch.inputs, 0)
        if self._has_context:
            x = jax.nn.relu(linear(self.context, x, dtype))
        products = input_product(self.act["cell"], x, dtype)
        if self.shape.form == "frames":
            return products, batch.input_mask
        return products[:, None], jnp.any(batch.input_mask, axis=1, keepdims=True)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Readout of hidden states [..., H]: [..., S, V] for grids, else [...] for one logit per
        answer, or [..., places, classes]."""
        flat = linear(self.readout, hidden, self.settings.dtype)
        if self.shape.form == "grid":
            return flat.reshape(*hidden.shape[:-1], self.shape.length, -1)
        if flat.shape[-1] == 1:
            return flat[..., 0]
        return flat.reshape(*hidden.shape[:-1], self.shape.places, self.shape.classes)

    def finish(self, calls: ActCalls, valid: jax.Array) -> Outputs:
        """Logits and report of finished calls; valid bool [B, C]."""
        every = self.shape.form == "frames" and self.shape.readout == "positions"
        return Outputs(self.logits(calls.hidden if every else calls.state[0]), calls.ponder(valid))

    def __call__(self, batch: Batch, fixed_steps: int = 0) -> Outputs:
        """Runs all calls; see `types.Model.apply`."""
        settings = self.settings
        products, valid = self.begin(batch)
        calls = act_calls(
            self.act,
            products,
            zero_state(products, settings.act, settings.num_states),
            settings.act,
            valid=valid,
            fixed_steps=settings.fixed_steps(fixed_steps),
        )
        return self.finish(calls, valid)


class TranslationNetwork(nn.Module):
    """Encoder and decoder of token sequences: one cell reads the source, then the shifted target.

    The decoder starts from a linear map of the encoder's last hidden state, with an empty memory
    where the cell has one. Row 0 of the embedding is the pad's: zero, and without gradient.

    Attributes:
      shape: of the task.
      settings: sizes and choices; tokens have width H.
    """

    shape: TaskShape
    settings: ActRnnSettings

    def setup(self) -> None:
        hidden = self.settings.hidden_size
        self.embedding = self.param("embedding", _padded_normal, (self.shape.features, hidden))
        self.act = self.param(
            "act", init_act, self.settings.cell, hidden, hidden, self.settings.unit_bias
        )
        self.summary = self.param("summary", init_linear, hidden, hidden)
        self.readout = self.param("readout", init_linear, hidden, self.shape.classes)

    def token_products(self) -> jax.Array:
        """Input product of every token of the vocabulary [V, G*H].

        The vocabulary is smaller than a batch, so looking products up costs less than computing
        them token by token.
        """
        return input_product(self.act["cell"], _without_pad(self.embedding), self.settings.dtype)

    def encode(
        self, table: jax.Array, source: jax.Array, mask: jax.Array, fixed_steps: int = 0
    ) -> ActCalls:
        """Reads source tokens [B, S]."""
        products = table[jnp.where(mask, source, PAD)]  # [B, S, G*H]
        state = zero_state(products, self.settings.act, self.settings.num_states)
        return self._read(products, state, mask, fixed_steps)

    def decoder_state(self, encoded: ActCalls) -> State:
        """The state before the first target token."""
        start = linear(self.summary, encoded.state[0], self.settings.dtype)
        return (start, *(jnp.zeros_like(start) for _ in encoded.state[1:]))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits [..., V] of hidden states [..., H]."""
        return linear(self.readout, hidden, self.settings.dtype)

    def _read(
        self, products: jax.Array, state: State, valid: jax.Array, fixed_steps: int
    ) -> ActCalls:
        return act_calls(
            self.act,
            products,
            state,
            self.settings.act,
            valid=valid,
            fixed_steps=self.settings.fixed_steps(fixed_steps),
        )

    def __call__(self, batch: Batch, fixed_steps: int = 0) -> Outputs:
        """Teacher-forced logits [B, T_out, V]; calls are source steps, then target steps."""
        table = self.token_products()
        encoded = self.encode(table, batch.inputs, batch.input_mask, fixed_steps)
        # Target steps up to the last scored one; behind it, content is padding.
        scored = batch.target_mask[:, ::-1]
        valid = (jnp.cumsum(scored, axis=1) > 0)[:, ::-1]
        products = table[jnp.where(valid, batch.decoder_inputs, PAD)]
        decoded = self._read(products, self.decoder_state(encoded), valid, fixed_steps)
        return Outputs(
            self.logits(decoded.hidden),
            _joined(encoded.ponder(batch.input_mask), decoded.ponder(valid)),
        )


def _padded_normal(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """N(0, 1), the pad's row 0."""
    return _without_pad(jax.random.normal(key, shape, jnp.float32))


def _without_pad(embedding: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(embedding.shape[0])[:, None] == PAD, 0, embedding)


def _joined(first: Ponder, second: Ponder) -> Ponder:
    """The report of two runs of calls after one another."""
    rows = {
        name: jnp.concatenate([getattr(first, name), getattr(second, name)], axis=1)
        for name in ("cost", "steps", "remainder", "forced", "mask")
    }
    return Ponder(**rows, mass=first.mass + second.mass, executed=first.executed + second.executed)
