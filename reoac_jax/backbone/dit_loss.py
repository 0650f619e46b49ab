"""Likelihood bounds of MDLM and SEDD: what their training minimises and perplexity is read from.

MDLM, continuous time: -log p(x0 | xt) sigma'(t) / (e^sigma - 1) at masked positions; SEDD:
sigma'(t) times the score entropy. Both bound -log p(x0) per token from above, in expectation over
t and the noise.
"""

import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax.backbone import dit, noise, score_entropy
from reoac_jax.backbone.dit import DiTConfig


def corrupt(
    cfg: DiTConfig, key: jax.Array, clean_ids: jax.Array, t: jax.Array, keep: jax.Array
) -> jax.Array:
    """xt [B, L] of clean_ids [B, L] at times t [B]; positions `keep` (bool [B, L]) stay.

    The absorbing graph masks a token with probability 1 - alpha, the uniform one replaces it by a
    random token with that probability.
    """
    hit_key, token_key = jax.random.split(key)
    alpha = jnp.broadcast_to(cfg.schedule.alpha(t)[:, None], clean_ids.shape)
    if cfg.graph == "absorb":
        return noise.corrupt(
            hit_key, clean_ids, alpha, mask_id=cfg.mask_id, keep_mask=keep, keep_first=False
        )
    hit = (jax.random.uniform(hit_key, clean_ids.shape) < 1.0 - alpha) & ~keep
    return jnp.where(hit, jax.random.randint(token_key, hit.shape, 0, cfg.vocab_size), clean_ids)


def token_bounds(
    params: Params,
    cfg: DiTConfig,
    clean_ids: jax.Array,
    noisy_ids: jax.Array,
    t: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Per-token bound [B, L] float32 (nats), one sample of t and noise.

    Args:
      clean_ids, noisy_ids: [B, L] int32.
      t: [B] float32, greater than 0.
      attention_mask: bool [B, L], True = real token; None = all. Values elsewhere say nothing.
      key: RNG key of dropout; None = off.
    """
    sigma, rate = cfg.schedule.sigma(t), cfg.schedule.sigma_prime(t)
    output = dit.network_output(
        params, cfg, noisy_ids, sigma, attention_mask=attention_mask, key=key
    )
    if cfg.parameterization == "sedd":
        scores = score_entropy.log_score(output, noisy_ids, sigma, cfg.scale_by_sigma)
        entropy = score_entropy.score_entropy(scores, noisy_ids, clean_ids, sigma, cfg.graph)
        return entropy * rate[:, None]
    log_probs = dit.output_log_probs(cfg, output, noisy_ids)
    true = jnp.take_along_axis(log_probs, clean_ids[..., None], axis=-1)[..., 0]
    return noise.likelihood_bound(true, cfg.schedule, t[:, None])


def bound_loss(
    params: Params,
    cfg: DiTConfig,
    clean_ids: jax.Array,
    attention_mask: jax.Array,
    context_mask: jax.Array,
    t: jax.Array,
    key: jax.Array,
    *,
    dropout: bool = False,
) -> jax.Array:
    """sum(bound) / number of scored tokens over a batch, a scalar; its exponential is a perplexity.

    Args:
      clean_ids: [B, L] int32.
      attention_mask, context_mask: bool [B, L]; the context is neither noised nor scored.
      t: [B] float32 noise times, for instance `noise.spread_times`.
      key: RNG key of the noise (and dropout).
    """
    noise_key, drop_key = jax.random.split(key)
    scored = attention_mask & ~context_mask
    noisy = corrupt(cfg, noise_key, clean_ids, t, ~scored)
    bounds = token_bounds(
        params,
        cfg,
        clean_ids,
        noisy,
        t,
        attention_mask=attention_mask,
        key=drop_key if dropout else None,
    )
    weight = scored.astype(jnp.float32)
    return jnp.sum(bounds * weight) / jnp.maximum(weight.sum(), 1.0)
