"""Block decoding of E2D2: finish a block by a few denoising steps, encode it, go on.

The whole generation is one compiled function: an outer loop over blocks, an inner loop over
denoising steps, both of dynamic length. Prompts of different lengths share a batch: every row has
its own positions and mask, and all rows write the same cache columns.

Columns of the caches: first the encoded part of the prompts (right-padded), then the blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.lm.layers import Params
from reoac_jax.backbone import noise
from reoac_jax.backbone.denoising import (
    DecodeSettings,
    posterior_step,
    predict_open_step,
    predict_step,
    reads_open_only,
)
from reoac_jax.backbone.e2d2 import E2D2Config, rope_of
from reoac_jax.backbone.e2d2_cache import (
    Caches,
    DecodeWeights,
    best_tokens,
    commit,
    decode_weights,
    denoise_hidden,
    empty_caches,
    head_logits,
    head_sizes,
)

LAST_TIME = 1e-5


class Trace(NamedTuple):
    """Every denoising step, in order; entries beyond `decoder_calls` are zero.

    Attributes:
        tokens: [N, B, S] int32 decoder inputs.
        logits: [N, B, S, V] float32 raw decoder outputs.
    """

    tokens: jax.Array
    logits: jax.Array


class Generation(NamedTuple):
    """Generated tokens.

    Attributes:
        tokens: [B, G] int32; pad ids behind the end token.
        lengths: [B] int32, tokens up to and with the end token.
        encoder_calls: int32, prompt included.
        decoder_calls: int32.
        steps: [blocks] int32, denoising steps of every block.
        trace: The steps, when they were asked for.
    """

    tokens: jax.Array
    lengths: jax.Array
    encoder_calls: jax.Array
    decoder_calls: jax.Array
    steps: jax.Array
    trace: Trace | None


class _State(NamedTuple):
    """Carry of the loop over blocks."""

    block: jax.Array
    canvas: jax.Array  # [B, blocks * S] from each row's first block on
    caches: Caches
    done: jax.Array  # [B]
    encoder_calls: jax.Array
    decoder_calls: jax.Array
    steps: jax.Array  # [blocks]
    trace: Trace | None


class _Denoising(NamedTuple):
    """Carry of the loop over denoising steps of one block."""

    step: jax.Array
    ids: jax.Array  # [B, S]
    trace: Trace | None


def generate(
    params: Params | DecodeWeights,
    cfg: E2D2Config,
    prompt: jax.Array,
    prompt_len: jax.Array,
    *,
    max_new_tokens: int,
    settings: DecodeSettings | None = None,
    key: jax.Array | None = None,
    row_id: jax.Array | None = None,
    record: bool = False,
) -> Generation:
    """Continues prompts block by block.

    Compiles once per shape of `prompt` and `max_new_tokens`: pad prompts to a few widths.

    Args:
        params: Parameter tree, or `decode_weights` of it to save the copy per call.
        cfg: The network.
        prompt: [B, P] int32, right-padded.
        prompt_len: [B] int32.
        max_new_tokens: G.
        settings: Default: `DecodeSettings()`.
        key: RNG key, needed unless greedy.
        row_id: [B] uint32 folded into each row's key; default 0..B-1.
        record: Also return every decoder input and output.

    Returns:
        The generated tokens.

    Raises:
        UserError: Sampling without a key.
    """
    settings = settings or DecodeSettings()
    if key is None:
        if not settings.greedy or settings.confidence == "none":
            raise UserError("sampled decoding needs a random key")
        key = jax.random.key(0)
    if row_id is None:
        row_id = jnp.arange(prompt.shape[0], dtype=jnp.uint32)
    weights = params if isinstance(params, DecodeWeights) else _weights_jit(params, cfg)
    return _generate(
        weights, prompt, prompt_len, key, row_id, cfg, settings, max_new_tokens, record
    )


_weights_jit = jax.jit(decode_weights, static_argnums=1)


@functools.partial(jax.jit, static_argnames=("cfg", "settings", "max_new_tokens", "record"))
def _generate(
    weights: DecodeWeights,
    prompt: jax.Array,
    prompt_len: jax.Array,
    key: jax.Array,
    row_id: jax.Array,
    cfg: E2D2Config,
    settings: DecodeSettings,
    max_new_tokens: int,
    record: bool,
) -> Generation:
    size = cfg.block_size
    batch, width = prompt.shape
    # The prompt's part that is encoded before the first block: off tokens of `encoded` columns.
    off = prompt_len // size * size if settings.align else prompt_len
    encoded = width // size * size if settings.align else width
    new_in_blocks = prompt_len + max_new_tokens - off  # tokens from the first block's start on
    row_blocks = -(-new_in_blocks // size)
    if settings.original_blocks:
        row_blocks = new_in_blocks // size
    blocks = -(-(max_new_tokens + (size - 1 if settings.align else 0)) // size)
    capacity = encoded + blocks * size
    column = jnp.arange(capacity)

    canvas_position = off[:, None] + jnp.arange(blocks * size)  # [B, blocks * S]
    tail = jnp.take_along_axis(prompt, jnp.minimum(canvas_position, width - 1), axis=1)
    canvas = jnp.where(canvas_position < prompt_len[:, None], tail, cfg.mask_id)

    caches = empty_caches(cfg, batch, capacity)
    if encoded:
        positions = jnp.broadcast_to(jnp.arange(encoded, dtype=jnp.int32), (batch, encoded))
        mask = prompt_mask(cfg, positions, off)
        ids = prompt[:, :encoded]
        caches, _ = commit(weights, cfg, ids, positions, caches, 0, mask, None)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_id)
    own_mask = None
    if cfg.encoder_causal:
        own_mask = jnp.tri(size, dtype=bool)[None]
    total_steps = blocks * settings.steps_per_block(size)
    trace = None
    if record:
        logits = jnp.zeros((total_steps, batch, size, cfg.vocab_size), jnp.float32)
        trace = Trace(jnp.zeros((total_steps, batch, size), jnp.int32), logits)

    def context_mask(block: jax.Array) -> jax.Array:
        filled = (column >= encoded) & (column < encoded + block * size)
        return (column < off[:, None]) | filled  # [B, C]

    def body(state: _State) -> _State:
        start = state.block * size
        positions = off[:, None] + start + jnp.arange(size)  # [B, S]
        mask = context_mask(state.block)
        inner = _denoise_block(weights, cfg, settings, row_keys, state, positions, mask)
        written = positions >= prompt_len[:, None]
        ended = jnp.any((inner.ids == cfg.eos_id) & written, axis=1) & settings.stop_at_eos
        done = state.done | ended | (state.block + 1 >= row_blocks)
        more = settings.original_blocks | ~jnp.all(done)
        # A loop of at most one round: unlike a conditional it extends the caches in place.
        caches = jax.lax.fori_loop(
            0,
            jnp.asarray(more, jnp.int32),
            lambda _, c: commit(
                weights, cfg, inner.ids, positions, c, encoded + start, own_mask, mask
            )[0],
            state.caches,
        )
        return _State(
            block=state.block + 1,
            canvas=jax.lax.dynamic_update_slice_in_dim(state.canvas, inner.ids, start, axis=1),
            caches=caches,
            done=done,
            encoder_calls=state.encoder_calls + more,
            decoder_calls=state.decoder_calls + inner.step,
            steps=state.steps.at[state.block].set(inner.step),
            trace=inner.trace,
        )

    final = jax.lax.while_loop(
        lambda state: ~jnp.all(state.done),
        body,
        _State(
            block=jnp.int32(0),
            canvas=canvas,
            caches=caches,
            done=row_blocks <= 0,
            encoder_calls=jnp.int32(encoded > 0),
            decoder_calls=jnp.int32(0),
            steps=jnp.zeros(blocks, jnp.int32),
            trace=trace,
        ),
    )
    index = (prompt_len - off)[:, None] + jnp.arange(max_new_tokens)
    tokens = jnp.take_along_axis(final.canvas, index, axis=1)  # [B, G]
    lengths = jnp.full((batch,), max_new_tokens, jnp.int32)
    if settings.stop_at_eos:
        is_end = tokens == cfg.eos_id
        found = jnp.argmax(is_end, axis=1).astype(jnp.int32) + 1
        lengths = jnp.where(jnp.any(is_end, axis=1), found, lengths)
        tokens = jnp.where(jnp.arange(max_new_tokens) < lengths[:, None], tokens, cfg.pad_id)
    return Generation(
        tokens, lengths, final.encoder_calls, final.decoder_calls, final.steps, final.trace
    )


def prompt_mask(cfg: E2D2Config, positions: jax.Array, off: jax.Array) -> jax.Array:
    """Which prompt keys a prompt query sees, bool [B, P, P]."""
    real = (positions < off[:, None])[:, None, :]  # [B, 1, P]
    query, key = positions[:, :, None], positions[:, None, :]
    if cfg.encoder_causal:
        return real & (query >= key)
    if cfg.prompt_attention == "block_causal":
        return real & (query // cfg.block_size >= key // cfg.block_size)
    return jnp.broadcast_to(real, (*positions.shape, positions.shape[1]))


def _denoise_block(
    weights: DecodeWeights,
    cfg: E2D2Config,
    settings: DecodeSettings,
    row_keys: jax.Array,
    state: _State,
    positions: jax.Array,
    context_mask: jax.Array,
) -> _Denoising:
    """Runs denoising steps on the present block until no unfinished row has a mask.

    Args:
        weights: From `decode_weights`.
        cfg: The network.
        settings: Strategy.
        row_keys: [B], one key per row and generation.
        state: The generation so far.
        positions: [B, S] int32 of the block.
        context_mask: bool [B, C] filled cache columns.
    """
    size = cfg.block_size
    num_steps = settings.steps_per_block(size)
    times = jnp.linspace(1.0, LAST_TIME, num_steps + 1)  # step i goes from times[i] to times[i+1]
    alpha = noise.make_schedule(cfg.noise).alpha(times)
    noise_share = jnp.floor((1.0 - alpha[1:]) * size).astype(jnp.int32)  # [steps]
    rope = rope_of(cfg, positions)
    ids = jax.lax.dynamic_slice_in_dim(state.canvas, state.block * size, size, axis=1)

    def open_positions(ids: jax.Array) -> jax.Array:
        return (ids == cfg.mask_id) & ~state.done[:, None]

    def body(inner: _Denoising) -> _Denoising:
        hidden = denoise_hidden(weights, cfg, inner.ids, rope, state.caches, context_mask)
        trace = inner.trace
        masked = open_positions(inner.ids)
        count = state.block * num_steps + inner.step
        keys = jax.vmap(lambda k: jax.random.fold_in(k, count))(row_keys)
        if trace is None and reads_open_only(settings):
            best = functools.partial(best_tokens, weights, suppress_id=cfg.mask_id)
            share, sizes = noise_share[inner.step], head_sizes(weights, masked.size)
            token, write = predict_open_step(
                best, sizes, hidden, masked, share, keys, cfg, settings
            )
            return _Denoising(inner.step + 1, jnp.where(masked & write, token, inner.ids), None)
        logits = head_logits(weights, hidden)
        if trace is not None:
            at = state.decoder_calls + inner.step
            trace = Trace(trace.tokens.at[at].set(inner.ids), trace.logits.at[at].set(logits))
        if settings.strategy == "posterior":
            alphas = (alpha[inner.step], alpha[inner.step + 1])
            last = inner.step == num_steps - 1
            token, write = posterior_step(logits, alphas, last, keys, cfg, settings)
        else:
            share = noise_share[inner.step]
            token, write = predict_step(logits, masked, share, keys, cfg, settings)
        return _Denoising(inner.step + 1, jnp.where(masked & write, token, inner.ids), trace)

    return jax.lax.while_loop(
        lambda inner: (inner.step < num_steps) & jnp.any(open_positions(inner.ids)),
        body,
        _Denoising(jnp.int32(0), ids, state.trace),
    )
