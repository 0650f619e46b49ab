"""Static settings of a rollout, and the policy it runs."""

import dataclasses
from typing import Any

import flax.struct
from ml_collections import ConfigDict

from common.lm.layers import Params
from reoac_jax.networks import FeatureStats
from reoac_jax.operators import OperatorParams, operator_params
from reoac_jax.types import OPERATORS

NUM_OPERATORS = len(OPERATORS)


@flax.struct.dataclass
class Agent:
    """Everything the policy consists of, apart from the backbone.

    Attributes:
      actor, critic: parameters of the two heads.
      stats: running mean and variance of the features (identity in paper mode).
    """

    actor: Params
    critic: Params
    stats: FeatureStats


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """Static settings of a rollout; hashable."""

    max_steps: int
    gen_len: int
    operators: OperatorParams
    selection_mode: str = "sample"
    sample_strategy: str = "argmax"
    temperature: float = 1.0
    use_hidden: bool = True
    fast_critic: bool = False
    fast_operator: bool = False
    path: str = "tensor"
    relation_temperature: float = 1.0
    numbers: str = "token"
    tentative: bool = False
    save_relation: bool = False
    # plus
    early_exit: bool = True
    patience: int = 0
    remask_ratio: float = 0.1
    stop_at_eos: bool = True
    price: float = 0.0  # of one unit of cost in the return: lambda / (T * dearest price)
    valid_mask: bool = True  # void operators are out of the policy
    use_progress: bool = True  # the 4 progress features are seen
    branching: bool = False  # O_BRANCH may be chosen
    branch_k: int = 2
    planned_steps: tuple[int, ...] = ()  # every row looks ahead here (evaluation)
    tried_steps: tuple[int, ...] = ()  # other operators are tried here (training)
    tried_depth: int = 0  # decisions a trial lasts; 0 = to the end of the episode
    # paper
    ensure_update: bool = True
    fallback_operator: str = "O_SCOPE"
    renoise: bool = False
    num_sigma_steps: int = 32
    sigma_schedule: str = "cosine"
    sigma_max: float = 1.0
    sigma_min: float = 0.0

    @classmethod
    def from_config(cls, config: ConfigDict, **overrides: Any) -> "RolloutSettings":
        """Settings of a full configuration tree, without anything that happens at branch steps."""
        operators = read_operators(config.operators)
        values = {
            "max_steps": config.rollout.max_steps,
            "gen_len": config.rollout.gen_len,
            "operators": operators,
            "selection_mode": config.rollout.selection_mode,
            "sample_strategy": config.backbone.sample_strategy,
            "temperature": config.backbone.temperature,
            "use_hidden": config.rollout.use_hidden,
            "fast_critic": config.rollout.fast_critic,
            "fast_operator": config.rollout.fast_operator,
            "path": "tensor" if config.rollout.gpu_critic else "host",
            "relation_temperature": config.relation.temperature,
            "numbers": config.relation.numbers,
            "tentative": config.relation.canvas == "tentative",
            "save_relation": config.rollout.save_relation,
            "early_exit": config.rollout.early_exit,
            "patience": config.rollout.patience,
            "remask_ratio": config.rollout.remask_ratio,
            "stop_at_eos": config.rollout.stop_at_eos,
            "price": config.rollout.cost_lambda / (config.rollout.max_steps * operators.max_cost),
            "valid_mask": config.rollout.valid_mask,
            "use_progress": config.rollout.use_progress,
            "branching": config.rollout.branching,
            "branch_k": config.rollout.branch_k,
            "ensure_update": config.rollout.ensure_update,
            "fallback_operator": config.rollout.fallback_operator,
            "renoise": config.backbone.renoise,
            "num_sigma_steps": config.backbone.num_steps,
            "sigma_schedule": config.backbone.sigma_schedule,
            "sigma_max": config.backbone.sigma_max,
            "sigma_min": config.backbone.sigma_min,
        }
        return cls(**(values | overrides))


def training_settings(config: ConfigDict) -> RolloutSettings:
    """Settings of the rollouts that are learnt from: at branch steps other operators are tried."""
    to_end = config.rollout.branch_horizon == "end"
    return RolloutSettings.from_config(
        config,
        tried_steps=_branch_steps(config),
        tried_depth=0 if to_end else config.rollout.branch_depth,
    )


def evaluation_settings(config: ConfigDict) -> RolloutSettings:
    """Settings of greedy rollouts: with branching, every row looks ahead at branch steps."""
    return RolloutSettings.from_config(
        config,
        selection_mode="argmax",
        save_relation=False,
        planned_steps=_branch_steps(config) if config.rollout.branching else (),
    )


def _branch_steps(config: ConfigDict) -> tuple[int, ...]:
    """Sorted steps of plus rollouts; in paper mode the key only says what samples record."""
    return tuple(sorted(set(config.rollout.branch_steps))) if config.algo == "plus" else ()


def read_operators(section: ConfigDict) -> OperatorParams:
    """Static operator parameters of the config section `operators`."""
    entries = []
    for name in OPERATORS:
        given = section[name]
        limit = "max_tokens" if name in ("O_NUM", "O_OP") else "scope_len"
        params = {limit: given.k}
        params |= {key: given[key] for key in ("step_scale", "threshold", "factor")}
        if name == "O_BRANCH":
            params["branch_depth"] = given.branch_depth
        entries.append({"id": name, "params": params})
    return operator_params(entries)


def feature_size(settings: RolloutSettings, hidden_size: int, algo: str) -> int:
    """F: 11 relation features, in plus 4 progress features, and the pooled hidden states."""
    if algo == "plus":
        return 15 + (2 * hidden_size if settings.use_hidden else 0)
    return 11 + (hidden_size if settings.use_hidden else 0)
