"""Losses of the "paper" and of the "plus" method; every loss returns (scalar, metrics)."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from reoac_jax.advantages import Advantages as Advantages
from reoac_jax.advantages import gae as gae
from reoac_jax.advantages import normalise_advantages as normalise_advantages
from reoac_jax.networks import HeadParams, heads_apply

Metrics = dict[str, jax.Array]
Loss = tuple[jax.Array, Metrics]


class BackboneSums(NamedTuple):
    """Parts of the return-weighted copying loss that add up over micro-batches.

    Attributes:
        weighted: [] f32, sum over steps of weight * cross-entropy.
        pairs: [] f32, number of (step, position) pairs, zero weights included.
        zero_weight: [] f32, number of those pairs whose weight is 0.
    """

    weighted: jax.Array
    pairs: jax.Array
    zero_weight: jax.Array


def critic_loss(
    critic: HeadParams,
    features: jax.Array,
    operators: jax.Array,
    returns: jax.Array,
    step_mask: jax.Array | None = None,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Loss:
    """mean_s (Q(x_s)[a_s] - g_s)^2 (critic loss, spec 6).

    Args:
        critic: critic parameters; the only argument with a gradient.
        features: [N, F] f32.
        operators: [N] i32, executed operators.
        returns: [N] f32.
        step_mask: [N] bool, steps that count; None = all.
        dropout: rate in the head's hidden layer, with a key.
        key: typed random key of the dropout; None = no dropout.

    Returns:
        The loss and its metrics.
    """
    q = heads_apply(critic, lax.stop_gradient(features), dropout=dropout, key=key)
    taken = jnp.take_along_axis(q, operators[:, None], axis=1)[:, 0]
    loss = masked_mean(jnp.square(taken - lax.stop_gradient(returns)), step_mask)
    return loss, {"critic/loss": loss, "critic/q_mean": masked_mean(taken, step_mask)}


def actor_loss(
    actor: HeadParams,
    q: jax.Array,
    features: jax.Array,
    temperature: float = 1.0,
    step_mask: jax.Array | None = None,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Loss:
    """-mean_s sum_a softmax(Q_s / T)_a log pi(a | x_s), targets constant (actor loss, spec 6).

    Args:
        actor: actor parameters; the only argument with a gradient.
        q: [N, A] f32, critic values of the same features.
        features: [N, F] f32.
        temperature: T, at least 1e-6.
        step_mask: [N] bool, steps that count; None = all.
        dropout: rate in the head's hidden layer, with a key.
        key: typed random key of the dropout; None = no dropout.

    Returns:
        The loss and its metrics.
    """
    target = lax.stop_gradient(jax.nn.softmax(q / max(temperature, 1e-6), axis=1))
    logits = heads_apply(actor, lax.stop_gradient(features), dropout=dropout, key=key)
    log_pi = jax.nn.log_softmax(logits, axis=1)
    loss = masked_mean(-jnp.sum(target * log_pi, axis=1), step_mask)
    entropy = masked_mean(-jnp.sum(jnp.exp(log_pi) * log_pi, axis=1), step_mask)
    return loss, {"actor/loss": loss, "actor/entropy": entropy}


def return_weights(
    returns: jax.Array, *, advantage_positive: bool = True, advantage_clip: float = 0.0
) -> jax.Array:
    """Step weights from returns: cut at 0 if asked, then clipped to ±advantage_clip if above 0."""
    weights = lax.stop_gradient(returns)
    if advantage_positive:
        weights = jnp.maximum(weights, 0.0)
    if advantage_clip > 0:
        weights = jnp.clip(weights, -advantage_clip, advantage_clip)
    return weights


def backbone_sums(
    logits: jax.Array,
    positions: jax.Array,
    update_mask: jax.Array,
    target_ids: jax.Array,
    target_len: jax.Array,
    returns: jax.Array,
    *,
    advantage_positive: bool = True,
    advantage_clip: float = 0.0,
    carry_over_mask: jax.Array | None = None,
    step_mask: jax.Array | None = None,
) -> BackboneSums:
    """Sums of the return-weighted copying loss over a micro-batch of steps (spec 6).

    Args:
        logits: [N, K, V] f32 at the tokens before each step; carries the gradient.
        positions: [N, K] i32, absolute position of every column.
        update_mask: [N, K] bool, positions written at the step.
        target_ids: [N, M] i32, ids of prompt and answer.
        target_len: [N] i32, true length of the target, 0 = none.
        returns: [N] f32.
        advantage_positive: negative weights become 0.
        advantage_clip: clips weights when above 0.
        carry_over_mask: [N, K] bool, already decoded positions to leave out; None = leave out none.
        step_mask: [N] bool, steps that count; None = all.

    Returns:
        The sums; `backbone_loss` = weighted / max(pairs, 1).
    """
    weights = return_weights(
        returns, advantage_positive=advantage_positive, advantage_clip=advantage_clip
    )
    counted = update_mask & (positions < target_len[:, None])
    if carry_over_mask is not None:
        counted = counted & ~carry_over_mask
    if step_mask is not None:
        counted = counted & step_mask[:, None]
    last = max(target_ids.shape[1] - 1, 0)
    if target_ids.shape[1] == 0:
        gold = jnp.zeros_like(positions)
    else:
        gold = jnp.take_along_axis(target_ids, jnp.clip(positions, 0, last), axis=1)
    # Rows that do not count may hold anything; keep them out before the product, or 0 * inf = NaN.
    nll = jnp.where(counted, -token_log_probs(logits, gold), 0.0)
    zero = counted & (weights == 0)[:, None]
    return BackboneSums(
        jnp.sum(weights[:, None] * nll),
        jnp.sum(counted).astype(jnp.float32),
        jnp.sum(zero).astype(jnp.float32),
    )


def backbone_loss(
    logits: jax.Array,
    positions: jax.Array,
    update_mask: jax.Array,
    target_ids: jax.Array,
    target_len: jax.Array,
    returns: jax.Array,
    *,
    advantage_positive: bool = True,
    advantage_clip: float = 0.0,
    carry_over_mask: jax.Array | None = None,
    step_mask: jax.Array | None = None,
) -> Loss:
    """Return-weighted cross-entropy to the gold token at the same position (spec 6).

    See `backbone_sums` for the arguments; without a carry-over mask the loss is the original's.

    Returns:
        The loss, 0 without pairs, and its metrics.
    """
    sums = backbone_sums(
        logits,
        positions,
        update_mask,
        target_ids,
        target_len,
        returns,
        advantage_positive=advantage_positive,
        advantage_clip=advantage_clip,
        carry_over_mask=carry_over_mask,
        step_mask=step_mask,
    )
    safe = jnp.maximum(sums.pairs, 1.0)
    loss = sums.weighted / safe
    return loss, {
        "backbone/loss": loss,
        "backbone/pairs": sums.pairs,
        "backbone/zero_weight_share": sums.zero_weight / safe,
    }


def total_loss(
    losses: Mapping[str, jax.Array | float], weights: Mapping[str, float]
) -> jax.Array | float:
    """Weighted sum that is reported; critic, actor and backbone by name (total rule, spec 6)."""
    return sum(weights[f"{name}_weight"] * losses[f"{name}_loss"] for name in _TOTAL_PARTS)


_TOTAL_PARTS = ("critic", "actor", "backbone")


def token_log_probs(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """log softmax(logits [..., V])[ids [...]] without a second array of that size; [...] f32."""
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1, mode="clip")[..., 0]
    return (picked - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)


def masked_mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Mean over the elements of mask (0 if none); None = over all."""
    if mask is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def mask_logits(logits: jax.Array, valid_operators: jax.Array | None) -> jax.Array:
    """Logits [..., A] with void operators out of the softmax; all stay where none is valid."""
    if valid_operators is None:
        return logits
    usable = valid_operators | ~jnp.any(valid_operators, axis=-1, keepdims=True)
    return jnp.where(usable, logits, -1e9)


def ppo_loss(
    logits: jax.Array,
    valid_operators: jax.Array | None,
    operators: jax.Array,
    old_log_prob: jax.Array,
    advantages: jax.Array,
    step_mask: jax.Array | None = None,
    *,
    clip: float = 0.2,
    entropy_weight: float = 0.01,
) -> Loss:
    """Clipped policy gradient with an entropy bonus (plus, spec 10.2).

    -mean min(r A, clip(r, 1 - c, 1 + c) A) - w mean H, with r = pi(a) / pi_old(a).

    Args:
        logits: [N, A] f32 of the present actor; carries the gradient.
        valid_operators: [N, A] bool, operators that could act; None = all.
        operators: [N] i32, actions taken.
        old_log_prob: [N] f32, their log-probability when they were taken.
        advantages: [N] f32.
        step_mask: [N] bool, steps that count; None = all.
        clip: c.
        entropy_weight: w.

    Returns:
        The loss and its metrics.
    """
    log_pi = jax.nn.log_softmax(mask_logits(logits, valid_operators), axis=-1)
    log_prob = jnp.take_along_axis(log_pi, operators[:, None], axis=-1)[:, 0]
    # Void steps hold no action; their ratio could overflow and poison the gradient.
    log_ratio = log_prob - lax.stop_gradient(old_log_prob)
    if step_mask is not None:
        log_ratio = jnp.where(step_mask, log_ratio, 0.0)
    ratio = jnp.exp(log_ratio)
    gain = lax.stop_gradient(advantages)
    clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    policy = -masked_mean(jnp.minimum(ratio * gain, clipped * gain), step_mask)
    entropy = masked_mean(-jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1), step_mask)
    loss = policy - entropy_weight * entropy
    outside = (jnp.abs(ratio - 1.0) > clip).astype(jnp.float32)
    return loss, {
        "actor/loss": loss,
        "actor/policy_loss": policy,
        "actor/entropy": entropy,
        "actor/clip_share": masked_mean(outside, step_mask),
        "actor/kl": masked_mean(ratio - 1.0 - log_ratio, step_mask),
    }


def huber_critic_loss(
    q: jax.Array,
    operators: jax.Array,
    targets: jax.Array,
    step_mask: jax.Array | None = None,
    *,
    delta: float = 1.0,
) -> Loss:
    """Huber loss of Q(s, a taken) to the lambda-returns (plus, spec 10.2).

    Args:
        q: [N, A] f32; carries the gradient.
        operators: [N] i32, actions taken.
        targets: [N] f32.
        step_mask: [N] bool, steps that count; None = all.
        delta: where the loss turns linear.

    Returns:
        The loss and its metrics.
    """
    targets = lax.stop_gradient(targets)
    taken = jnp.take_along_axis(q, operators[:, None], axis=-1)[:, 0]
    loss = masked_mean(huber(taken - targets, delta), step_mask)
    spread = masked_mean(jnp.square(targets - masked_mean(targets, step_mask)), step_mask)
    error = masked_mean(jnp.square(targets - taken), step_mask)
    return loss, {
        "critic/loss": loss,
        "critic/explained_variance": 1.0 - error / jnp.maximum(spread, 1e-8),
    }


def huber(error: jax.Array, delta: float = 1.0) -> jax.Array:
    """Elementwise e^2 / 2 up to |e| = delta, then linear with the same slope."""
    size = jnp.abs(error)
    inner = jnp.minimum(size, delta)
    return 0.5 * inner * inner + delta * (size - inner)
