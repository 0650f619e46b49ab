"""E2D2: encoder-decoder block diffusion over a Qwen3-style transformer (Arriola et al., 2025).

The released networks have Qwen3 layers; switches of the config give those of Llama and Qwen2, for
networks adapted from such language models.

A deep encoder reads clean tokens, a light decoder denoises a block of masked tokens and attends to
the encoder. Two ways of attending: "last hidden" (each decoder layer projects the encoder's final
state with its own key/value weights) and "shared KV" (decoder layer i reuses the keys and values
of encoder layer kv_layers[i]). In both, a decoder layer is an ordinary transformer layer with
context keys and values in front of its own, so one layer function serves all stacks.

Three ways to score a canvas (`score_mode`):
  blockwise      the training geometry: the encoder reads the whole sequence block-causally, each
                 block of the decoder sees earlier blocks of the encoder and itself;
  single_block   the encoder reads the prompt alone, the decoder the whole canvas bidirectionally
                 (block size = canvas length; for models trained so);
  left_to_right  blockwise, but only the left-most unfinished block of a row may be edited.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common.lm import layers
from common.lm.layers import KeyValue, Params
from reoac_jax.backbone.e2d2_parameters import (
    SCORE_MODES,
    E2D2Config,
    initializer,
    parameter_shapes,
)
from reoac_jax.backbone.parameter_tree import declare
from reoac_jax.types import BackboneOutput

NEG_INF = -1e9  # finite, so that differences of two excluded scores are not NaN


class E2D2(nn.Module):
    """The Linen face of the network: `init` makes the parameters, `apply` scores a batch."""

    cfg: E2D2Config

    @nn.compact
    def __call__(self, tokens: jax.Array, **kwargs: Any) -> BackboneOutput:
        """See `score`."""
        depth = self.cfg.num_encoder_layers + self.cfg.num_decoder_layers
        params = declare(parameter_shapes(self.cfg), functools.partial(initializer, depth))
        return score(params, self.cfg, tokens, **kwargs)


def init_params(key: jax.Array, cfg: E2D2Config) -> Params:
    """Fresh float32 parameters; jitted, so that no eager op runs per leaf."""
    tokens = jnp.zeros((1, cfg.block_size), jnp.int32)

    def init(k: jax.Array) -> Any:
        ones = jnp.ones_like(tokens, bool)
        variables = E2D2(cfg).init(
            k, tokens, attention_mask=ones, context_mask=~ones, score_mode="blockwise"
        )
        return variables["params"]

    return jax.jit(init)(key)


# --------------------------------------------------------------------------------------------------
# Masks


def encoder_mask(
    attention_mask: jax.Array, context_mask: jax.Array, block_size: int, causal: bool = False
) -> jax.Array:
    """A_enc [B, L, L]: block-causal, or causal; every query sees every prompt key; no padding.

    Args:
      attention_mask: bool [B, L], True = real token.
      context_mask: bool [B, L], True = prompt.
      block_size: S.
      causal: plain causal in place of block-causal.
    """
    position = jnp.arange(attention_mask.shape[1])
    unit = position if causal else position // block_size
    allowed = (unit[:, None] >= unit[None, :])[None] | context_mask[:, None, :]
    return allowed & attention_mask[:, None, :] & attention_mask[:, :, None]  # [B, L, L]


def decoder_mask(attention_mask: jax.Array, block_size: int) -> jax.Array:
    """A_dec [B, L, 2L]: clean keys of earlier blocks, then noisy keys of the own block."""
    block = jnp.arange(attention_mask.shape[1]) // block_size
    clean, noisy = block[:, None] > block[None, :], block[:, None] == block[None, :]
    allowed = jnp.concatenate([clean, noisy], axis=1)[None]
    keys = jnp.concatenate([attention_mask, attention_mask], axis=1)
    return allowed & keys[:, None, :] & attention_mask[:, :, None]  # [B, L, 2L]


# --------------------------------------------------------------------------------------------------
# Network


def embed(params: Params, cfg: E2D2Config, ids: jax.Array) -> jax.Array:
    """Token embeddings [B, L, D] of ids [B, L] int32, in the activation dtype."""
    return params["embed"]["embedding"][ids].astype(cfg.activation_dtype)


def rope_of(cfg: E2D2Config, positions: jax.Array) -> layers.Rope:
    """Rotary angles of positions [B, T] int32."""
    divisors = None
    if cfg.rope_scaling is not None:
        divisors = cfg.rope_scaling.divisors(cfg.head_dim, cfg.rope_theta)
    return layers.rope_angles(positions, cfg.head_dim, cfg.rope_theta, divisors)


def encode(
    params: Params,
    cfg: E2D2Config,
    ids: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    context_kv: KeyValue | None = None,
) -> tuple[jax.Array, KeyValue]:
    """Run the encoder.

    Args:
      ids: [B, L] int32 clean tokens.
      mask: bool [B, L, S + L].
      positions: [B, L] int32.
      context_kv: cached keys and values of every layer [N_enc, B, S, H_kv, K], or None.

    Returns:
      the state after the final norm [B, L, D], and each layer's keys and values
      [N_enc, B, L, H_kv, K].
    """
    x, key_value = layers.run_stack(
        params["encoder"]["layers"],
        embed(params, cfg, ids),
        rope=rope_of(cfg, positions),
        mask=mask,
        context_kv=context_kv,
        eps=cfg.rms_eps,
        attn_impl=cfg.attn_impl,
        remat=cfg.remat,
    )
    return layers.rms_norm(x, params["encoder"]["norm_final"]["scale"], cfg.rms_eps), key_value


def decoder_stack(params: Params, cfg: E2D2Config) -> Params:
    """{layers, norm_final} of the decoder: its own, or the top of the encoder when tied."""
    if not cfg.tie_encoder_decoder:
        return params["decoder"]
    top = jax.tree.map(lambda x: x[-cfg.num_decoder_layers :], params["encoder"]["layers"])
    return {"layers": top, "norm_final": params["encoder"]["norm_final"]}


def decoder_context(
    params: Params, cfg: E2D2Config, hidden: jax.Array, encoder_kv: KeyValue, positions: jax.Array
) -> KeyValue:
    """Keys and values that the decoder layers put in front of their own.

    Args:
      hidden: [B, S, D] encoder state after its final norm.
      encoder_kv: the encoder's keys and values [N_enc, B, S, H_kv, K].
      positions: [B, S] int32 positions of the context.

    Returns:
      keys and values, each [N_dec, B, S, H_kv, K].
    """
    if cfg.share_kv:
        chosen = jnp.asarray(cfg.kv_layers)
        return encoder_kv[0][chosen], encoder_kv[1][chosen]
    rope = rope_of(cfg, positions)

    def project(layer: Params) -> KeyValue:
        u = layers.rms_norm(hidden, layer["norm_attn"]["scale"], cfg.rms_eps)
        return layers.project_key_value(layer["attn"], u, rope, cfg.rms_eps)

    return jax.lax.map(project, decoder_stack(params, cfg)["layers"])


def decode(
    params: Params,
    cfg: E2D2Config,
    ids: jax.Array,
    mask: jax.Array | None,
    positions: jax.Array,
    context_kv: KeyValue,
) -> jax.Array:
    """Run the decoder on noisy tokens: its state after the final norm, [B, L, D].

    Args:
      ids: [B, L] int32 noisy tokens.
      mask: bool [B, L, S + L], or None when everything may be attended.
      positions: [B, L] int32.
      context_kv: from `decoder_context`.
    """
    stack = decoder_stack(params, cfg)
    x, _ = layers.run_stack(
        stack["layers"],
        embed(params, cfg, ids),
        rope=rope_of(cfg, positions),
        mask=mask,
        context_kv=context_kv,
        eps=cfg.rms_eps,
        attn_impl=cfg.attn_impl,
        remat=cfg.remat,
    )
    return layers.rms_norm(x, stack["norm_final"]["scale"], cfg.rms_eps)


def head(params: Params, cfg: E2D2Config, hidden: jax.Array) -> jax.Array:
    """Raw float32 logits [..., V] of decoder states [..., D]."""
    kernel = params["embed"]["embedding"].T if cfg.tie_head else params["head"]["kernel"]
    return layers.dense(hidden, kernel, round_to=jnp.float32)


def subs_log_probs(logits: jax.Array, noisy_ids: jax.Array, mask_id: int) -> jax.Array:
    """SUBS parameterisation (Sahoo et al., 2024): the mask is never predicted, the rest carried.

    Args:
      logits: [B, L, V] raw.
      noisy_ids: [B, L] int32.

    Returns:
      log-probabilities [B, L, V] float32, NEG_INF in place of minus infinity.
    """
    vocab = jnp.arange(logits.shape[-1])
    log_probs = jax.nn.log_softmax(jnp.where(vocab == mask_id, NEG_INF, logits), axis=-1)
    log_probs = jnp.where(vocab == mask_id, NEG_INF, log_probs)
    carried = jnp.where(vocab == noisy_ids[..., None], 0.0, NEG_INF)
    return jnp.where((noisy_ids == mask_id)[..., None], log_probs, carried)


# --------------------------------------------------------------------------------------------------
# Scoring


def _ordinal_positions(batch: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def blockwise_hidden(
    params: Params,
    cfg: E2D2Config,
    clean_ids: jax.Array,
    noisy_ids: jax.Array,
    attention_mask: jax.Array,
    context_mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Training-geometry pass: (decoder hidden, encoder hidden), each [B, L, D].

    Args:
      clean_ids, noisy_ids: [B, L] int32 inputs of the encoder and of the decoder.
      attention_mask, context_mask: bool [B, L].
    """
    positions = _ordinal_positions(*clean_ids.shape)
    mask_enc = encoder_mask(attention_mask, context_mask, cfg.block_size, cfg.encoder_causal)
    encoder_hidden, encoder_kv = encode(params, cfg, clean_ids, mask_enc, positions)
    context = decoder_context(params, cfg, encoder_hidden, encoder_kv, positions)
    mask_dec = decoder_mask(attention_mask, cfg.block_size)
    return decode(params, cfg, noisy_ids, mask_dec, positions, context), encoder_hidden


def prompt_context(
    params: Params, cfg: E2D2Config, prompt_ids: jax.Array, prompt_mask: jax.Array
) -> KeyValue:
    """Decoder context of the prompt alone, [N_dec, B, P, H_kv, K]: fixed over an episode.

    Args:
      prompt_ids: [B, P] int32, right-padded.
      prompt_mask: bool [B, P], True = prompt token.
    """
    positions = _ordinal_positions(*prompt_ids.shape)
    mask = prompt_mask[:, None, :] & prompt_mask[:, :, None]
    hidden, encoder_kv = encode(params, cfg, prompt_ids, mask, positions)
    return decoder_context(params, cfg, hidden, encoder_kv, positions)


def canvas_hidden(
    params: Params,
    cfg: E2D2Config,
    context_kv: KeyValue,
    prompt_mask: jax.Array,
    canvas_ids: jax.Array,
    canvas_positions: jax.Array,
) -> jax.Array:
    """Decoder states [B, G, D] of a canvas read bidirectionally behind its prompt.

    Args:
      context_kv: from `prompt_context`.
      prompt_mask: bool [B, P].
      canvas_ids: [B, G] int32.
      canvas_positions: [B, G] int32, p_b + 0..G-1.
    """
    batch, length = canvas_ids.shape
    keys = jnp.concatenate([prompt_mask, jnp.ones((batch, length), bool)], axis=1)
    mask = keys[:, None, :]  # every query of a row sees the same keys: broadcast over queries
    return decode(params, cfg, canvas_ids, mask, canvas_positions, context_kv)


def take_positions(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows index [B, K] of x [B, L, ...] -> [B, K, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def active_block_mask(
    tokens: jax.Array, context_mask: jax.Array, attention_mask: jax.Array, cfg: E2D2Config
) -> jax.Array:
    """Positions [B, L] of each row's left-most block that still holds a mask (left_to_right)."""
    block = jnp.arange(tokens.shape[1]) // cfg.block_size
    open_ = (tokens == cfg.mask_id) & attention_mask & ~context_mask
    first = jnp.min(jnp.where(open_, block, tokens.shape[1]), axis=1)
    return (block[None] == first[:, None]) & attention_mask & ~context_mask


def score(
    params: Params,
    cfg: E2D2Config,
    tokens: jax.Array,
    *,
    attention_mask: jax.Array,
    context_mask: jax.Array,
    t: jax.Array | None = None,
    positions: jax.Array | None = None,
    score_mode: str | None = None,
    clean_ids: jax.Array | None = None,
) -> BackboneOutput:
    """Score a partially masked sequence deterministically (no re-noising, no loss).

    Args:
      tokens: [B, L] int32, prompt, then canvas, then padding.
      attention_mask, context_mask: bool [B, L].
      t: ignored; the network has no time input.
      positions: [B, K] int32, gathered before the head; None = all L. In "single_block" mode these
        are the canvas positions, and must be given.
      score_mode: one of SCORE_MODES; default cfg.score_mode.
      clean_ids: [B, L] input of the encoder in blockwise modes; default: `tokens`.

    Returns:
      BackboneOutput with K (or L) positions. aux["editable"] (left_to_right) is bool [B, K|L].

    Raises:
      ValueError: unknown score_mode, or single_block without positions.
    """
    mode = score_mode or cfg.score_mode
    if mode not in SCORE_MODES:
        raise ValueError(f"score_mode {mode!r} is none of {', '.join(SCORE_MODES)}")
    attention_mask, context_mask = attention_mask.astype(bool), context_mask.astype(bool)
    aux: dict[str, jax.Array] = {}
    if mode == "single_block":
        if positions is None:
            raise ValueError("score_mode single_block needs the canvas positions")
        width = tokens.shape[1] - positions.shape[1]  # P: no prompt reaches beyond this column
        prompt_mask = (context_mask & attention_mask)[:, :width]
        context = prompt_context(params, cfg, tokens[:, :width], prompt_mask)
        ids = take_positions(tokens, positions)
        hidden = canvas_hidden(params, cfg, context, prompt_mask, ids, positions)
    else:
        source = tokens if clean_ids is None else clean_ids
        hidden, _ = blockwise_hidden(params, cfg, source, tokens, attention_mask, context_mask)
        ids = tokens
        if mode == "left_to_right":
            editable = active_block_mask(tokens, context_mask, attention_mask, cfg)
            aux["editable"] = editable if positions is None else take_positions(editable, positions)
        if positions is not None:
            hidden, ids = take_positions(hidden, positions), take_positions(ids, positions)
    logits = head(params, cfg, hidden)
    return BackboneOutput(logits, subs_log_probs(logits, ids, cfg.mask_id), hidden, aux)
