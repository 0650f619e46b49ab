"""The forward contract between a diffusion language model and everything that edits with it.

An episode keeps its prompt, so a backbone is asked in two parts: `begin` computes whatever stays
fixed (for the single-block E2D2 the whole encoder), `score` the rest, once per denoising step.
All functions are pure and shape-static; a `Backbone` holds no arrays and hashes by identity, so it
can be closed over or passed as a static argument.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax.backbone import e2d2
from reoac_jax.types import BatchArray


@flax.struct.dataclass
class Canvas:
    """A batch of prompts, each followed by its canvas of G positions, then by padding.

    Attributes:
      tokens: [B, L = P + G] int32; row b holds its prompt in columns 0..p_b-1 and its canvas in
        columns p_b..p_b+G-1.
      prompt_len: [B] int32, p_b.
      key_mask: bool [B, P], True = key token of the prompt (numbers, units, operators).
      row_id: [B] uint32, folded into every random key of the row.
    """

    tokens: BatchArray
    prompt_len: BatchArray
    key_mask: BatchArray
    row_id: BatchArray

    @property
    def prompt_width(self) -> int:
        """P."""
        return self.key_mask.shape[1]

    @property
    def gen_len(self) -> int:
        """G."""
        return self.tokens.shape[1] - self.key_mask.shape[1]

    @property
    def gen_index(self) -> jax.Array:
        """[B, G] int32 columns of the canvas."""
        return self.prompt_len[:, None] + jnp.arange(self.gen_len, dtype=jnp.int32)

    @property
    def prompt_mask(self) -> jax.Array:
        """bool [B, P], True = prompt token."""
        return jnp.arange(self.prompt_width) < self.prompt_len[:, None]

    @property
    def attention_mask(self) -> jax.Array:
        """bool [B, L], True = prompt or canvas."""
        return jnp.arange(self.tokens.shape[1]) < self.prompt_len[:, None] + self.gen_len

    @property
    def context_mask(self) -> jax.Array:
        """bool [B, L], True = prompt."""
        return jnp.arange(self.tokens.shape[1]) < self.prompt_len[:, None]

    @property
    def prompt_ids(self) -> jax.Array:
        """[B, P] int32; columns beyond the prompt hold canvas or padding ids."""
        return self.tokens[:, : self.prompt_width]

    def gen_ids(self) -> jax.Array:
        """[B, G] int32, the canvas."""
        return jnp.take_along_axis(self.tokens, self.gen_index, axis=1)

    def with_gen(self, gen_ids: jax.Array) -> "Canvas":
        """The same batch with canvas gen_ids [B, G]."""
        rows = jnp.arange(self.tokens.shape[0])[:, None]
        tokens = jnp.asarray(self.tokens).at[rows, self.gen_index].set(gen_ids)
        return dataclasses.replace(self, tokens=tokens)


class Scores(NamedTuple):
    """One forward pass, at the canvas positions.

    Attributes:
      hidden: [B, G, D] states that `Backbone.head` turns into logits.
      pooled_prompt, pooled_canvas: [B, D] float32 means of the contextual states.
      editable: bool [B, G] positions that may be written now, or None = all.
    """

    hidden: jax.Array
    pooled_prompt: jax.Array
    pooled_canvas: jax.Array
    editable: jax.Array | None = None


class BlockScores(NamedTuple):
    """One forward pass over each row's active block alone.

    Attributes:
      hidden: [B, S, D] states that `Backbone.head` turns into logits.
      places: [B, S] int32 canvas places of the block; G = not a place of the canvas (the prompt's
        tail in the first block, nothing behind the canvas in the last).
      pooled_prompt: [B, D] float32 mean of the prompt's encoder states.
      pooled_canvas: [B, D] float32 mean of the block's states.
    """

    hidden: jax.Array
    places: jax.Array
    pooled_prompt: jax.Array
    pooled_canvas: jax.Array

    def spread(self, values: jax.Array, gen_len: int, fill: Any) -> jax.Array:
        """values [B, S, ...] at their canvas places: [B, G, ...], `fill` everywhere else."""
        batch = values.shape[0]
        blank = jnp.full((batch, gen_len, *values.shape[2:]), fill, values.dtype)
        return blank.at[jnp.arange(batch)[:, None], self.places].set(values, mode="drop")


@dataclasses.dataclass(frozen=True, eq=False)
class BlockScoring:
    """How a block-causal backbone is asked when finished blocks are kept in caches.

    Attributes:
      begin: (params, canvas) -> (context fixed during an episode, cache of the prompt).
      score: (context, cache, canvas, gen_ids [B, G]) -> (BlockScores, cache). The cache takes in
        the block that was finished since it was made; its arrays have the rows in front.
    """

    begin: Callable[[Params, Canvas], tuple[Any, Any]]
    score: Callable[[Any, Any, Canvas, jax.Array], tuple[BlockScores, Any]]


class ScoreFn(Protocol):
    """score(params, context, canvas, gen_ids [B,G], t [B]) -> Scores."""

    def __call__(
        self, params: Params, context: Any, canvas: Canvas, gen_ids: jax.Array, t: jax.Array
    ) -> Scores: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Finetuning:
    """How updates and passes treat a backbone's parameters; the default: all of them train.

    Attributes:
      trainable: params -> the part that gradients and updates are for.
      replace: (params, trainable part) -> params with that part.
      forward: (params, trainable part, key | None) -> parameters of a pass that is differentiated
        by the trainable part; the key is for dropout.
      inference: params -> parameters of passes without gradient.
      frozen: params -> what identifies the model that training starts from.
      head_trains: whether the head's parameters are trainable.
    """

    trainable: Callable[[Params], Params] = lambda params: params
    replace: Callable[[Params, Params], Params] = lambda params, part: part
    forward: Callable[[Params, Params, jax.Array | None], Params] = lambda params, part, key: part
    inference: Callable[[Params], Params] = lambda params: params
    frozen: Callable[[Params], Params] = lambda params: params
    head_trains: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A diffusion language model as a bundle of pure functions.

    Attributes:
      init: key -> params.
      begin: (params, canvas) -> context, a pytree fixed during an episode.
      score: one denoising step, see `ScoreFn`.
      head: (params, hidden [..., D]) -> raw float32 logits [..., V].
      head_params: params -> the part of them that `head` reads; `head` takes that part too.
      suppress_mask: the mask id is excluded from every score. False only for the test backbone
        whose recorded traces use plain logits.
      finetuning: which parameters train.
      score_mode: how positions see each other; goes into every run record.
      blocks: for rollouts and samplers that need the active block alone, or None. `begin` and
        `score` work all the same: they recompute everything, and can be differentiated.
    """

    family: str
    vocab_size: int
    mask_id: int
    pad_id: int
    eos_id: int
    bos_id: int
    hidden_size: int
    max_length: int
    block_size: int | None
    score_mode: str
    init: Callable[[jax.Array], Params]
    begin: Callable[[Params, Canvas], Any]
    score: ScoreFn
    head: Callable[[Params, jax.Array], jax.Array]
    head_params: Callable[[Params], Params] = lambda params: params
    suppress_mask: bool = True
    finetuning: Finetuning = Finetuning()
    blocks: BlockScoring | None = None

    @property
    def suppress_id(self) -> int:
        """Token id excluded from every score, -1 = none.

        With it excluded, the head's raw logits have the softmax of the SUBS log-probabilities at
        masked positions; at decoded positions they are the raw scores (carried-over probabilities
        would make every rewrite a no-op).
        """
        return self.mask_id if self.suppress_mask else -1

    def training_head(
        self, params: Params
    ) -> tuple[Callable[[Params, jax.Array], jax.Array], Params]:
        """(head, its parameters) for `counted_loss`: a frozen head has no parameters there.

        Args:
          params: of a differentiated pass.
        """
        if self.finetuning.head_trains:
            return self.logits, self.head_params(params)
        frozen = jax.lax.stop_gradient(self.head_params(params))
        return lambda _, hidden: self.logits(frozen, hidden), {}

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] float32 with the suppressed id at NEG_INF."""
        logits = self.head(params, hidden)
        return jnp.where(jnp.arange(logits.shape[-1]) == self.suppress_id, e2d2.NEG_INF, logits)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of x [B, L, D] over mask [B, L]; denominator at least 1; float32 [B, D]."""
    weight = mask.astype(jnp.float32)
    total = jnp.einsum("bld,bl->bd", x.astype(jnp.float32), weight)
    return total / jnp.maximum(weight.sum(axis=1, keepdims=True), 1.0)


def e2d2_backbone(cfg: e2d2.E2D2Config) -> Backbone:
    """The E2D2 network behind the contract, in its config's score_mode.

    "single_block" encodes the prompt once in `begin`; the blockwise modes re-encode the whole
    sequence at every step, because the encoder reads the canvas too.
    """

    def begin_single(params: Params, canvas: Canvas) -> Any:
        positions = jnp.broadcast_to(
            jnp.arange(canvas.prompt_width, dtype=jnp.int32), canvas.key_mask.shape
        )
        mask = canvas.prompt_mask
        pair = mask[:, None, :] & mask[:, :, None]
        hidden, kv = e2d2.encode(params, cfg, canvas.prompt_ids, pair, positions)
        context = e2d2.decoder_context(params, cfg, hidden, kv, positions)
        return context, masked_mean(hidden, mask)

    def score_single(
        params: Params, context: Any, canvas: Canvas, gen_ids: jax.Array, t: jax.Array
    ) -> Scores:
        del t  # the network has no time input
        context_kv, pooled_prompt = context
        hidden = e2d2.canvas_hidden(
            params, cfg, context_kv, canvas.prompt_mask, gen_ids, canvas.gen_index
        )
        return Scores(hidden, pooled_prompt, hidden.astype(jnp.float32).mean(axis=1))

    def begin_blockwise(params: Params, canvas: Canvas) -> Any:
        del params, canvas
        return ()

    def score_blockwise(
        params: Params, context: Any, canvas: Canvas, gen_ids: jax.Array, t: jax.Array
    ) -> Scores:
        del context, t
        tokens = canvas.with_gen(gen_ids).tokens
        attention_mask, context_mask = canvas.attention_mask, canvas.context_mask
        hidden, _ = e2d2.blockwise_hidden(params, cfg, tokens, tokens, attention_mask, context_mask)
        editable = None
        if cfg.score_mode == "left_to_right":
            active = e2d2.active_block_mask(tokens, context_mask, attention_mask, cfg)
            editable = e2d2.take_positions(active, canvas.gen_index)
        return Scores(
            e2d2.take_positions(hidden, canvas.gen_index),
            masked_mean(hidden, context_mask),
            masked_mean(hidden, attention_mask & ~context_mask),
            editable,
        )

    single = cfg.score_mode == "single_block"
    head_name = "embed" if cfg.tie_head else "head"
    return Backbone(
        family="e2d2",
        vocab_size=cfg.vocab_size,
        mask_id=cfg.mask_id,
        pad_id=cfg.pad_id,
        eos_id=cfg.eos_id,
        bos_id=cfg.bos_id,
        hidden_size=cfg.hidden_size,
        max_length=cfg.length,
        block_size=cfg.block_size,
        score_mode=cfg.score_mode,
        init=lambda key: e2d2.init_params(key, cfg),
        begin=begin_single if single else begin_blockwise,
        score=score_single if single else score_blockwise,
        head=lambda params, hidden: e2d2.head(params, cfg, hidden),
        head_params=lambda params: {head_name: params[head_name]},
    )
