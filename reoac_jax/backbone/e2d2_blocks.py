"""E2D2 as a policy or a sampler reads it block by block: finished blocks are kept in caches.

In score mode "left_to_right" only the left-most unfinished block of a row may be edited. A step
then needs the decoder, and the head, on that block's S positions alone; the encoder reads a block
once, when it is finished. Rows finish their blocks at different steps, so every row has its own
place in the caches; columns are positions. What a block is given is what block decoding
(`e2d2_decode`, blocks at multiples of S) gives it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax.backbone.base import BlockScores, BlockScoring, Canvas, masked_mean
from reoac_jax.backbone.e2d2 import E2D2Config, rope_of
from reoac_jax.backbone.e2d2_cache import (
    Caches,
    DecodeWeights,
    commit,
    decode_weights,
    denoise_hidden,
    empty_caches,
)
from reoac_jax.backbone.e2d2_decode import prompt_mask

_PARTS = 4


class BlockContext(NamedTuple):
    """What stays fixed: the weights as decoding lays them out, and the pooled prompt [B, D]."""

    weights: DecodeWeights
    pooled_prompt: jax.Array


class BlockCache(NamedTuple):
    """Keys and values of the encoded positions 0 .. filled - 1 of every row; filled [B] int32."""

    caches: Caches
    filled: jax.Array


def block_scoring(cfg: E2D2Config) -> BlockScoring:
    """The functions that score the active block of an E2D2."""
    size = cfg.block_size
    own_mask = jnp.tri(size, dtype=bool)[None] if cfg.encoder_causal else None

    def begin(params: Params, canvas: Canvas) -> tuple[BlockContext, BlockCache]:
        weights = decode_weights(params, cfg)
        batch, length = canvas.tokens.shape
        # The first block holds the prompt's tail; what lies before it is encoded here.
        filled = canvas.prompt_len // size * size
        encoded = canvas.prompt_width // size * size
        caches = empty_caches(cfg, batch, -(-length // size) * size)
        pooled = jnp.zeros((batch, cfg.hidden_size))
        if encoded:
            positions = jnp.broadcast_to(jnp.arange(encoded, dtype=jnp.int32), (batch, encoded))
            caches, hidden = commit(
                weights,
                cfg,
                canvas.prompt_ids[:, :encoded],
                positions,
                caches,
                0,
                prompt_mask(cfg, positions, filled),
                None,
            )
            pooled = masked_mean(hidden, positions < filled[:, None])
        return BlockContext(weights, pooled), BlockCache(caches, filled)

    def score(
        context: BlockContext, cache: BlockCache, canvas: Canvas, gen_ids: jax.Array
    ) -> tuple[BlockScores, BlockCache]:
        tokens = canvas.with_gen(gen_ids).tokens
        last = tokens.shape[1] - 1
        end = (canvas.prompt_len + canvas.gen_len)[:, None]
        column = jnp.arange(-(-tokens.shape[1] // size) * size)

        def block(filled: jax.Array) -> tuple[jax.Array, jax.Array]:
            positions = filled[:, None] + jnp.arange(size, dtype=jnp.int32)  # [B, S]
            return positions, jnp.take_along_axis(tokens, jnp.minimum(positions, last), axis=1)

        positions, ids = block(cache.filled)
        open_ = (ids == cfg.mask_id) & (positions < end)
        finished = ~jnp.any(open_, axis=1) & (cache.filled + size < end[:, 0])

        # Finished rows are encoded a quarter of the batch at a time: where rows go at their own
        # pace a few finish at every step.
        batch = tokens.shape[0]
        part = -(-batch // _PARTS)
        order = jnp.argsort(~finished, stable=True).astype(jnp.int32)  # finished ones first

        def extend(turn: jax.Array, caches: Caches) -> Caches:
            # Rows that are not finished write columns that nobody reads before they write again.
            rows = jax.lax.dynamic_slice_in_dim(order, turn * part, part)
            return commit(
                context.weights,
                cfg,
                ids[rows],
                positions[rows],
                caches,
                cache.filled[rows],
                own_mask,
                column < cache.filled[rows][:, None],
                rows,
            )[0]

        turns = -(-jnp.sum(finished) // part)
        caches = jax.lax.fori_loop(0, turns, extend, cache.caches)
        filled = jnp.where(finished, cache.filled + size, cache.filled)
        positions, ids = block(filled)
        real = positions < end
        hidden = denoise_hidden(
            context.weights,
            cfg,
            ids,
            rope_of(cfg, positions),
            caches,
            column < filled[:, None],
            real[:, None, :],
        )
        place = positions - canvas.prompt_len[:, None]
        places = jnp.where((place >= 0) & real, place, canvas.gen_len)
        scores = BlockScores(hidden, places, context.pooled_prompt, masked_mean(hidden, real))
        return scores, BlockCache(caches, filled)

    return BlockScoring(begin, score)
