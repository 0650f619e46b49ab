"""Plain samplers: what the backbone does without a policy.

Confidence decoding writes, at every forward pass, the masked positions the model is surest of:
a fixed share of what remains (`num_steps` passes in all), or every position that a rule of
parallel confidence decoding allows, at least one (`unmasking`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.unmasking import unmask


class Decoded(NamedTuple):
    """gen_ids [B, G] int32 and the number of forward passes each row needed, [B] int32."""

    gen_ids: jax.Array
    forwards: jax.Array


class _State(NamedTuple):
    step: jax.Array
    gen_ids: jax.Array
    forwards: jax.Array


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
) -> Decoded:
    """Fill every canvas, most confident positions first. Greedy and deterministic.

    Args:
      canvas: batch whose canvas holds mask ids where something is to be written.
      num_steps: most forward passes; step t writes ceil(masked / passes left) positions.
      threshold: if given, also write every position with probability >= threshold, and at least
        one; rows then finish early.
      factor: if given, the factor rule of `unmask`, likewise.

    Returns:
      Decoded; rows that are complete stop counting forwards.
    """
    context = backbone.begin(params, canvas)
    start = canvas.gen_ids()

    def unfinished(state: _State) -> jax.Array:
        return (state.step < num_steps) & jnp.any(state.gen_ids == backbone.mask_id)

    def body(state: _State) -> _State:
        masked = state.gen_ids == backbone.mask_id  # [B, G]
        active = jnp.any(masked, axis=1)
        remaining = jnp.sum(masked, axis=1)
        t = remaining / canvas.gen_len
        scores = backbone.score(params, context, canvas, state.gen_ids, t)
        token, confidence = top_token(backbone.logits(params, scores.hidden))
        passes_left = jnp.maximum(num_steps - state.step, 1)
        candidates = masked
        if scores.editable is not None:
            # The last pass completes the canvas, whatever the order of the blocks.
            candidates = masked & (scores.editable | (passes_left == 1))
        even = -(-remaining // passes_left)
        at_least = even
        if threshold is not None or factor is not None:
            # Without the floor on the last pass a canvas could stay incomplete.
            at_least = jnp.where(passes_left == 1, remaining, 1)
        write = unmask(confidence, candidates, at_least, threshold=threshold, factor=factor)
        gen_ids = jnp.where(write, token, state.gen_ids)
        return _State(state.step + 1, gen_ids, state.forwards + active)

    zero = jnp.zeros(start.shape[0], jnp.int32)
    final = jax.lax.while_loop(unfinished, body, _State(jnp.int32(0), start, zero))
    return Decoded(final.gen_ids, final.forwards)
