"""Actor and critic heads, their exchange with PyTorch names, and feature normalisation."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from common.errors import UserError

HeadParams = Mapping[str, Any]

# Module prefixes of the exchange format: first and second dense layer.
TORCH_PREFIXES: dict[str, tuple[str, str]] = {
    "actor": ("net.0", "net.3"),
    "critic": ("q_head.0", "q_head.3"),
}


def _uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    bound = 1.0 / math.sqrt(max(fan_in, 1))

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Head(nn.Module):
    """Dense -> relu -> dropout -> dense; actor and critic are two of them (heads, spec 2.5).

    Attributes:
        hidden_size: width of the hidden layer.
        num_operators: number of outputs A.
        dropout: dropout rate during training.
    """

    hidden_size: int = 128
    num_operators: int = 5
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps features [B, F] to [B, A]."""
        first = _uniform_fan_in(features.shape[-1])
        second = _uniform_fan_in(self.hidden_size)
        x = nn.Dense(self.hidden_size, kernel_init=first, bias_init=first, name="dense_0")(features)
        x = nn.Dropout(self.dropout)(nn.relu(x), deterministic=deterministic)
        return nn.Dense(self.num_operators, kernel_init=second, bias_init=second, name="dense_1")(x)


class Actor(Head):
    """Logits of the operators."""


class Critic(Head):
    """Predicted return of every operator."""


def init_heads(
    key: jax.Array,
    num_features: int,
    *,
    actor_hidden: int = 128,
    critic_hidden: int = 128,
    num_operators: int = 5,
) -> tuple[HeadParams, HeadParams]:
    """Fresh actor and critic parameters, every weight and bias uniform in ±1/sqrt(fan_in).

    Args:
        key: typed random key.
        num_features: F.
        actor_hidden: width of the actor's hidden layer.
        critic_hidden: width of the critic's hidden layer.
        num_operators: A.

    Returns:
        (actor, critic) parameters {"dense_0": {"kernel", "bias"}, "dense_1": ...}.
    """
    actor_key, critic_key = jax.random.split(key)
    example = jnp.zeros((1, num_features))
    actor = Actor(actor_hidden, num_operators).init(actor_key, example)["params"]
    critic = Critic(critic_hidden, num_operators).init(critic_key, example)["params"]
    return actor, critic


def heads_apply(
    params: HeadParams,
    features: jax.Array,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Applies one head.

    Args:
        params: parameters of the actor or the critic.
        features: [..., F] f32.
        dropout: rate, only with a key.
        key: typed random key of the dropout; None = no dropout.

    Returns:
        [..., A] f32.
    """
    hidden, outputs = params["dense_1"]["kernel"].shape
    module = Head(hidden, outputs, dropout)
    rngs = None if key is None else {"dropout": key}
    outcome: Any = module.apply({"params": params}, features, deterministic=key is None, rngs=rngs)
    return outcome


def export_head(params: HeadParams, kind: str) -> dict[str, np.ndarray]:
    """Tensors of a head under their exchange names ("net.0.weight" [out, in], ...).

    Args:
        params: head parameters.
        kind: "actor" or "critic".

    Returns:
        Name -> array.
    """
    tensors = {}
    for index, prefix in enumerate(TORCH_PREFIXES[kind]):
        layer = params[f"dense_{index}"]
        tensors[f"{prefix}.weight"] = np.asarray(layer["kernel"]).T.copy()
        tensors[f"{prefix}.bias"] = np.asarray(layer["bias"])
    return tensors


def import_head(tensors: Mapping[str, np.ndarray], kind: str) -> dict[str, Any]:
    """Head parameters from tensors under their exchange names.

    Args:
        tensors: name -> array.
        kind: "actor" or "critic".

    Returns:
        Head parameters.

    Raises:
        UserError: if a tensor is missing, superfluous or does not fit.
    """
    expected = {f"{p}.{leaf}" for p in TORCH_PREFIXES[kind] for leaf in ("weight", "bias")}
    if set(tensors) != expected:
        odd = sorted(expected ^ set(tensors))[0]
        raise UserError(
            f"{kind}: tensor '{odd}' is missing or unknown; expected {sorted(expected)}"
        )
    params: dict[str, Any] = {}
    width: int | None = None
    for index, prefix in enumerate(TORCH_PREFIXES[kind]):
        weight, bias = tensors[f"{prefix}.weight"], tensors[f"{prefix}.bias"]
        if (
            weight.ndim != 2
            or bias.shape != weight.shape[:1]
            or width not in (None, weight.shape[1])
        ):
            raise UserError(f"{kind}: shape {weight.shape} of '{prefix}.weight' does not fit")
        width = weight.shape[0]
        params[f"dense_{index}"] = {
            "kernel": jnp.asarray(weight.T, jnp.float32),
            "bias": jnp.asarray(bias, jnp.float32),
        }
    return params


@struct.dataclass
class FeatureStats:
    """Running mean and variance of features.

    Attributes:
        count: [] f32, rows seen.
        mean: [F] f32.
        square: [F] f32, sum of squared deviations from the mean.
    """

    count: jax.Array
    mean: jax.Array
    square: jax.Array


def init_stats(num_features: int) -> FeatureStats:
    """Statistics of no rows at all, for F features."""
    # Two arrays, not one twice: a buffer cannot be donated two times.
    return FeatureStats(jnp.zeros(()), jnp.zeros(num_features), jnp.zeros(num_features))


def update_stats(
    stats: FeatureStats, features: jax.Array, row_mask: jax.Array | None = None
) -> FeatureStats:
    """Merges a batch into the statistics (parallel variance formula).

    Args:
        stats: statistics so far.
        features: [N, F] f32.
        row_mask: [N] bool, rows that count; None = all.

    Returns:
        New statistics.
    """
    weight = jnp.ones(features.shape[0]) if row_mask is None else row_mask.astype(jnp.float32)
    rows = weight[:, None] > 0
    number = weight.sum()
    safe = jnp.maximum(number, 1.0)
    mean = jnp.where(rows, features, 0.0).sum(axis=0) / safe
    square = jnp.where(rows, jnp.square(features - mean), 0.0).sum(axis=0)
    count = stats.count + number
    total = jnp.maximum(count, 1.0)
    gap = mean - stats.mean
    return FeatureStats(
        count=count,
        mean=stats.mean + gap * number / total,
        square=stats.square + square + jnp.square(gap) * stats.count * number / total,
    )


def normalise(stats: FeatureStats, features: jax.Array, clip: float = 10.0) -> jax.Array:
    """Features [..., F] with mean 0 and variance 1, clipped; unchanged before any statistics.

    Args:
        stats: statistics, treated as constants.
        features: [..., F] f32.
        clip: largest absolute value.

    Returns:
        [..., F] f32.
    """
    stats = jax.lax.stop_gradient(stats)
    deviation = jnp.sqrt(stats.square / jnp.maximum(stats.count, 1.0))
    # A constant feature carries no information; dividing by its rounding error would invent some.
    scaled = (features - stats.mean) / jnp.where(deviation > 1e-4, deviation, 1.0)
    return jnp.where(stats.count > 1, jnp.clip(scaled, -clip, clip), features)
