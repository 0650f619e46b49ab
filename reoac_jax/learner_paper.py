"""The update of algo="paper": full-buffer gradient steps on critic, actor and backbone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from common.dist import DATA_AXIS
from common.fsdp import Layout
from common.lm.layers import Params
from common.spmd import own_slice, sum_over_devices
from reoac_jax import losses
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.counted_loss import counted_loss
from reoac_jax.learner_state import WHOLE_LAYOUT, LearnerSettings, LearnerState, Metrics
from reoac_jax.networks import heads_apply
from reoac_jax.rollout_paper import noise_level
from reoac_jax.settings import RolloutSettings
from reoac_jax.types import BatchArray


@flax.struct.dataclass
class PaperEpisode:
    """What the buffer keeps of an episode; without the batch axis, [capacity, ...] when stacked.

    Attributes:
      features: [T, F] float32; operator: [T] int32, executed; gen_before: [T, G] int32;
      written: bool [T, G]; canvas: prompt and masks; returns: [] float32, R - lambda * cost;
      target: [P] int32 and target_len: [] int32, tokens of "prompt answer".
    """

    features: BatchArray
    operator: BatchArray
    gen_before: BatchArray
    written: BatchArray
    canvas: Canvas
    returns: BatchArray
    target: BatchArray
    target_len: BatchArray


def make_update_paper(
    backbone: Backbone,
    settings: LearnerSettings,
    rollout: RolloutSettings,
    layout: Layout = WHOLE_LAYOUT,
) -> Callable[[LearnerState, PaperEpisode, jax.Array], tuple[LearnerState, Metrics]]:
    """Per-shard update(state, buffer [capacity, ...], count []) -> (state, metrics).

    Rows at and beyond count are empty. critic_steps, actor_steps and backbone_steps full-buffer
    AdamW steps; critic and actor losses are then measured again, the backbone loss is that of its
    last gradient pass (measuring it again would cost another pass over every stored step).
    """
    actor_tx, critic_tx = settings.optimizer("actor"), settings.optimizer("critic")
    backbone_tx = settings.optimizer("backbone", layout)

    def update(
        state: LearnerState, buffer: PaperEpisode, count: jax.Array
    ) -> tuple[LearnerState, Metrics]:
        capacity, horizon = buffer.operator.shape
        live = jnp.repeat(jnp.arange(capacity) < count, horizon)  # [N]
        features = buffer.features.reshape(capacity * horizon, -1)
        operator = buffer.operator.reshape(-1)
        returns = jnp.repeat(buffer.returns, horizon)

        # Drawn only when dropout is on; the iteration makes a resumed run draw the same.
        drop_key = jax.random.fold_in(jax.random.key(0), state.iteration)
        critic_keys = jax.random.split(jax.random.fold_in(drop_key, 0), settings.critic_steps)
        actor_keys = jax.random.split(jax.random.fold_in(drop_key, 1), settings.actor_steps)

        def critic_loss(p: Params, key: jax.Array | None = None) -> losses.Loss:
            rate = settings.critic_dropout
            return losses.critic_loss(p, features, operator, returns, live, dropout=rate, key=key)

        def critic_step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, opt = carry
            grads, _ = jax.grad(critic_loss, has_aux=True)(params, key)
            updates, opt = critic_tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), None

        (critic, critic_opt), _ = jax.lax.scan(
            critic_step, (state.critic, state.critic_opt), critic_keys
        )
        q = heads_apply(critic, features)

        def actor_loss(p: Params, key: jax.Array | None = None) -> losses.Loss:
            return losses.actor_loss(
                p,
                q,
                features,
                settings.actor_temperature,
                live,
                dropout=settings.actor_dropout,
                key=key,
            )

        def actor_step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, opt = carry
            grads, _ = jax.grad(actor_loss, has_aux=True)(params, key)
            updates, opt = actor_tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), None

        (actor, actor_opt), _ = jax.lax.scan(actor_step, (state.actor, state.actor_opt), actor_keys)
        metrics = critic_loss(critic)[1] | actor_loss(actor)[1]

        params, backbone_opt = state.backbone, state.backbone_opt
        metrics |= {"backbone/loss": jnp.float32(0.0)}
        if settings.train_backbone:
            for step in range(settings.backbone_steps):
                grads, backbone_metrics = _backbone_gradient(
                    backbone,
                    settings,
                    rollout,
                    layout,
                    layout.whole(params),
                    buffer,
                    count,
                    jax.random.fold_in(drop_key, 2 + step),
                )
                part = backbone.finetuning.trainable(params)
                updates, backbone_opt = backbone_tx.update(grads, backbone_opt, part)
                params = backbone.finetuning.replace(params, optax.apply_updates(part, updates))
                metrics |= backbone_metrics
        weights = dict(
            zip(("critic_weight", "actor_weight", "backbone_weight"), settings.weights, strict=True)
        )
        parts = {f"{n}_loss": metrics[f"{n}/loss"] for n in ("critic", "actor", "backbone")}
        metrics["total_loss"] = jnp.asarray(losses.total_loss(parts, weights))
        return dataclasses.replace(
            state,
            actor=actor,
            critic=critic,
            target_critic=critic,
            backbone=params,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            backbone_opt=backbone_opt,
            iteration=state.iteration + 1,
        ), metrics

    return update


def _backbone_gradient(
    backbone: Backbone,
    settings: LearnerSettings,
    rollout: RolloutSettings,
    layout: Layout,
    params: Params,
    buffer: PaperEpisode,
    count: jax.Array,
    drop_key: jax.Array,
) -> tuple[Params, Metrics]:
    """Gradient of the return-weighted copying loss over every stored step, in micro-batches.

    Steps without a position of weight (nothing written inside the target, an empty place of the
    buffer, a return that counts as 0) have no gradient: they are sorted to the end and the loop
    stops before them.
    """
    capacity, horizon, gen_len = buffer.gen_before.shape
    micro = settings.backbone_batch
    devices = jax.lax.axis_size(DATA_AXIS)
    total = capacity * horizon
    rows = -(-total // (micro * devices)) * micro * devices
    positions = buffer.canvas.prompt_len[:, None, None] + jnp.arange(gen_len)  # [capacity, 1, G]
    counted = buffer.written & (positions < buffer.target_len[:, None, None])
    counted &= (jnp.arange(capacity) < count)[:, None, None]
    pairs = jnp.maximum(counted.sum(), 1).astype(jnp.float32)
    factor = losses.return_weights(
        buffer.returns,
        advantage_positive=settings.advantage_positive,
        advantage_clip=settings.advantage_clip,
    )  # [capacity]
    zero_weight = jnp.sum(counted & (factor == 0)[:, None, None])
    weight = jnp.where(counted, factor[:, None, None] / pairs, 0.0).reshape(total, gen_len)
    useful = jnp.any(weight != 0, axis=1)
    order = jnp.resize(jnp.argsort(~useful, stable=True), (rows,))
    weight = jnp.where((jnp.arange(rows) < total)[:, None], weight[order], 0.0)
    chosen = {"episode": order // horizon, "step": order % horizon, "weight": weight}

    def deal(x: jax.Array) -> jax.Array:
        """This device's rows [micro-batches, micro, ...]: micro-batches are dealt out in turn."""
        turns = x.reshape(-1, devices, micro, *x.shape[1:])
        return own_slice(jnp.moveaxis(turns, 1, 0))[0]

    mine = jax.tree.map(deal, chosen)

    def loss(p: Params, part: Any) -> jax.Array:
        rows = part["episode"]
        canvas = jax.tree.map(lambda x: x[rows], buffer.canvas)
        gen_ids = buffer.gen_before[rows, part["step"]]
        level = noise_level(rollout, part["step"])
        context = backbone.begin(p, canvas)
        hidden = backbone.score(p, context, canvas, gen_ids, level).hidden
        target = buffer.target[rows]
        index = jnp.clip(canvas.gen_index, 0, target.shape[1] - 1)
        value, _ = counted_loss(
            *backbone.training_head(p),
            hidden.reshape(-1, hidden.shape[-1]),
            jnp.take_along_axis(target, index, axis=1).reshape(-1),
            part["weight"].reshape(-1),
        )
        return value

    tuning = backbone.finetuning
    trained = tuning.trainable(params)

    def accumulate(i: jax.Array, carry: Any) -> Any:
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), mine)
        number = i * devices + jax.lax.axis_index(DATA_AXIS)
        key = jax.random.fold_in(drop_key, number)

        def of_trained(values: Params) -> jax.Array:
            return loss(tuning.forward(params, values, key), part)

        return jax.tree.map(jnp.add, carry, jax.value_and_grad(of_trained)(trained))

    turns = -(-jnp.sum(useful) // (micro * devices))
    start = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, trained))
    value, grads = jax.lax.fori_loop(0, turns, accumulate, start)
    value, grads = sum_over_devices(value), layout.reduce(grads)
    return grads, {"backbone/loss": value, "backbone/zero_weight_share": zero_weight / pairs}
