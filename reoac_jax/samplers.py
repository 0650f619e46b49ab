"""Plain samplers: what the backbone does without a policy.

Confidence decoding writes, at every forward pass, the masked positions the model is surest of:
a fixed share of what remains (`num_steps` passes in all), or every position that a rule of
parallel confidence decoding allows, at least one (`unmasking`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.unmasking import before_eos, unmask


class Decoded(NamedTuple):
    """gen_ids [B, G] int32 and the number of forward passes each row needed, [B] int32."""

    gen_ids: jax.Array
    forwards: jax.Array


class _State(NamedTuple):
    step: jax.Array
    gen_ids: jax.Array
    forwards: jax.Array
    cache: Any


def top_token(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(ids int32, probability float32) of the best token, each [...], of logits [..., V]."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    peak = jnp.max(logits, axis=-1)
    return best, 1.0 / jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)


def confidence_decode(
    backbone: Backbone,
    params: Params,
    canvas: Canvas,
    *,
    num_steps: int,
    threshold: float | None = None,
    factor: float | None = None,
    stop_at_eos: bool = False,
) -> Decoded:
    """Fill every canvas, most confident positions first. Greedy and deterministic.

    Args:
      canvas: batch whose canvas holds mask ids where something is to be written.
      num_steps: most forward passes; step t writes ceil(masked / passes left) positions.
      threshold: if given, also write every position with probability >= threshold, and at least
        one; rows then finish early.
      factor: if given, the factor rule of `unmask`, likewise.
      stop_at_eos: positions behind the first end token need not be written.

    Returns:
      Decoded; rows that are complete stop counting forwards.
    """
    if backbone.blocks is None:
        context, cache = backbone.begin(params, canvas), ()
    else:
        context, cache = backbone.blocks.begin(params, canvas)
    start = canvas.gen_ids()

    def look(
        cache: Any, gen_ids: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, Any]:
        """Best token, its probability, and where it may be written, each [B, G]; the cache."""
        if backbone.blocks is None:
            scores = backbone.score(params, context, canvas, gen_ids, t)
            return (*top_token(backbone.logits(params, scores.hidden)), scores.editable, cache)
        block, cache = backbone.blocks.score(context, cache, canvas, gen_ids)
        token, confidence = top_token(backbone.logits(params, block.hidden))
        # What is not scored and yet has to be written (last pass) ends the answer.
        return (
            block.spread(token, canvas.gen_len, backbone.eos_id),
            block.spread(confidence, canvas.gen_len, 0.0),
            block.spread(jnp.ones_like(token, bool), canvas.gen_len, False),
            cache,
        )

    def open_positions(gen_ids: jax.Array) -> jax.Array:
        masked = gen_ids == backbone.mask_id  # [B, G]
        return masked & before_eos(gen_ids, backbone.eos_id) if stop_at_eos else masked

    def unfinished(state: _State) -> jax.Array:
        return (state.step < num_steps) & jnp.any(open_positions(state.gen_ids))

    def body(state: _State) -> _State:
        masked = open_positions(state.gen_ids)
        active = jnp.any(masked, axis=1)
        remaining = jnp.sum(masked, axis=1)
        t = remaining / canvas.gen_len
        token, confidence, editable, cache = look(state.cache, state.gen_ids, t)
        passes_left = jnp.maximum(num_steps - state.step, 1)
        candidates = masked
        if editable is not None:
            # The last pass completes the canvas, whatever the order of the blocks.
            candidates = masked & (editable | (passes_left == 1))
        even = -(-remaining // passes_left)
        at_least = even
        if threshold is not None or factor is not None:
            # Without the floor on the last pass a canvas could stay incomplete.
            at_least = jnp.where(passes_left == 1, remaining, 1)
        write = unmask(confidence, candidates, at_least, threshold=threshold, factor=factor)
        gen_ids = jnp.where(write, token, state.gen_ids)
        return _State(state.step + 1, gen_ids, state.forwards + active, cache)

    zero = jnp.zeros(start.shape[0], jnp.int32)
    final = jax.lax.while_loop(unfinished, body, _State(jnp.int32(0), start, zero, cache))
    return Decoded(final.gen_ids, final.forwards)
