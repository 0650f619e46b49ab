"""How much better than expected every decision of an episode was."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Advantages(NamedTuple):
    """advantages [B, T] f32 and the lambda-returns they aim at [B, T] f32; 0 at void steps."""

    advantages: jax.Array
    returns: jax.Array


def gae(
    rewards: jax.Array,
    values: jax.Array,
    valid: jax.Array,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Advantages:
    """Generalised advantage estimates of finite episodes (plus, spec 10.2).

    d_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last valid step;
    A_t = d_t + gamma lambda A_{t+1}.

    Args:
        rewards: [B, T] f32.
        values: [B, T] f32, state values of the behaviour policy.
        valid: [B, T] bool, steps that were really taken (a prefix of every row).
        gamma: discount.
        lam: lambda.

    Returns:
        Advantages and lambda-returns, without gradient.
    """
    rewards, values = lax.stop_gradient((rewards, values))
    steps = (rewards.T, values.T, valid.T)

    def body(
        carry: tuple[jax.Array, jax.Array], step: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        advantage, following = carry
        reward, value, taken = step
        estimate = reward + gamma * following - value + gamma * lam * advantage
        estimate = jnp.where(taken, estimate, 0.0)
        return (estimate, jnp.where(taken, value, 0.0)), estimate

    start = (jnp.zeros(rewards.shape[0]), jnp.zeros(rewards.shape[0]))
    _, found = lax.scan(body, start, steps, reverse=True)
    advantages = found.T
    return Advantages(advantages, jnp.where(valid, advantages + values, 0.0))


def normalise_advantages(
    advantages: jax.Array,
    valid: jax.Array,
    group_size: int = 1,
    epsilon: float = 1e-6,
    scale_by: str = "group",
) -> jax.Array:
    """Zero mean per prompt group (over the batch when a group has one row), unit deviation.

    With scale_by="group" every group gets unit deviation. In groups whose episodes are all right or
    all wrong only the cost differs, and its tiny differences are blown up to the size of a reward:
    the policy then learns to be cheap rather than right. "batch" divides by one deviation for all.

    Args:
        advantages: [B, T] f32; rows of a group are neighbours.
        valid: [B, T] bool.
        group_size: rows per group; divides B.
        epsilon: added to the deviation, so that equal advantages become 0.
        scale_by: "group" or "batch".

    Returns:
        [B, T] f32, 0 at void steps, without gradient.
    """
    batch = advantages.shape[0]
    groups = batch // group_size if group_size > 1 else 1
    folded = lax.stop_gradient(advantages).reshape(groups, -1)
    counted = valid.reshape(groups, -1)
    count = jnp.maximum(counted.sum(axis=1, keepdims=True), 1)
    mean = jnp.where(counted, folded, 0.0).sum(axis=1, keepdims=True) / count
    centred = jnp.where(counted, folded - mean, 0.0)
    variance = jnp.square(centred).sum(axis=1, keepdims=True) / count
    if scale_by == "batch":
        variance = jnp.square(centred).sum(keepdims=True) / jnp.maximum(counted.sum(), 1)
    deviation = jnp.sqrt(variance)
    # A deviation that is only rounding of equal values must not be blown up to 1.
    scale = jnp.where(deviation > 1e-5 * (1.0 + jnp.abs(mean)), deviation + epsilon, jnp.inf)
    return (centred / scale).reshape(advantages.shape)
