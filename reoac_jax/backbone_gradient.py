"""The backbone's share of an update of algo="plus": policy gradient and supervised loss."""

from typing import Any

import jax
import jax.numpy as jnp

from common.dist import DATA_AXIS
from common.fsdp import Layout
from common.lm.layers import Params
from common.spmd import own_slice, sum_over_devices
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.counted_loss import counted_loss
from reoac_jax.learner_state import LearnerSettings, Metrics
from reoac_jax.masked_diffusion import noise_canvas


def backbone_gradient(
    backbone: Backbone,
    settings: LearnerSettings,
    layout: Layout,
    params: Params,
    canvas: Canvas,
    gen_before: jax.Array,
    gen_after: jax.Array,
    written: jax.Array,
    advantage: jax.Array,
    target: jax.Array,
    row_key: jax.Array,
    noise_key: jax.Array,
) -> tuple[Params, Metrics]:
    """Gradient of the backbone's policy-gradient and supervised terms over drawn decisions.

    Each drawn decision (b, t) contributes two rows: its own canvas with the tokens written there,
    weighted by the advantage, and its prompt with the noised gold canvas.

    Args:
      gen_before, gen_after: [B, T, G] int32; written: bool [B, T, G]; advantage: [B, T].
      target: [B, G] int32.

    Returns:
      this device's share of the gradient, and metrics, equal on all devices.
    """
    batch, horizon, gen_len = written.shape
    useful = jnp.any(written, axis=2).reshape(-1)
    count = min(settings.backbone_rows or batch * horizon, batch * horizon)
    micro = settings.backbone_batch
    devices = jax.lax.axis_size(DATA_AXIS)
    rows = -(-count // (micro * devices)) * micro * devices
    # Useful decisions first, in random order; what is left over fills up with weight zero.
    rank = jax.random.uniform(row_key, useful.shape) + (~useful)
    order = jnp.argsort(rank)
    index = jnp.resize(order, (rows,))
    real = useful[index] & (jnp.arange(rows) < count)
    level_key, noise_key = jax.random.split(noise_key)
    keys = jax.vmap(lambda i: jax.random.fold_in(noise_key, i))(jnp.arange(rows))
    # Over the rows that count, not the padded ones: else they would change with the devices.
    level = jnp.resize((jax.random.permutation(level_key, count) + 0.5) / count, (rows,))

    def noise(key: jax.Array, t: jax.Array, gold: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids, hidden = noise_canvas(key, t[None], gold[None], backbone.mask_id)
        return ids[0], hidden[0]

    row, t = index // horizon, index % horizon
    noised, hidden = jax.vmap(noise)(keys, level, target[row])
    chosen = {
        "canvas": jax.tree.map(lambda x: x[row], canvas),
        "before": gen_before[row, t],
        "after": gen_after[row, t],
        "written": written[row, t] & real[:, None],
        "advantage": advantage[row, t],
        "noised": noised,
        "hidden": hidden & real[:, None],
        "gold": target[row],
    }
    num_written = jnp.maximum(chosen["written"].sum(), 1)
    num_hidden = jnp.maximum(chosen["hidden"].sum(), 1)
    mine = jax.tree.map(own_slice, chosen)
    mine = jax.tree.map(lambda x: x.reshape(-1, micro, *x.shape[1:]), mine)

    def states(p: Params, context: Any, part: Any, ids: jax.Array) -> jax.Array:
        level = jnp.mean(ids == backbone.mask_id, axis=1)
        return backbone.score(p, context, part["canvas"], ids, level).hidden

    def loss(p: Params, part: Any) -> tuple[jax.Array, Metrics]:
        # Sums over this micro-batch, divided by the counts of the whole update.
        context = backbone.begin(p, part["canvas"])
        terms = []
        if settings.pg_weight:
            weight = jnp.where(part["written"], part["advantage"][:, None], 0.0) / num_written
            hidden = states(p, context, part, part["before"])
            terms.append(("backbone/pg", settings.pg_weight, hidden, part["after"], weight))
        if settings.sft_weight:
            weight = part["hidden"].astype(jnp.float32) / num_hidden
            hidden = states(p, context, part, part["noised"])
            terms.append(("backbone/sft", settings.sft_weight, hidden, part["gold"], weight))
        metrics = {"backbone/pg": jnp.float32(0.0), "backbone/sft": jnp.float32(0.0)}
        if not terms:
            return jnp.float32(0.0), metrics | {"backbone/loss": jnp.float32(0.0)}
        total, nll = counted_loss(
            *backbone.training_head(p),
            jnp.concatenate([hidden.reshape(-1, hidden.shape[-1]) for _, _, hidden, _, _ in terms]),
            jnp.concatenate([ids.reshape(-1) for _, _, _, ids, _ in terms]),
            jnp.concatenate([factor * weight.reshape(-1) for _, factor, _, _, weight in terms]),
        )
        for (name, _, _, _, weight), part_nll in zip(
            terms, jnp.split(nll, len(terms)), strict=True
        ):
            metrics[name] = jnp.sum(weight.reshape(-1) * part_nll)
        return settings.weights[2] * total, metrics | {"backbone/loss": total}

    tuning = backbone.finetuning
    trained = tuning.trainable(params)
    drop_key = jax.random.fold_in(noise_key, rows)

    def accumulate(carry: Any, part: Any) -> tuple[Any, None]:
        index, part = part
        key = jax.random.fold_in(drop_key, index)

        def of_trained(values: Params) -> tuple[jax.Array, Metrics]:
            return loss(tuning.forward(params, values, key), part)

        (_, metrics), grads = jax.value_and_grad(of_trained, has_aux=True)(trained)
        return jax.tree.map(jnp.add, carry, (grads, metrics)), None

    zero = jnp.float32(0.0)
    start = (
        jax.tree.map(jnp.zeros_like, trained),
        {"backbone/pg": zero, "backbone/sft": zero, "backbone/loss": zero},
    )
    turns = rows // (micro * devices)
    # Numbered over all devices, so that no two micro-batches drop the same inputs.
    numbers = jax.lax.axis_index(DATA_AXIS) * turns + jnp.arange(turns)
    (grads, metrics), _ = jax.lax.scan(accumulate, start, (numbers, mine))
    return layout.reduce(grads), sum_over_devices(metrics)
