"""Score entropy discrete diffusion (Lou et al., 2024): scores, loss and reverse steps.

The score s_y = p_t(y) / p_t(x) compares a position's token x with every other token y at noise
level sigma. Two graphs: "absorb" (x becomes the mask, id V - 1) and "uniform" (x becomes any of V
tokens). Steps go from sigma(t) to sigma(t - dt), with d = sigma(t) - sigma(t - dt).
"""

import jax
import jax.numpy as jnp

from reoac_jax.backbone.e2d2 import NEG_INF


def _one_hot(ids: jax.Array, size: int) -> jax.Array:
    """bool [B, L, V]."""
    return jnp.arange(size) == ids[..., None]


def _wide(sigma: jax.Array) -> jax.Array:
    """[B] -> [B, 1, 1]."""
    return sigma[:, None, None]


def log_score(output: jax.Array, ids: jax.Array, sigma: jax.Array, scaled: bool) -> jax.Array:
    """log s [B, L, V] of a network output, 0 at the present token.

    Args:
      output: [B, L, V] float32 raw output.
      ids: [B, L] int32 present tokens.
      sigma: [B] float32.
      scaled: the output leaves out the factor 1 / ((e^sigma - 1)(V - 1)) (`scale_by_sigma`).
    """
    size = output.shape[-1]
    if scaled:
        output = output - _wide(jnp.log(jnp.expm1(sigma))) - jnp.log(size - 1.0)
    return jnp.where(_one_hot(ids, size), 0.0, output)


def log_score_of_subs(log_probs: jax.Array, ids: jax.Array, sigma: jax.Array) -> jax.Array:
    """log s [B, L, V] of the absorbing graph from SUBS log-probabilities.

    Masked: s_y = p(y) / (e^sigma - 1), s_mask = 1. Token: s of itself 1, of the mask e^sigma - 1.
    """
    size = log_probs.shape[-1]
    log_k = _wide(-jnp.log(jnp.expm1(sigma)))
    is_mask = jnp.arange(size) == size - 1
    masked = jnp.where(is_mask, 0.0, log_probs + log_k)
    token = jnp.where(_one_hot(ids, size), 0.0, jnp.where(is_mask, -log_k, NEG_INF))
    return jnp.where((ids == size - 1)[..., None], masked, token)


# ------------------------------------------------------------------------------------------ loss
def score_entropy(
    log_scores: jax.Array, ids: jax.Array, clean_ids: jax.Array, sigma: jax.Array, graph: str
) -> jax.Array:
    """Denoising score entropy per token [B, L]; times sigma'(t) it is the likelihood bound.

    sum_{y != x} Q(x, y) (s_y - r_y log s_y + r_y (log r_y - 1)) with r_y = p(y | x0) / p(x | x0).
    Absorbing: only masked positions contribute, r = 1 / (e^sigma - 1) at the clean token.

    Args:
      log_scores: [B, L, V] from `log_score`.
      ids: [B, L] int32 noised tokens.
      clean_ids: [B, L] int32 clean tokens.
      sigma: [B] float32.
      graph: "absorb" | "uniform".
    """
    size = log_scores.shape[-1]
    growth = jnp.expm1(sigma)[:, None]  # [B, 1]
    if graph == "absorb":
        is_mask = jnp.arange(size) == size - 1
        positive = jnp.sum(jnp.where(is_mask, 0.0, jnp.exp(log_scores)), axis=-1)
        clean = jnp.take_along_axis(log_scores, clean_ids[..., None], axis=-1)[..., 0]
        ratio = 1.0 / growth
        loss = positive - ratio * clean + ratio * (jnp.log(ratio) - 1.0)
        return jnp.where(ids == size - 1, loss, 0.0)
    # p(y | x0) is (1 - a) / V, plus a where y = x0, with a = e^-sigma.
    same = 1.0 + growth / size  # in units of a
    other = growth / size
    clean = _one_hot(clean_ids, size)
    reached = jnp.where(ids == clean_ids, same, other)[..., None]
    ratio = jnp.where(clean, same[..., None], other[..., None]) / reached
    terms = jnp.exp(log_scores) - ratio * log_scores + ratio * (jnp.log(ratio) - 1.0)
    return jnp.sum(jnp.where(_one_hot(ids, size), 0.0, terms), axis=-1) / size


# --------------------------------------------------------------------------------- reverse steps
def staggered_score(score: jax.Array, d_sigma: jax.Array, graph: str) -> jax.Array:
    """Score [B, L, V] seen from d_sigma [B] less noise."""
    size = score.shape[-1]
    decay = _wide(jnp.exp(-d_sigma))
    total = jnp.sum(score, axis=-1, keepdims=True)
    if graph == "absorb":
        is_mask = jnp.arange(size) == size - 1
        return score / decay + jnp.where(is_mask, (1.0 - 1.0 / decay) * total, 0.0)
    return score / decay + (decay - 1.0) / (size * decay) * total


def transition_column(ids: jax.Array, d_sigma: jax.Array, size: int, graph: str) -> jax.Array:
    """p(x | y) over y, [B, L, V]: how likely each y becomes the present token within d_sigma."""
    decay = _wide(jnp.exp(-d_sigma))
    present = _one_hot(ids, size)
    if graph == "absorb":
        fallen = jnp.where((ids == size - 1)[..., None], 1.0 - decay, 0.0)
        return jnp.where(present, decay, 0.0) + fallen
    return jnp.where(present, decay, 0.0) + (1.0 - decay) / size


def analytic_weights(score: jax.Array, ids: jax.Array, d_sigma: jax.Array, graph: str) -> jax.Array:
    """Weights [B, L, V] of the next token by Tweedie's rule; they may be slightly negative.

    Args:
      score: [B, L, V] s at the present noise level.
      ids: [B, L] int32.
      d_sigma: [B] float32 noise removed.
      graph: "absorb" | "uniform".
    """
    column = transition_column(ids, d_sigma, score.shape[-1], graph)
    return staggered_score(score, d_sigma, graph) * column


def euler_weights(score: jax.Array, ids: jax.Array, step: jax.Array, graph: str) -> jax.Array:
    """Weights [B, L, V] of one Euler step of length step [B] = dt sigma'(t)."""
    size = score.shape[-1]
    present = _one_hot(ids, size)
    if graph == "absorb":
        rate = jnp.where((ids == size - 1)[..., None], score, 0.0)
    else:
        rate = score / size
    rate = jnp.where(present, 0.0, rate)
    rate = jnp.where(present, -jnp.sum(rate, axis=-1, keepdims=True), rate)
    return present + _wide(step) * rate


def denoising_weights(score: jax.Array, ids: jax.Array, sigma: jax.Array, graph: str) -> jax.Array:
    """Weights [B, L, V] of the clean token: all noise sigma [B] removed, the mask excluded."""
    weights = analytic_weights(score, ids, sigma, graph)
    if graph == "absorb":
        weights = jnp.where(jnp.arange(weights.shape[-1]) == weights.shape[-1] - 1, 0.0, weights)
    return weights
