"""Divergences, effective sample sizes and entropy of the mixture, per token.

Everything follows from K(s) = log sum_v exp(b + s d) at s = alpha, 2 - alpha, -alpha and from
K'(alpha) = E_q[d], all from one pass:

    D(q || pi_theta) = -(1 - alpha) K' - K      sum pi_theta^2 / q = exp(K + K(2 - alpha))
    D(q || pi_t)     = alpha K' - K             sum pi_t^2 / q     = exp(K + K(-alpha))

They describe q before special-token rules and filters, over the columns both models allow; a and b
keep each model's full normaliser. No ratio of probabilities is ever formed.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from qstar.columns import fold_columns, map_rows
from qstar.pair import Norms, Pair
from qstar.tilt import IDENTICAL, INVALID, NO_OVERLAP, Tilt

# exp(80) is far from overflow in float32: ratios stay finite, their logarithms are exact.
_LOG_LIMIT = 80.0


@flax.struct.dataclass
class TokenDiagnostics:
    """One decode step's diagnostics; all arrays [B], float32 unless the logits were float64.

    Without a common column (flag no_overlap) q is pi_t: kl_theta is NaN (not defined), ess_theta 0
    and log_ess_theta -inf. Invalid rows are 0 everywhere.

    Attributes:
        alpha: weight of pi_theta.
        kl_theta, kl_t: D(q || pi_theta), D(q || pi_t) in nats, >= 0.
        kl_diff: |kl_theta - kl_t|.
        ess_theta, ess_t: effective sample sizes in [0, 1].
        ess_ratio: ess_theta / ess_t, kept within exp(+-80).
        log_ess_theta, log_ess_t: their logarithms, exact where the sizes underflow.
        entropy_q: entropy of q in nats.
        log_z: K(alpha).
        overlap_theta, overlap_t: mass of the common columns under either model.
        flags: int32 bits, `tilt.FLAG_NAMES`.
    """

    alpha: jax.Array
    kl_theta: jax.Array
    kl_t: jax.Array
    kl_diff: jax.Array
    ess_theta: jax.Array
    ess_t: jax.Array
    ess_ratio: jax.Array
    log_ess_theta: jax.Array
    log_ess_t: jax.Array
    entropy_q: jax.Array
    log_z: jax.Array
    overlap_theta: jax.Array
    overlap_t: jax.Array
    flags: jax.Array


def diagnose(tilt: Tilt) -> TokenDiagnostics:
    """Diagnostics of every row, from one pass over both models' logits."""
    pair = tilt.pair

    def rows(x: jax.Array, y: jax.Array, norms: Norms, alpha: jax.Array) -> tuple[jax.Array, ...]:
        part = Pair(x, y, norms)
        return *_sums(part, alpha), *overlap_masses(part)

    sums = map_rows(rows, pair.x, pair.y, pair.norms, tilt.alpha)
    log_z, upper, lower, mean, entropy, overlap_theta, overlap_t = sums
    alpha = tilt.alpha
    same, alone, junk = tilt.has(IDENTICAL), tilt.has(NO_OVERLAP), tilt.has(INVALID)

    log_z = jnp.where(same | alone, 0.0, log_z)
    mean = jnp.where(same | alone, 0.0, mean)
    kl_theta = jnp.maximum(-(1 - alpha) * mean - log_z, 0.0)
    kl_t = jnp.maximum(alpha * mean - log_z, 0.0)
    log_ess_theta = jnp.where(same, 0.0, -(log_z + upper))
    log_ess_t = jnp.where(same | alone, 0.0, -(log_z + lower))
    # At most 1 by definition; the sums may say 1 + 1e-7. Extrapolated alphas keep the bound.
    log_ess_theta, log_ess_t = jnp.minimum(log_ess_theta, 0.0), jnp.minimum(log_ess_t, 0.0)
    log_ess_theta = jnp.where(alone, -jnp.inf, log_ess_theta)
    log_ratio = jnp.clip(log_ess_theta - log_ess_t, -_LOG_LIMIT, _LOG_LIMIT)
    kl_theta = jnp.where(alone, jnp.nan, kl_theta)
    values = {
        "alpha": alpha,
        "kl_theta": kl_theta,
        "kl_t": kl_t,
        "kl_diff": jnp.abs(kl_theta - kl_t),
        "ess_theta": jnp.exp(log_ess_theta),
        "ess_t": jnp.exp(log_ess_t),
        "ess_ratio": jnp.where(alone, 0.0, jnp.exp(log_ratio)),
        "log_ess_theta": log_ess_theta,
        "log_ess_t": log_ess_t,
        "entropy_q": jnp.maximum(entropy, 0.0),
        "log_z": log_z,
        "overlap_theta": overlap_theta,
        "overlap_t": overlap_t,
    }
    values = {name: jnp.where(junk, 0.0, value) for name, value in values.items()}
    return TokenDiagnostics(**values, flags=tilt.flags)


def _sums(pair: Pair, alpha: jax.Array) -> tuple[jax.Array, ...]:
    """K(alpha), K(2 - alpha), K(-alpha), K'(alpha) and H(q); [B] each.

    Rows without a common column give the entropy of pi_t.
    """
    exponents = (alpha, 2 - alpha, -alpha)
    floor = jnp.finfo(pair.x.dtype).min
    empty = pair.norms.empty[:, None]

    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        common, raised, d = pair.gap(x, y)
        log_y = pair.log_weight(y)
        base = jnp.where(common | empty, log_y, floor)
        raised = jnp.where(empty, 0.0, raised)
        *tails, mean, own = carry
        new: list[Any] = []
        for s, (old_peak, total) in zip(exponents, tails, strict=True):
            term = base + s[:, None] * raised
            peak = jnp.maximum(old_peak, jnp.max(term, axis=-1))
            weight = jnp.exp(term - peak[:, None])
            keep = jnp.exp(old_peak - peak)
            if not new:
                # Of the first exponent, q itself, also E[d] and E[b].
                mean = mean * keep + jnp.sum(weight * d, axis=-1)
                own = own * keep + jnp.sum(jnp.where(weight > 0, weight * base, 0.0), axis=-1)
            new.append((peak, total * keep + jnp.sum(weight, axis=-1)))
        return (*new, mean, own)

    zero = jnp.zeros_like(alpha)
    start = (*((zero + floor, zero) for _ in exponents), zero, zero)
    *tails, mean, own = fold_columns(step, start, pair.x, pair.y)
    logs = [
        jnp.log(total) + peak - pair.log_scale(s)
        for s, (peak, total) in zip(exponents, tails, strict=True)
    ]
    total = tails[0][1]
    mean, own = mean / total, own / total
    # H(q) = K - alpha E[d] - E[b]; the constants of K and b cancel.
    raw = jnp.log(total) + tails[0][0]
    raised_mean = jnp.where(pair.norms.empty, 0.0, mean + pair.norms.remainder)
    entropy = raw - alpha * raised_mean - own
    return logs[0], logs[1], logs[2], mean, entropy


def overlap_masses(pair: Pair) -> tuple[jax.Array, jax.Array]:
    """Mass of the common columns under pi_theta and under pi_t; [B] each, 1 with full overlap."""

    def step(carry: tuple[jax.Array, ...], x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        common, _, _ = pair.gap(x, y)
        theta = jnp.where(common, jnp.exp(pair.log_weight_theta(x)), 0.0)
        t = jnp.where(common, jnp.exp(pair.log_weight(y)), 0.0)
        return carry[0] + jnp.sum(theta, axis=-1), carry[1] + jnp.sum(t, axis=-1)

    def masses() -> tuple[jax.Array, jax.Array]:
        theta, t = fold_columns(step, (zero, zero), pair.x, pair.y)
        theta = theta * jnp.exp(-pair.norms.log_sum_x)
        t = t * jnp.exp(-pair.norms.log_sum_y)
        return (
            jnp.where(pair.norms.partial, theta, 1.0),
            jnp.where(pair.norms.partial, t, 1.0),
        )

    zero = jnp.zeros_like(pair.norms.offset)
    # Only restricted vocabularies have anything to add up.
    return lax.cond(jnp.any(pair.norms.partial), masses, lambda: (zero + 1.0, zero + 1.0))
