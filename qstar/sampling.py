"""Drawing a token from log weights, with one random key per row.

A row's key is fold_in(fold_in(key(seed), sample_idx), repeat), and its n-th token uses
fold_in(key, n): the randomness does not depend on slots, batch composition or shards.
"""

import jax
import jax.numpy as jnp

from common.lm.sampling import draw as draw_by_cumulative
from qstar.tilt import Tilt

DRAWS = ("gumbel", "cumulative")
NO_TOKEN = -1


def sample_key(seed: int, sample_idx: jax.Array | int, repeat: jax.Array | int) -> jax.Array:
    """The key of one sample: fold_in(fold_in(key(seed), sample_idx), repeat)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample_idx), repeat)


def token_keys(keys: jax.Array, index: jax.Array) -> jax.Array:
    """Keys [B] of the tokens number index [B] of the samples with keys [B]."""
    return jax.vmap(jax.random.fold_in)(keys, index)


def draw(keys: jax.Array, log_weights: jax.Array, method: str = "gumbel") -> jax.Array:
    """Draws one token per row in proportion to exp(log_weights).

    Args:
        keys: [B] typed keys, used once.
        log_weights: [B, V], not normalised; -inf = never.
        method: "gumbel" = argmax of log weight + Gumbel noise, a random number per token;
            "cumulative" = inverse of the cumulative distribution, one per row.

    Returns:
        [B] int32 tokens; -1 where a row has NaN or nothing to draw.
    """
    if method == "gumbel":
        size, dtype = log_weights.shape[1], log_weights.dtype
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (size,), dtype))(keys)
        token = jnp.argmax(log_weights + noise, axis=-1)
    elif method == "cumulative":
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
        peak = jnp.max(log_weights, axis=-1, keepdims=True)
        token = draw_by_cumulative(jnp.exp(log_weights - peak), uniform)
    else:
        raise ValueError(f"draw {method!r} is none of {', '.join(DRAWS)}")
    return _or_none(token, log_weights)


def greedy(tilt: Tilt, log_weights: jax.Array, plain: bool = True) -> jax.Array:
    """Most probable token per row [B] int32, ties to the lowest id; -1 as in `draw`.

    Args:
        tilt: both models and alpha.
        log_weights: [B, V] of the law.
        plain: the law is q itself, possibly with columns left out. Then alpha x + (1 - alpha) y is
            compared, in which a tie of the logits stays a tie (half-precision logits tie often).
    """
    score = log_weights
    if plain:
        alpha = tilt.alpha[:, None]
        x, y = tilt.pair.x, tilt.pair.y
        score = jnp.where(tilt.target_only[:, None], y, alpha * x + (1 - alpha) * y)
        score = jnp.where(log_weights > -jnp.inf, score, -jnp.inf)
    return _or_none(jnp.argmax(score, axis=-1), log_weights)


def _or_none(token: jax.Array, log_weights: jax.Array) -> jax.Array:
    """The token, or -1 where the row's maximum is not a number."""
    good = jnp.isfinite(jnp.max(log_weights, axis=-1))
    return jnp.where(good, token, NO_TOKEN).astype(jnp.int32)


def log_probabilities(
    tilt: Tilt, log_weights: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log probabilities of a token [B] under the sampled law, pi_theta and pi_t; [B] each.

    Those of the models are at the tilt's temperature, with each model's full normaliser.
    """
    place = jnp.maximum(token, 0)[:, None]

    def at(z: jax.Array) -> jax.Array:
        return jnp.take_along_axis(z, place, axis=-1)

    pair = tilt.pair
    log_q = at(log_weights)[:, 0] - jax.nn.logsumexp(log_weights, axis=-1)
    log_theta = pair.log_weight_theta(at(pair.x))[:, 0] - pair.norms.log_sum_x
    log_t = pair.log_weight(at(pair.y))[:, 0] - pair.norms.log_sum_y
    return log_q, log_theta, log_t
