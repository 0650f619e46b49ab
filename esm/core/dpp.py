"""Greedy choice of entries that are good and unlike each other (a determinantal point process).

The greedy maximum of sum_i log(1 + q_i) + lambda log det(K_S + eps I), K = k k^T over unit keys k,
by the incremental Cholesky factor of Chen, Zhang and Zhou (2018): the gain of i given S is
log(1 + q_i) + lambda log s_i, where s_i = K_ii + eps - |L_S^-1 K_Si|^2 shrinks with every pick.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MIN_RESIDUAL = 1e-12
NONE = -1


class Picks(NamedTuple):
    """What was picked, in order.

    Attributes:
        entry: [B] int32, NONE behind the last pick.
        gain: [B], 0 behind the last pick.
        residual: [B], s of each pick; 0 behind the last.
    """

    entry: jax.Array
    gain: jax.Array
    residual: jax.Array


class _Carry(NamedTuple):
    factor: jax.Array  # [B, N] rows of L^-1 K for the picks so far
    residual: jax.Array  # [N]
    open: jax.Array  # [N] bool, may still be picked
    picks: Picks


def dpp_greedy(
    keys: jax.Array,
    quality: jax.Array,
    valid: jax.Array,
    size: int,
    diversity: float | jax.Array,
    epsilon: float | jax.Array,
    forced: jax.Array | None = None,
    group: jax.Array | None = None,
) -> Picks:
    """Picks up to `size` entries; one product of all keys with one key per pick.

    Entries whose residual is not above MIN_RESIDUAL are not eligible; ties go to the lowest index.
    Float32 reproduces float64 as long as epsilon is above its rounding (1e-4 is); exact duplicates
    under epsilon = 0 need double precision.

    Args:
        keys: [N, H] unit vectors.
        quality: [N]; negative counts as 0.
        valid: [N] bool, False for padding.
        size: B, static.
        diversity: lambda >= 0.
        epsilon: added to the diagonal, >= 0.
        forced: [B] int32, entries picked at their step whatever they gain; NONE = the best.
        group: [N] int32; entries of different groups count as orthogonal. None = one group.
    """
    count, dtype = keys.shape[0], keys.dtype
    value = jnp.log1p(jnp.maximum(quality.astype(dtype), 0))

    def gains(carry: _Carry) -> tuple[jax.Array, jax.Array]:
        eligible = carry.open & (carry.residual > MIN_RESIDUAL) & jnp.isfinite(carry.residual)
        inner = jnp.where(eligible, carry.residual, 1)
        return jnp.where(eligible, value + diversity * jnp.log(inner), -jnp.inf), eligible

    def pick(step: jax.Array, carry: _Carry) -> _Carry:
        gain, eligible = gains(carry)
        best = jnp.argmax(gain)
        if forced is not None:
            best = jnp.where(forced[step] == NONE, best, forced[step])
        found = eligible[best]
        residual = jnp.where(found, carry.residual[best], 1)
        row = jnp.matmul(keys, keys[best], precision=jax.lax.Precision.HIGHEST)
        if group is not None:
            row = jnp.where(group == group[best], row, 0)
        own = jnp.matmul(
            carry.factor[:, best], carry.factor, precision=jax.lax.Precision.HIGHEST
        )  # [N]
        new = jnp.where(found, (row - own) / jnp.sqrt(residual), 0)
        picks = Picks(
            entry=carry.picks.entry.at[step].set(jnp.where(found, best, NONE).astype(jnp.int32)),
            gain=carry.picks.gain.at[step].set(jnp.where(found, gain[best], 0)),
            residual=carry.picks.residual.at[step].set(jnp.where(found, residual, 0)),
        )
        return _Carry(
            factor=carry.factor.at[step].set(new),
            residual=carry.residual - new * new,
            open=carry.open.at[best].set(False),
            picks=picks,
        )

    start = _Carry(
        factor=jnp.zeros((size, count), dtype),
        residual=jnp.full((count,), 1 + epsilon, dtype),  # unit keys: K_ii is 1, not its rounding
        open=valid,
        picks=Picks(
            jnp.full((size,), NONE, jnp.int32), jnp.zeros((size,), dtype), jnp.zeros((size,), dtype)
        ),
    )
    return jax.lax.fori_loop(0, size, pick, start).picks
