"""What counterfactual trials teach: the operators tried in a state, and what each led to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from reoac_jax.episodes import Branches
from reoac_jax.losses import Loss, huber, mask_logits, masked_mean


class TriedOperators(NamedTuple):
    """States whose operators were tried, N = B * S of them, K operators each.

    Attributes:
        seen: [N, F] f32, normalised features.
        valid: [N, A] bool, operators open to the policy.
        operator: [N, K] i32; tried: [N, K] bool.
        outcome: [N, K] f32, return from the state on after each operator.
        advantage: [N, K] f32, outcome minus the policy's mean over what was tried, scaled by one
            deviation for all; 0 where not tried.
    """

    seen: jax.Array
    valid: jax.Array
    operator: jax.Array
    tried: jax.Array
    outcome: jax.Array
    advantage: jax.Array


def tried_operators(
    branches: Branches, seen: jax.Array, policy: jax.Array, valid: jax.Array, price: float
) -> TriedOperators:
    """Outcomes of trials as targets: reward + value at the cut - price * cost.

    Args:
        branches: of B episodes, S steps, K trials.
        seen: [B, T, F] f32, normalised features of every decision.
        policy: [B, T, A] f32, probabilities of the operators.
        valid: [B, T, A] bool.
        price: of one unit of cost.

    Returns:
        The states with their trials, without gradient.
    """

    def states(x: jax.Array) -> jax.Array:
        at = jnp.take_along_axis(x, branches.step[..., None], axis=1)  # [B, S, .]
        return at.reshape(-1, x.shape[-1])

    operator, tried, outcome = (
        x.reshape(-1, x.shape[-1])
        for x in (
            branches.operator,
            branches.tried,
            branches.reward + branches.estimate - price * branches.cost,
        )
    )
    weight = jnp.where(tried, jnp.take_along_axis(states(policy), operator, axis=1), 0.0)
    weight = weight / jnp.maximum(weight.sum(axis=1, keepdims=True), 1e-8)
    mean = jnp.sum(weight * outcome, axis=1, keepdims=True)
    # One tried operator alone says nothing about the choice.
    useful = tried & (tried.sum(axis=1, keepdims=True) > 1)
    centred = jnp.where(useful, outcome - mean, 0.0)
    deviation = jnp.sqrt(masked_mean(jnp.square(centred), useful))
    advantage = centred / jnp.where(deviation > 1e-5, deviation, jnp.inf)
    return TriedOperators(
        *lax.stop_gradient((states(seen), states(valid), operator, tried, outcome, advantage))
    )


def tried_policy_loss(logits: jax.Array, trials: TriedOperators) -> Loss:
    """-mean sum_k pi(a_k) A_k over the states: the exact gradient where outcomes are known.

    Args:
        logits: [N, A] f32 of the present actor; carries the gradient.
        trials: of the same N states.

    Returns:
        The loss and its metrics.
    """
    policy = jax.nn.softmax(mask_logits(logits, trials.valid), axis=-1)
    taken = jnp.take_along_axis(policy, trials.operator, axis=1)
    gain = jnp.sum(jnp.where(trials.tried, taken * trials.advantage, 0.0), axis=1)
    loss = -masked_mean(gain, jnp.any(trials.tried, axis=1))
    return loss, {"branch/policy_loss": loss}


def tried_critic_loss(q: jax.Array, trials: TriedOperators, *, delta: float = 1.0) -> Loss:
    """Huber loss of Q(s, a) to the outcome of every operator that was tried.

    Args:
        q: [N, A] f32; carries the gradient.
        trials: of the same N states.
        delta: where the loss turns linear.

    Returns:
        The loss and its metrics.
    """
    taken = jnp.take_along_axis(q, trials.operator, axis=1)
    loss = masked_mean(huber(taken - trials.outcome, delta), trials.tried)
    return loss, {"branch/critic_loss": loss}
