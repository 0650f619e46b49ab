"""MDLM and SEDD behind the forward contract.

Two score modes. "bidirectional" is exact: every step reads prompt and canvas. "prompt_cached" reads
the prompt once per episode, beside the fully masked canvas, and keeps its keys and values: a step
then costs the canvas alone, and is an approximation (the prompt does not see what was written).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.lm.layers import Params, cache_layout
from reoac_jax.backbone import dit
from reoac_jax.backbone.base import Backbone, Canvas, Scores, masked_mean
from reoac_jax.backbone.dit import DiTConfig, Modulation
from reoac_jax.backbone.e2d2 import take_positions


def dit_backbone(cfg: DiTConfig) -> Backbone:
    """The network behind the contract, in its config's score_mode.

    SEDD's outputs at a masked position are log p(x0 = y | xt) up to a constant, so its head needs
    no conversion: the softmax without the mask is the SUBS distribution.

    Raises:
      UserError: the uniform graph, which has no mask to edit with, or ids that nobody named.
    """
    if cfg.mask_id < 0:
        raise UserError(
            "a SEDD model of the uniform graph has no mask token, which editing needs: "
            "use an absorbing one"
        )
    if min(cfg.eos_id, cfg.pad_id) < 0:
        raise UserError("the backbone has no eos or pad id: give it the tokenizer's")
    schedule = cfg.schedule

    def modulation(params: Params, t: jax.Array) -> Modulation:
        return dit.modulation(params, cfg, schedule.sigma(t) if cfg.time_conditioning else None)

    def fixed_modulation(params: Params) -> Modulation | None:
        """The modulations, when no noise level changes them."""
        return None if cfg.time_conditioning else dit.modulation(params, cfg, None)

    def full_pass(
        params: Params, canvas: Canvas, tokens: jax.Array, mods: Modulation, collect_kv: bool
    ) -> dit.Pass:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        mask = canvas.attention_mask[:, None, :]
        return dit.run_blocks(
            params, cfg, tokens, mods, positions=positions, mask=mask, collect_kv=collect_kv
        )

    def begin_full(params: Params, canvas: Canvas) -> Any:
        del canvas
        return fixed_modulation(params)

    def score_full(
        params: Params, context: Any, canvas: Canvas, gen_ids: jax.Array, t: jax.Array
    ) -> Scores:
        mods = modulation(params, t) if context is None else context
        hidden = full_pass(params, canvas, canvas.with_gen(gen_ids).tokens, mods, False).hidden
        mine = take_positions(hidden, canvas.gen_index)
        return Scores(
            dit.final_states(params, cfg, mine, mods),
            masked_mean(hidden, canvas.context_mask),
            mine.astype(jnp.float32).mean(axis=1),
        )

    def begin_cached(params: Params, canvas: Canvas) -> Any:
        fixed = fixed_modulation(params)
        batch, width = canvas.key_mask.shape
        mods = modulation(params, jnp.ones(batch)) if fixed is None else fixed
        blank = jnp.full((batch, canvas.gen_len), cfg.mask_id, jnp.int32)
        done = full_pass(params, canvas, canvas.with_gen(blank).tokens, mods, True)
        assert done.kv is not None
        key, value = (x[:, :, :width] for x in done.kv)
        key, value = jax.vmap(cache_layout)(key, value)
        return fixed, (key, value), masked_mean(done.hidden, canvas.context_mask)

    def score_cached(
        params: Params, context: Any, canvas: Canvas, gen_ids: jax.Array, t: jax.Array
    ) -> Scores:
        fixed, prompt_kv, pooled_prompt = context
        mods = modulation(params, t) if fixed is None else fixed
        hidden = dit.run_blocks(
            params,
            cfg,
            gen_ids,
            mods,
            positions=canvas.gen_index,
            mask=None,
            context=(*prompt_kv, canvas.prompt_mask[:, None, :]),
        ).hidden
        states = dit.final_states(params, cfg, hidden, mods)
        return Scores(states, pooled_prompt, hidden.astype(jnp.float32).mean(axis=1))

    cached = cfg.score_mode == "prompt_cached"
    return Backbone(
        family="sedd" if cfg.parameterization == "sedd" else "mdlm",
        vocab_size=cfg.vocab_size,
        mask_id=cfg.mask_id,
        pad_id=cfg.pad_id,
        eos_id=cfg.eos_id,
        bos_id=cfg.bos_id,
        hidden_size=cfg.hidden_size,
        max_length=cfg.length,
        block_size=None,
        score_mode=cfg.score_mode,
        init=lambda key: dit.init_params(key, cfg),
        begin=begin_cached if cached else begin_full,
        score=score_cached if cached else score_full,
        head=dit.head,
        head_params=lambda params: {"final": {"linear": params["final"]["linear"]}},
    )


def with_tokenizer_ids(cfg: DiTConfig, eos_id: int, bos_id: int, pad_id: int) -> DiTConfig:
    """The config with the tokenizer's ids where the model's files name none."""
    return dataclasses.replace(
        cfg,
        eos_id=eos_id if cfg.eos_id < 0 else cfg.eos_id,
        bos_id=bos_id if cfg.bos_id < 0 else cfg.bos_id,
        pad_id=pad_id if cfg.pad_id < 0 else cfg.pad_id,
    )
