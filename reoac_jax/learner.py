"""The update of algo="plus": from graded episodes to new parameters, as one compiled call.

Every update is a per-shard function (`common.spmd`): the small actor and critic work is done on
all rows by every device, the backbone's forward and backward passes are split and summed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from common.fsdp import Layout
from common.lm.layers import Params
from common.spmd import all_rows
from reoac_jax import branch_losses, losses
from reoac_jax.advantages import gae, normalise_advantages
from reoac_jax.backbone.base import Backbone
from reoac_jax.backbone_gradient import backbone_gradient
from reoac_jax.episodes import Episodes
from reoac_jax.learner_state import WHOLE_LAYOUT, LearnerSettings, LearnerState, Metrics
from reoac_jax.learner_state import init_state as init_state
from reoac_jax.learner_state import state_specs as state_specs
from reoac_jax.networks import heads_apply, normalise, update_stats
from reoac_jax.types import OPERATORS


def step_rewards(
    settings: LearnerSettings, cost: jax.Array, active: jax.Array, reward: jax.Array
) -> jax.Array:
    """r_t = -lambda cost_t / (T max_cost), plus R at the last decision; [B, T].

    Args:
      cost: [B, T]; active: bool [B, T]; reward: [B].
    """
    price = settings.cost_lambda / (settings.max_steps * settings.max_cost)
    following = jnp.concatenate([active[:, 1:], jnp.zeros_like(active[:, :1])], axis=1)
    last = active & ~following
    return jnp.where(active, -price * cost, 0.0) + jnp.where(last, reward[:, None], 0.0)


def make_update_plus(
    backbone: Backbone, settings: LearnerSettings, layout: Layout = WHOLE_LAYOUT
) -> Callable[..., tuple[LearnerState, Metrics]]:
    """The update of algo="plus": PPO on the operator policy, Huber critic, backbone PG and SFT.

    Args:
      layout: where the backbone's parameters and moments lie.

    Returns:
      per-shard update(state, episodes, reward [B], target [B, G], key) -> (state, metrics), where
      rows b, b+1, .. b+group_size-1 of the global batch share a prompt.
    """
    actor_tx, critic_tx = settings.optimizer("actor"), settings.optimizer("critic")
    backbone_tx = settings.optimizer("backbone", layout)

    def update(
        state: LearnerState,
        episodes: Episodes,
        reward: jax.Array,
        target: jax.Array,
        key: jax.Array,
    ) -> tuple[LearnerState, Metrics]:
        steps, canvas, reward, target = all_rows((episodes.steps, episodes.canvas, reward, target))
        final_ids = all_rows(episodes.final_ids)
        active = steps.active
        rate = settings.rate(state.iteration)
        seen = normalise(state.stats, steps.features)  # [B, T, F]
        policy = jax.nn.softmax(
            losses.mask_logits(heads_apply(state.actor, seen), steps.valid), axis=-1
        )
        value = jnp.sum(policy * heads_apply(state.target_critic, seen), axis=-1)  # [B, T]
        value = jnp.where(active, value, 0.0)
        rewards = step_rewards(settings, steps.cost, active, reward)
        advantage, returns = gae(rewards, value, active, settings.gamma, settings.gae_lambda)
        advantage = normalise_advantages(
            advantage, active, settings.group_size, scale_by=settings.advantage_scale
        )

        flat = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]),
            (seen, steps.valid, steps.operator, steps.log_prob, advantage, returns, active),
        )
        trials = None
        if settings.branch_weight and episodes.branches is not None:
            price = settings.cost_lambda / (settings.max_steps * settings.max_cost)
            trials = branch_losses.tried_operators(
                all_rows(episodes.branches), seen, policy, steps.valid, price
            )
        shuffle_key, row_key, noise_key = jax.random.split(key, 3)
        total = active.size
        size = min(settings.minibatch, total)
        num_batches = total // size

        def minibatch(carry: Any, inputs: Any) -> tuple[Any, Metrics]:
            actor, critic, actor_opt, critic_opt = carry
            index, tried_index, drop_key = inputs
            actor_key, critic_key = jax.random.split(drop_key)
            x, valid, operator, old, adv, ret, live = jax.tree.map(lambda a: a[index], flat)

            part = None if trials is None else jax.tree.map(lambda a: a[tried_index], trials)

            def actor_loss(p: Params) -> tuple[jax.Array, Metrics]:
                loss, metrics = losses.ppo_loss(
                    heads_apply(p, x, dropout=settings.actor_dropout, key=actor_key),
                    valid,
                    operator,
                    old,
                    adv,
                    live,
                    clip=settings.clip,
                    entropy_weight=settings.entropy_weight,
                )
                if part is not None:
                    extra, more = branch_losses.tried_policy_loss(heads_apply(p, part.seen), part)
                    loss, metrics = loss + settings.branch_weight * extra, metrics | more
                return loss, metrics

            def critic_loss(p: Params) -> tuple[jax.Array, Metrics]:
                q = heads_apply(p, x, dropout=settings.critic_dropout, key=critic_key)
                loss, metrics = losses.huber_critic_loss(q, operator, ret, live)
                if part is not None:
                    extra, more = branch_losses.tried_critic_loss(heads_apply(p, part.seen), part)
                    loss, metrics = loss + settings.branch_weight * extra, metrics | more
                return loss, metrics

            (_, actor_metrics), grads = jax.value_and_grad(actor_loss, has_aux=True)(actor)
            grads = jax.tree.map(lambda g: g * settings.weights[1], grads)
            updates, actor_opt = actor_tx.update(grads, actor_opt, actor)
            actor = optax.apply_updates(actor, optax.tree.scale(rate, updates))
            (_, critic_metrics), grads = jax.value_and_grad(critic_loss, has_aux=True)(critic)
            grads = jax.tree.map(lambda g: g * settings.weights[0], grads)
            updates, critic_opt = critic_tx.update(grads, critic_opt, critic)
            critic = optax.apply_updates(critic, optax.tree.scale(rate, updates))
            return (actor, critic, actor_opt, critic_opt), actor_metrics | critic_metrics

        def epoch(carry: Any, epoch_key: jax.Array) -> tuple[Any, Metrics]:
            order_key, drop_key = jax.random.split(epoch_key)
            order = jax.random.permutation(order_key, total)[: num_batches * size]
            inputs = (
                order.reshape(num_batches, size),
                _tried_order(jax.random.fold_in(epoch_key, 2), trials, num_batches),
                jax.random.split(drop_key, num_batches),
            )
            return jax.lax.scan(minibatch, carry, inputs)

        carry = (state.actor, state.critic, state.actor_opt, state.critic_opt)
        carry, history = jax.lax.scan(epoch, carry, jax.random.split(shuffle_key, settings.epochs))
        actor, critic, actor_opt, critic_opt = carry
        metrics = {name: value.mean() for name, value in history.items()}
        target_critic = optax.incremental_update(
            critic, state.target_critic, 1.0 - settings.target_decay
        )

        params, backbone_opt = state.backbone, state.backbone_opt
        if settings.train_backbone:
            # A row's last decision is followed by its final canvas; later records say nothing.
            following = jnp.concatenate([active[:, 1:], jnp.zeros_like(active[:, :1])], axis=1)
            gen_after = jnp.where(
                following[..., None], jnp.roll(steps.gen_before, -1, axis=1), final_ids[:, None]
            )
            grads, backbone_metrics = backbone_gradient(
                backbone,
                settings,
                layout,
                layout.whole(params),
                canvas,
                steps.gen_before,
                gen_after,
                steps.written & active[..., None],
                advantage,
                target,
                row_key,
                noise_key,
            )
            part = backbone.finetuning.trainable(params)
            updates, backbone_opt = backbone_tx.update(grads, backbone_opt, part)
            part = optax.apply_updates(part, optax.tree.scale(rate, updates))
            params = backbone.finetuning.replace(params, part)
            metrics |= backbone_metrics
        else:
            metrics["backbone/loss"] = jnp.float32(0.0)
        metrics |= _episode_metrics(settings, steps, reward, advantage, returns, value)
        new_state = LearnerState(
            actor=actor,
            critic=critic,
            target_critic=target_critic,
            stats=update_stats(
                state.stats,
                steps.features.reshape(-1, steps.features.shape[-1]),
                active.reshape(-1),
            ),
            backbone=params,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            backbone_opt=backbone_opt,
            iteration=state.iteration + 1,
        )
        return new_state, metrics

    return update


def _tried_order(
    key: jax.Array, trials: branch_losses.TriedOperators | None, num_batches: int
) -> jax.Array | None:
    """Which states with trials go into which minibatch, [num_batches, size] int32."""
    if trials is None:
        return None
    count = trials.tried.shape[0]
    size = max(count // num_batches, 1)
    order = jax.random.permutation(key, count)
    return jnp.resize(order, (num_batches, size))


def _episode_metrics(
    settings: LearnerSettings,
    steps: Any,
    reward: jax.Array,
    advantage: jax.Array,
    returns: jax.Array,
    value: jax.Array,
) -> Metrics:
    live = steps.active.astype(jnp.float32)
    count = jnp.maximum(live.sum(), 1.0)
    num_steps = live.sum(axis=1)
    cost = jnp.sum(jnp.where(steps.active, steps.cost, 0.0), axis=1)
    price = settings.cost_lambda / (settings.max_steps * settings.max_cost)
    residual = jnp.sum(jnp.square(returns - value) * live) / count
    centre = jnp.sum(returns * live) / count
    spread = jnp.sum(jnp.square(returns - centre) * live) / count
    usage = [jnp.sum((steps.operator == a) * live) / count for a in range(steps.valid.shape[-1])]
    metrics: Metrics = {
        "reward": reward.mean(),
        "cost": cost.mean(),
        "return": (reward - price * cost).mean(),
        "steps": num_steps.mean(),
        "advantage/zero_share": jnp.sum((advantage == 0) * live) / count,
        "critic/explained_variance": 1.0 - residual / jnp.maximum(spread, 1e-8),
    }
    return metrics | {f"operator/{n}": u for n, u in zip(OPERATORS, usage, strict=True)}
