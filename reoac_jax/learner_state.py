"""What training changes and its static settings, of both algorithms."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from common.fsdp import Layout
from common.lm.layers import Params
from common.optim import make_optimizer
from reoac_jax.networks import FeatureStats, init_heads, init_stats
from reoac_jax.settings import Agent

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
    anneal_over: int  # iterations; 0 = constant rates
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
            anneal_over=config.num_iterations if config.optim.anneal else 0,
            weights=(loss.critic_weight, loss.actor_weight, loss.backbone_weight),
            optim=tuple(sorted(config.optim.items())),
        )

    def rate(self, iteration: jax.Array) -> jax.Array | float:
        """What updates of an iteration are multiplied by: linear from 1 to 0, or constant 1."""
        if not self.anneal_over:
            return 1.0
        return jnp.maximum(1.0 - iteration / self.anneal_over, 0.0)

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
