"""Updates: from a batch of graded episodes to new parameters, as one compiled call.

Every update is a per-shard function (`common.spmd`): the small actor and critic work is done on
all rows by every device, the backbone's forward and backward passes are split and summed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from common.dist import DATA_AXIS
from common.fsdp import Layout
from common.lm.layers import Params
from common.optim import make_optimizer
from common.spmd import all_rows, own_slice, sum_over_devices
from reoac_jax import branch_losses, losses
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.counted_loss import counted_loss
from reoac_jax.episodes import Episodes
from reoac_jax.masked_diffusion import noise_canvas
from reoac_jax.networks import (
    FeatureStats,
    heads_apply,
    init_heads,
    init_stats,
    normalise,
    update_stats,
)
from reoac_jax.settings import Agent
from reoac_jax.types import OPERATORS

Metrics = dict[str, jax.Array]
WHOLE_LAYOUT = Layout()


@flax.struct.dataclass
class LearnerState:
    """Everything that training changes; the checkpoint's arrays.

    Attributes:
      actor, critic: head parameters; target_critic: slow copy that values are read from (plus).
      stats: running feature statistics.
      backbone: parameters of the language model (not stored in checkpoints when it is frozen).
      actor_opt, critic_opt, backbone_opt: optimizer states; backbone_opt is () when frozen.
      iteration: [] int32.
    """

    actor: Params
    critic: Params
    target_critic: Params
    stats: FeatureStats
    backbone: Any
    actor_opt: Any
    critic_opt: Any
    backbone_opt: Any
    iteration: jax.Array

    @property
    def agent(self) -> Agent:
        """The policy part."""
        return Agent(self.actor, self.critic, self.stats)


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
    """Static settings of the updates; hashable."""

    algo: str
    group_size: int
    cost_lambda: float
    max_cost: float
    max_steps: int
    gamma: float
    gae_lambda: float
    clip: float
    entropy_weight: float
    advantage_scale: str
    epochs: int
    minibatch: int
    target_decay: float
    train_backbone: bool
    branch_weight: float
    pg_weight: float
    sft_weight: float
    backbone_batch: int
    backbone_rows: int
    actor_temperature: float
    advantage_positive: bool
    advantage_clip: float
    critic_steps: int
    actor_steps: int
    backbone_steps: int
    weights: tuple[float, float, float]
    actor_dropout: float
    critic_dropout: float
    optim: tuple[tuple[str, float], ...]

    @classmethod
    def from_config(cls, config: ConfigDict, max_cost: float) -> "LearnerSettings":
        """Settings of a full configuration tree; max_cost is the dearest operator's price."""
        loss, update = config.losses, config.updates
        return cls(
            algo=config.algo,
            group_size=config.rollout.group_size,
            cost_lambda=config.rollout.cost_lambda,
            max_cost=max_cost,
            max_steps=config.rollout.max_steps,
            gamma=loss.gamma,
            gae_lambda=loss.gae_lambda,
            clip=loss.clip,
            entropy_weight=loss.entropy_weight,
            advantage_scale=loss.advantage_scale,
            epochs=update.epochs,
            minibatch=update.minibatch,
            target_decay=update.target_decay,
            train_backbone=config.finetune_mode != "none",
            branch_weight=loss.branch_weight,
            pg_weight=loss.backbone_pg_weight,
            sft_weight=loss.backbone_sft_weight,
            backbone_batch=update.backbone_batch,
            backbone_rows=update.backbone_rows,
            actor_temperature=loss.actor_temperature,
            advantage_positive=loss.advantage_positive,
            advantage_clip=loss.advantage_clip,
            critic_steps=update.critic_steps,
            actor_steps=update.actor_steps,
            backbone_steps=update.backbone_steps,
            actor_dropout=config.actor.dropout,
            critic_dropout=config.critic.dropout,
            weights=(loss.critic_weight, loss.actor_weight, loss.backbone_weight),
            optim=tuple(sorted(config.optim.items())),
        )

    def optimizer(self, name: str, layout: Layout | None = None) -> optax.GradientTransformation:
        """AdamW of "actor", "critic" or "backbone"; layout: where its parameters lie."""
        o = dict(self.optim)
        return make_optimizer(
            o[f"{name}_lr"],
            weight_decay=o["weight_decay"],
            grad_clip=o["grad_clip"],
            warmup=int(o["warmup"]),
            norm=layout.norm if layout else optax.global_norm,
        )


def init_state(
    key: jax.Array,
    settings: LearnerSettings,
    params: Params,
    num_features: int,
    actor_hidden: int,
    critic_hidden: int,
    trainable: Callable[[Params], Params] = lambda params: params,
) -> LearnerState:
    """Fresh heads and optimizers around given backbone parameters.

    Args:
      trainable: params -> the part of them that is trained, see `Finetuning`.
    """
    actor, critic = init_heads(
        key, num_features, actor_hidden=actor_hidden, critic_hidden=critic_hidden
    )
    backbone_opt: Any = ()
    if settings.train_backbone:
        backbone_opt = settings.optimizer("backbone").init(trainable(params))
    return LearnerState(
        actor=actor,
        critic=critic,
        target_critic=jax.tree.map(jnp.copy, critic),
        stats=init_stats(num_features),
        backbone=params,
        actor_opt=settings.optimizer("actor").init(actor),
        critic_opt=settings.optimizer("critic").init(critic),
        backbone_opt=backbone_opt,
        iteration=jnp.int32(0),
    )


def state_specs(state: LearnerState, layout: Layout) -> LearnerState:
    """Partition specs of a learner's state: heads whole everywhere, the backbone by its layout.

    Args:
      state: arrays or their shapes.
    """
    specs = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), state)
    return dataclasses.replace(
        specs, backbone=layout.specs(state.backbone), backbone_opt=layout.specs(state.backbone_opt)
    )


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
        seen = normalise(state.stats, steps.features)  # [B, T, F]
        policy = jax.nn.softmax(
            losses.mask_logits(heads_apply(state.actor, seen), steps.valid), axis=-1
        )
        value = jnp.sum(policy * heads_apply(state.target_critic, seen), axis=-1)  # [B, T]
        value = jnp.where(active, value, 0.0)
        rewards = step_rewards(settings, steps.cost, active, reward)
        advantage, returns = losses.gae(rewards, value, active, settings.gamma, settings.gae_lambda)
        advantage = losses.normalise_advantages(
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
            actor = optax.apply_updates(actor, updates)
            (_, critic_metrics), grads = jax.value_and_grad(critic_loss, has_aux=True)(critic)
            grads = jax.tree.map(lambda g: g * settings.weights[0], grads)
            updates, critic_opt = critic_tx.update(grads, critic_opt, critic)
            critic = optax.apply_updates(critic, updates)
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
            grads, backbone_metrics = _backbone_gradient(
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
            params = backbone.finetuning.replace(params, optax.apply_updates(part, updates))
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


def _backbone_gradient(
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
