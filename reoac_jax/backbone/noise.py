"""Masking schedules, noise times, the reverse posterior and the corruption of clean tokens.

alpha(t) is the probability that a token is still clean at time t: 1 at t = 0, 0 at t = 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError

TIME_EPS = 1e-3
"""Smallest noise time that is drawn; keeps 1 / (1 - alpha) finite."""


class Schedule(NamedTuple):
    """One masking schedule; all functions are elementwise on float32 arrays.

    Attributes:
        alpha: t -> probability of a clean token.
        alpha_prime: t -> d alpha / d t.
        inverse: alpha -> t.
        sigma: t -> total noise, -log alpha(t).
        sigma_prime: t -> d sigma / d t.
    """

    alpha: Callable[[jax.Array], jax.Array]
    alpha_prime: Callable[[jax.Array], jax.Array]
    inverse: Callable[[jax.Array], jax.Array]
    sigma: Callable[[jax.Array], jax.Array]
    sigma_prime: Callable[[jax.Array], jax.Array]


_Function = Callable[[jax.Array], jax.Array]


def _from_alpha(alpha: _Function, alpha_prime: _Function, inverse: _Function) -> Schedule:
    return Schedule(
        alpha,
        alpha_prime,
        inverse,
        sigma=lambda t: -jnp.log(alpha(t)),
        sigma_prime=lambda t: -alpha_prime(t) / alpha(t),
    )


def _from_sigma(sigma: _Function, sigma_prime: _Function, inverse: _Function) -> Schedule:
    """A schedule from its total noise; `inverse` takes sigma."""
    return Schedule(
        alpha=lambda t: jnp.exp(-sigma(t)),
        alpha_prime=lambda t: -sigma_prime(t) * jnp.exp(-sigma(t)),
        inverse=lambda a: inverse(-jnp.log(a)),
        sigma=sigma,
        sigma_prime=sigma_prime,
    )


def _linear() -> Schedule:
    return _from_alpha(
        alpha=lambda t: 1.0 - t,
        alpha_prime=lambda t: -jnp.ones_like(t),
        inverse=lambda a: 1.0 - a,
    )


def _cosine(eps: float) -> Schedule:
    half_pi = math.pi / 2
    return _from_alpha(
        alpha=lambda t: (1.0 - eps) * jnp.cos(half_pi * t),
        alpha_prime=lambda t: -(1.0 - eps) * half_pi * jnp.sin(half_pi * t),
        inverse=lambda a: jnp.arccos(a / (1.0 - eps)) / half_pi,
    )


def _logarithmic() -> Schedule:
    return _from_alpha(
        alpha=lambda t: 1.0 - jnp.log2(1.0 + t),
        alpha_prime=lambda t: -1.0 / ((1.0 + t) * math.log(2.0)),
        inverse=lambda a: jnp.exp2(1.0 - a) - 1.0,
    )


def _exponential(exponent: float, eps: float) -> Schedule:
    # The derivative ignores the floor of eps on purpose: it is the weight of the likelihood bound.
    return _from_alpha(
        alpha=lambda t: 1.0 - jnp.maximum(t**exponent, eps),
        alpha_prime=lambda t: -exponent * t ** (exponent - 1.0),
        inverse=lambda a: (1.0 - a) ** (1.0 / exponent),
    )


def _loglinear(eps: float) -> Schedule:
    return Schedule(
        alpha=lambda t: 1.0 - (1.0 - eps) * t,
        alpha_prime=lambda t: -(1.0 - eps) * jnp.ones_like(t),
        inverse=lambda a: (1.0 - a) / (1.0 - eps),
        sigma=lambda t: -jnp.log1p(-(1.0 - eps) * t),
        sigma_prime=lambda t: (1.0 - eps) / (1.0 - (1.0 - eps) * t),
    )


def _cosine_power(power: int, eps: float) -> Schedule:
    """alpha = eps + (1 - eps) cos(pi t / 2)^power, the cosine schedules of MDLM."""
    half_pi = math.pi / 2

    def slope(t: jax.Array) -> jax.Array:
        cos, sin = jnp.cos(half_pi * t), jnp.sin(half_pi * t)
        return -(1.0 - eps) * power * cos ** (power - 1) * sin * half_pi

    return _from_alpha(
        alpha=lambda t: eps + (1.0 - eps) * jnp.cos(half_pi * t) ** power,
        alpha_prime=slope,
        inverse=lambda a: (
            jnp.arccos(jnp.maximum((a - eps) / (1.0 - eps), 0.0) ** (1.0 / power)) / half_pi
        ),
    )


def _linear_sigma(low: float, high: float) -> Schedule:
    return _from_sigma(
        sigma=lambda t: low + t * (high - low),
        sigma_prime=lambda t: jnp.full_like(t, high - low),
        inverse=lambda s: (s - low) / (high - low),
    )


def _geometric(low: float, high: float) -> Schedule:
    ratio = math.log(high / low)

    def sigma(t: jax.Array) -> jax.Array:
        return low ** (1.0 - t) * high**t

    return _from_sigma(
        sigma=sigma,
        sigma_prime=lambda t: sigma(t) * ratio,
        inverse=lambda s: jnp.log(s / low) / ratio,
    )


SCHEDULES = (
    "linear",
    "cosine",
    "logarithmic",
    "exponential",
    "loglinear",
    "cosine_floor",
    "cosine_squared",
    "linear_sigma",
    "geometric",
)


def make_schedule(
    name: str,
    eps: float = 1e-3,
    exponent: float = 2.0,
    *,
    sigma_min: float = 1e-4,
    sigma_max: float = 20.0,
) -> Schedule:
    """The schedule of a name.

    Args:
        name: One of `SCHEDULES`. "cosine" is E2D2's; "cosine_floor" and "cosine_squared" are
            MDLM's "cosine" and "cosinesqr", which end at alpha = eps.
        eps: Offset of the cosines, exponential and loglinear.
        exponent: Power of exponential.
        sigma_min: Total noise at t = 0 of linear_sigma and geometric.
        sigma_max: Total noise at t = 1 of linear_sigma and geometric.

    Raises:
        UserError: The name is unknown.
    """
    makers: dict[str, Callable[[], Schedule]] = {
        "linear": _linear,
        "cosine": lambda: _cosine(eps),
        "logarithmic": _logarithmic,
        "exponential": lambda: _exponential(exponent, eps),
        "loglinear": lambda: _loglinear(eps),
        "cosine_floor": lambda: _cosine_power(1, eps),
        "cosine_squared": lambda: _cosine_power(2, eps),
        "linear_sigma": lambda: _linear_sigma(sigma_min, sigma_max),
        "geometric": lambda: _geometric(sigma_min, sigma_max),
    }
    if name not in makers:
        raise UserError(f"unknown noise schedule '{name}': choose one of {', '.join(SCHEDULES)}")
    return makers[name]()


# --------------------------------------------------------------------------------- noise times
def floor_times(uniform: jax.Array, eps: float = TIME_EPS) -> jax.Array:
    """Moves draws from [0, 1) to [eps, 1)."""
    return uniform * (1.0 - eps) + eps


def spread_times(
    uniform: jax.Array,
    *,
    eps: float = TIME_EPS,
    row_offset: jax.Array | int = 0,
    total_rows: int | None = None,
) -> jax.Array:
    """Turns independent uniform draws into low-discrepancy noise times.

    Entry i of n lands in the i-th of n equal slices: t_i = ((u_i + i) / n mod 1)(1 - eps) + eps.
    Rows and blocks are numbered together, rows first.

    Args:
        uniform: [B] or [B, blocks] float32 in [0, 1).
        eps: Smallest time.
        row_offset: Global index of the first row, when the batch is split over processes.
        total_rows: Rows of the global batch; default B.

    Returns:
        Times of the same shape.
    """
    per_row = math.prod(uniform.shape[1:])
    count = (total_rows or uniform.shape[0]) * per_row
    index = jnp.arange(uniform.size).reshape(uniform.shape) + row_offset * per_row
    return floor_times(jnp.mod((uniform + index) / count, 1.0), eps)


def importance_times(uniform: jax.Array, schedule: Schedule, low: float, high: float) -> jax.Array:
    """Noise times at which log(1 - e^-sigma) is uniform: lowers the variance of MDLM's bound.

    There the bound's weight sigma' / (e^sigma - 1) is constant (Sahoo et al., 2024).

    Args:
        uniform: Draws in [0, 1].
        schedule: The noise schedule.
        low: sigma at draw 0, greater than 0.
        high: sigma at draw 1.
    """
    first, last = math.log(-math.expm1(-low)), math.log(-math.expm1(-high))
    sigma = -jnp.log1p(-jnp.exp(uniform * last + (1.0 - uniform) * first))
    return schedule.inverse(jnp.exp(-sigma))


def sample_times(
    key: jax.Array,
    batch: int,
    blocks: int,
    block_size: int,
    *,
    low_discrepancy: bool = True,
    eps: float = TIME_EPS,
) -> jax.Array:
    """Draws one noise time per block and repeats it over the block.

    Args:
        key: RNG key; consumed.
        batch: B.
        blocks: Blocks per row, L / S.
        block_size: S.
        low_discrepancy: Spread the times over [eps, 1] instead of drawing them independently.
        eps: Smallest time.

    Returns:
        [B, L] float32.
    """
    draw_key, order_key = jax.random.split(key)
    uniform = jax.random.uniform(draw_key, (batch, blocks))
    times = (spread_times if low_discrepancy else floor_times)(uniform, eps=eps)
    # Slices are handed out in order, so without this a block's time would follow its place.
    times = times[:, jax.random.permutation(order_key, blocks)]
    return repeat_blocks(times, block_size)


def repeat_blocks(per_block: jax.Array, block_size: int) -> jax.Array:
    """[B, blocks] -> [B, L], every value S times."""
    return jnp.repeat(per_block, block_size, axis=1)


# -------------------------------------------------------------------------------- corruption
def corrupt(
    key: jax.Array,
    clean_ids: jax.Array,
    alpha_t: jax.Array,
    *,
    mask_id: int,
    keep_mask: jax.Array,
    keep_first: bool = True,
) -> jax.Array:
    """Masks every token independently with probability 1 - alpha.

    Args:
        key: RNG key; consumed.
        clean_ids: [B, L] int32.
        alpha_t: [B, L] float32.
        mask_id: Mask token.
        keep_mask: [B, L] bool, True = never masked (prompt).
        keep_first: Also never mask position 0.

    Returns:
        [B, L] int32 noisy ids.
    """
    hit = jax.random.uniform(key, clean_ids.shape) < 1.0 - alpha_t
    hit &= ~keep_mask
    if keep_first:
        hit = hit.at[:, 0].set(False)
    return jnp.where(hit, mask_id, clean_ids)


def remask_empty_blocks(
    noisy_ids: jax.Array,
    clean_ids: jax.Array,
    context_mask: jax.Array,
    counts: jax.Array,
    ranks: jax.Array,
    *,
    mask_id: int,
    block_size: int,
    keep_first: bool = True,
) -> jax.Array:
    """Masks count + 1 positions of every block that has neither a mask nor a prompt token.

    A block without a mask teaches nothing; the positions with the smallest ranks are taken.

    Args:
        noisy_ids: [B, L] int32.
        clean_ids: [B, L] int32.
        context_mask: [B, L] bool, True = prompt.
        counts: [B, L / S] int32 in 0..S-1, draws of the number of positions.
        ranks: [B, L] float32 draws that order the positions of a block.
        mask_id: Mask token.
        block_size: S.
        keep_first: Position 0 comes out clean.

    Returns:
        [B, L] int32.
    """
    batch, length = noisy_ids.shape
    blocks = (batch, length // block_size, block_size)
    occupied = (noisy_ids == mask_id) | context_mask
    empty = ~jnp.any(occupied.reshape(blocks), axis=-1, keepdims=True)  # [B, L/S, 1]
    order = jnp.argsort(jnp.argsort(ranks.reshape(blocks), axis=-1), axis=-1)  # [B, L/S, S]
    hit = (empty & (order <= counts[..., None])).reshape(batch, length)
    noisy_ids = jnp.where(hit, mask_id, noisy_ids)
    return noisy_ids.at[:, 0].set(clean_ids[:, 0]) if keep_first else noisy_ids


def noise_blocks(
    key: jax.Array,
    clean_ids: jax.Array,
    context_mask: jax.Array,
    alpha_t: jax.Array,
    *,
    mask_id: int,
    block_size: int,
    keep_first: bool = True,
) -> jax.Array:
    """Training corruption: independent masking, then no block without a mask.

    Args:
        key: RNG key; consumed.
        clean_ids: [B, L] int32.
        context_mask: [B, L] bool, True = prompt, never masked.
        alpha_t: [B, L] float32.
        mask_id: Mask token.
        block_size: S, divides L.
        keep_first: Position 0 is never masked.

    Returns:
        [B, L] int32 noisy ids.
    """
    hit_key, count_key, rank_key = jax.random.split(key, 3)
    noisy = corrupt(
        hit_key,
        clean_ids,
        alpha_t,
        mask_id=mask_id,
        keep_mask=context_mask,
        keep_first=keep_first,
    )
    batch, length = clean_ids.shape
    counts = jax.random.randint(count_key, (batch, length // block_size), 0, block_size)
    ranks = jax.random.uniform(rank_key, clean_ids.shape)
    return remask_empty_blocks(
        noisy,
        clean_ids,
        context_mask,
        counts,
        ranks,
        mask_id=mask_id,
        block_size=block_size,
        keep_first=keep_first,
    )


def reverse_posterior(
    log_probs: jax.Array, alpha_t: jax.Array, alpha_s: jax.Array, mask_id: int
) -> jax.Array:
    """Distribution of a masked token at the earlier time s < t.

    q(y) = p(y) (alpha_s - alpha_t) / (1 - alpha_t), q(mask) = (1 - alpha_s) / (1 - alpha_t).

    Args:
        log_probs: [..., V] SUBS log-probabilities.
        alpha_t: alpha at the present time, broadcastable to [..., 1].
        alpha_s: alpha at the earlier time, likewise.
        mask_id: Mask token.

    Returns:
        [..., V] float32 probabilities; meaningful where the present token is the mask.
    """
    weight = jnp.exp(log_probs) * (alpha_s - alpha_t)
    is_mask = jnp.arange(log_probs.shape[-1]) == mask_id
    return jnp.where(is_mask, 1.0 - alpha_s, weight) / (1.0 - alpha_t)


# -------------------------------------------------------------------------- likelihood bound
def likelihood_bound(true_log_probs: jax.Array, schedule: Schedule, t: jax.Array) -> jax.Array:
    """Per-token negative log-likelihood bound: a alpha'(t) / (1 - alpha(t)).

    Args:
        true_log_probs: [B, L] float32, a = SUBS log-probability of the clean token (0 where the
            token is not masked).
        schedule: The noise schedule.
        t: [B, L] float32 noise times.

    Returns:
        [B, L] float32, not yet averaged.
    """
    weight = schedule.alpha_prime(t) / jnp.maximum(1.0 - schedule.alpha(t), 1e-12)
    return true_log_probs * weight


def mean_over_rows(values: jax.Array, weight: jax.Array) -> jax.Array:
    """mean_b(sum(values weight) / sum(weight)) of [B, L] arrays."""
    total = jnp.maximum(jnp.sum(weight, axis=1), 1.0)
    return jnp.mean(jnp.sum(values * weight, axis=1) / total)
