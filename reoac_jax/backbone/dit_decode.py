"""Block-wise parallel decoding of MDLM and SEDD, with approximate key/value caches.

The canvas is finished block by block. Without a cache every step is a pass over the whole
sequence. With one, the first step of a block is such a pass and keeps every key and value; the
block's further steps recompute fewer tokens against them (Fast-dLLM, Wu et al., 2025):

  prefix  the block and everything behind it; what lies before the block stays as it was;
  dual    the block alone; the still masked part behind it stays as it was, too.

Attention is bidirectional, so kept keys and values are those of tokens that did not see the latest
changes: an approximation, exact where a block takes a single step. (E2D2's caches are exact: see
`e2d2_decode`.) The whole generation is one compiled function.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.lm.layers import KeyValue, Params, cache_layout
from reoac_jax.backbone import dit
from reoac_jax.backbone.base import Canvas
from reoac_jax.backbone.dit import DiTConfig
from reoac_jax.backbone.e2d2 import take_positions
from reoac_jax.sampling import summarise_scores
from reoac_jax.unmasking import unmask

CACHES = ("none", "prefix", "dual")


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """How blocks are filled; hashable, a static argument. Greedy.

    Attributes:
        block_size: S; divides the canvas length.
        cache: "none" | "prefix" | "dual".
        num_steps: most steps per block, 0 = S: without a rule one token per step.
        threshold: see `unmask`; None = off.
        factor: see `unmask`; None = off.
        stop_at_eos: a row ends with the block in which it wrote the end token.
    """

    block_size: int
    cache: str = "none"
    num_steps: int = 0
    threshold: float | None = None
    factor: float | None = None
    stop_at_eos: bool = False

    def __post_init__(self) -> None:
        if self.cache not in CACHES:
            raise UserError(f"block decoding cache '{self.cache}' is none of {', '.join(CACHES)}")
        if self.block_size < 1 or self.num_steps < 0:
            raise UserError("block decoding needs block_size >= 1 and num_steps >= 0")


class BlockDecoded(NamedTuple):
    """What block decoding gives.

    Attributes:
        gen_ids: [B, G] int32; pad ids behind the block in which a row ended.
        full_passes: int32, passes over the whole sequence.
        cached_passes: int32, passes over a part of it.
        steps: [blocks] int32, steps of every block.
    """

    gen_ids: jax.Array
    full_passes: jax.Array
    cached_passes: jax.Array
    steps: jax.Array


class _State(NamedTuple):
    block: jax.Array
    gen_ids: jax.Array
    done: jax.Array  # [B]
    full_passes: jax.Array
    cached_passes: jax.Array
    steps: jax.Array


class _Step(NamedTuple):
    step: jax.Array
    gen_ids: jax.Array


def decode_blocks(
    params: Params, cfg: DiTConfig, canvas: Canvas, settings: BlockSettings
) -> BlockDecoded:
    """Fill the masks of every canvas, block by block, most confident positions first.

    Args:
        params: Parameter tree.
        cfg: An absorbing network.
        canvas: Prompts of any lengths, each followed by its canvas.
        settings: Static.

    Raises:
        UserError: The block size does not divide the canvas length.
    """
    size, gen_len = settings.block_size, canvas.gen_len
    if gen_len % size:
        raise UserError(f"block size {size} does not divide the canvas length {gen_len}")
    blocks, batch = gen_len // size, canvas.tokens.shape[0]
    num_steps = settings.num_steps or size
    ruled = settings.threshold is not None or settings.factor is not None
    column = jnp.arange(canvas.tokens.shape[1], dtype=jnp.int32)
    real = canvas.attention_mask

    def modulation(gen_ids: jax.Array) -> dit.Modulation:
        sigma = None
        if cfg.time_conditioning:
            sigma = cfg.schedule.sigma(jnp.mean(gen_ids == cfg.mask_id, axis=1))
        return dit.modulation(params, cfg, sigma)

    fixed = None if cfg.time_conditioning else modulation(canvas.gen_ids())

    def full_pass(
        gen_ids: jax.Array, block_at: jax.Array, collect: bool
    ) -> tuple[jax.Array, KeyValue | None]:
        """(states of the head at the block [B, S, D], keys and values of every token)."""
        mods = modulation(gen_ids) if fixed is None else fixed
        tokens = canvas.with_gen(gen_ids).tokens
        positions = jnp.broadcast_to(column, tokens.shape)
        done = dit.run_blocks(
            params,
            cfg,
            tokens,
            mods,
            positions=positions,
            mask=real[:, None],
            collect_kv=collect,
        )
        hidden = take_positions(done.hidden, block_at)
        return dit.final_states(params, cfg, hidden, mods), done.kv

    def partial_pass(
        gen_ids: jax.Array, cache: KeyValue, start: jax.Array | int, span: int
    ) -> jax.Array:
        """States of the head at the block, from a pass over `span` canvas tokens from `start`."""
        mods = modulation(gen_ids) if fixed is None else fixed
        ids = jax.lax.dynamic_slice_in_dim(gen_ids, start, span, axis=1)
        first = canvas.prompt_len + start
        positions = first[:, None] + jnp.arange(span, dtype=jnp.int32)
        inside = (column >= first[:, None]) & (column < first[:, None] + span)
        kept = (real & ~inside)[:, None]  # [B, 1, L]
        hidden = dit.run_blocks(
            params, cfg, ids, mods, positions=positions, mask=None, context=(*cache, kept)
        ).hidden
        return dit.final_states(params, cfg, hidden[:, :size], mods)

    def write(
        gen_ids: jax.Array,
        states: jax.Array,
        start: jax.Array | int,
        step: jax.Array,
        open_: jax.Array,
    ) -> jax.Array:
        """gen_ids with the positions of one step written."""
        ids = jax.lax.dynamic_slice_in_dim(gen_ids, start, size, axis=1)
        summary = summarise_scores(dit.head(params, states), suppress_id=cfg.mask_id)
        masked = (ids == cfg.mask_id) & open_[:, None]
        remaining = jnp.sum(masked, axis=1)
        steps_left = num_steps - step
        even = -(-remaining // jnp.maximum(steps_left, 1))
        # With a rule, one position is enough; the last step completes the block in any case.
        at_least = jnp.where(steps_left <= 1, remaining, 1 if ruled else even)
        chosen = unmask(
            summary.confidence,
            masked,
            at_least,
            threshold=settings.threshold,
            factor=settings.factor,
        )
        ids = jnp.where(chosen, summary.best, ids)
        return jax.lax.dynamic_update_slice_in_dim(gen_ids, ids, start, axis=1)

    def open_in(gen_ids: jax.Array, start: jax.Array | int, done: jax.Array) -> jax.Array:
        ids = jax.lax.dynamic_slice_in_dim(gen_ids, start, size, axis=1)
        return jnp.any((ids == cfg.mask_id) & ~done[:, None])

    def fill(state: _State, start: jax.Array | int, span: int) -> _State:
        """One block; `span` tokens from its start are recomputed by cached steps."""
        block_at = canvas.prompt_len[:, None] + start + jnp.arange(size, dtype=jnp.int32)
        open_ = ~state.done
        cached = settings.cache != "none"
        states, kv = full_pass(state.gen_ids, block_at, cached)
        gen_ids = write(state.gen_ids, states, start, jnp.int32(0), open_)
        cache: KeyValue | None = None
        if kv is not None:
            cache = jax.vmap(cache_layout)(*kv)

        def body(carry: _Step) -> _Step:
            if cache is None:
                states, _ = full_pass(carry.gen_ids, block_at, False)
            else:
                states = partial_pass(carry.gen_ids, cache, start, span)
            after = write(carry.gen_ids, states, start, carry.step, open_)
            return _Step(carry.step + 1, after)

        last = jax.lax.while_loop(
            lambda carry: (carry.step < num_steps) & open_in(carry.gen_ids, start, state.done),
            body,
            _Step(jnp.int32(1), gen_ids),
        )
        more = last.step - 1
        ended = jnp.zeros(batch, bool)
        if settings.stop_at_eos:
            ids = jax.lax.dynamic_slice_in_dim(last.gen_ids, start, size, axis=1)
            ended = jnp.any(ids == cfg.eos_id, axis=1)
        return _State(
            block=state.block + 1,
            gen_ids=last.gen_ids,
            done=state.done | ended,
            full_passes=state.full_passes + (1 if cached else last.step),
            cached_passes=state.cached_passes + (more if cached else 0),
            steps=state.steps.at[state.block].set(last.step),
        )

    def run(state: _State, start: jax.Array | int, span: int) -> _State:
        """`fill`, unless nothing is masked there."""
        return jax.lax.cond(
            open_in(state.gen_ids, start, state.done),
            lambda s: fill(s, start, span),
            lambda s: s._replace(block=s.block + 1),
            state,
        )

    zero = jnp.int32(0)
    state = _State(
        block=zero,
        gen_ids=canvas.gen_ids(),
        done=jnp.zeros(batch, bool),
        full_passes=zero,
        cached_passes=zero,
        steps=jnp.zeros(blocks, jnp.int32),
    )
    if settings.cache == "prefix":
        # What is recomputed shrinks from block to block, so every block has its own shapes.
        for index in range(blocks):
            state = run(state, index * size, gen_len - index * size)
    else:
        state = jax.lax.while_loop(
            lambda s: (s.block < blocks) & ~jnp.all(s.done),
            lambda s: run(s, s.block * size, size),
            state,
        )
    gen_ids = jnp.where(state.gen_ids == cfg.mask_id, cfg.pad_id, state.gen_ids)
    return BlockDecoded(gen_ids, state.full_passes, state.cached_passes, state.steps)
