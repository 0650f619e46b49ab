"""Statistics of halting as sums, so that those of many batches and shards add up exactly."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from halting_jax.types import Ponder


@flax.struct.dataclass
class PonderSums:
    """Sums over the masked calls of a batch.

    Attributes:
      calls: [] how many.
      cost: [] sum of N + R (or remainder + updates).
      remainder, remainder_square: [] of the mass given to the last step.
      forced: [] calls stopped by the limit alone.
      histogram: int32 [K + 1], calls by number of steps; more than K count as K.
      mass: float [M], accumulated mass after each inner step ([0] without one).
      executed: [] inner steps computed, batches: [] batches behind these sums.
    """

    calls: jax.Array
    cost: jax.Array
    remainder: jax.Array
    remainder_square: jax.Array
    forced: jax.Array
    histogram: jax.Array
    mass: jax.Array
    executed: jax.Array
    batches: jax.Array


def ponder_sums(ponder: Ponder, most: int) -> PonderSums:
    """Adds up a batch on device.

    Args:
      ponder: [B, C] arrays.
      most: K, the most steps a call can take, static; with fixed steps it may be above the limit.
    """
    mask = ponder.mask
    rem = jax.lax.stop_gradient(jnp.where(mask, ponder.remainder, 0.0))
    steps = jnp.clip(jnp.round(ponder.steps), 0, most).astype(jnp.int32)
    # Comparisons, not a scatter: M is small and a scatter of B * C ones is slow on CPU.
    hits = (steps[..., None] == jnp.arange(most + 1)) & mask[..., None]  # [B, C, K + 1]
    return PonderSums(
        calls=jnp.sum(mask, dtype=jnp.int32),
        cost=jax.lax.stop_gradient(jnp.sum(jnp.where(mask, ponder.cost, 0.0))),
        remainder=jnp.sum(rem),
        remainder_square=jnp.sum(rem**2),
        forced=jnp.sum(ponder.forced & mask, dtype=jnp.int32),
        histogram=jnp.sum(hits, axis=(0, 1), dtype=jnp.int32),
        mass=jax.lax.stop_gradient(ponder.mass),
        executed=jnp.asarray(ponder.executed, jnp.int32),
        batches=jnp.int32(1),
    )


def ponder_report(sums: PonderSums, max_steps: int = 0) -> dict[str, Any]:
    """Means, quantiles and the halting curve from sums on the host.

    Args:
      sums: of any number of batches.
      max_steps: M, the limit of the model; 0 = the K of the sums.

    Returns:
      ponder_mean, steps, steps_p50, steps_p90 (linear interpolation), remainder_mean and
      remainder_std (population), halt_natural_ratio, halt_forced_ratio,
      mean_inner_steps_executed, accumulated_p [M] and n_updates_hist [M] (index i: i + 1 steps;
      more than M count as M).
    """
    calls = max(int(sums.calls), 1)
    histogram = np.asarray(sums.histogram, np.int64)
    mean = float(sums.remainder) / calls
    forced = float(sums.forced) / calls
    limit = max_steps or len(histogram) - 1
    updates = histogram[1 : limit + 1].copy()
    updates[-1] += histogram[limit + 1 :].sum()
    return {
        "ponder_mean": float(sums.cost) / calls,
        "steps": float(histogram @ np.arange(len(histogram))) / calls,
        "steps_p50": histogram_quantile(histogram, 0.5),
        "steps_p90": histogram_quantile(histogram, 0.9),
        "remainder_mean": mean,
        "remainder_std": float(np.sqrt(max(float(sums.remainder_square) / calls - mean**2, 0.0))),
        "halt_natural_ratio": 1.0 - forced if int(sums.calls) else 0.0,
        "halt_forced_ratio": forced,
        "mean_inner_steps_executed": float(sums.executed) / max(int(sums.batches), 1),
        "accumulated_p": np.asarray(sums.mass, float) / calls,
        "n_updates_hist": updates,
    }


def histogram_quantile(histogram: np.ndarray, q: float) -> float:
    """The linearly interpolated q-quantile of integers given as counts [M + 1] of 0..M."""
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    place = q * (total - 1)
    below, above = int(np.floor(place)), int(np.ceil(place))
    edges = np.cumsum(histogram)
    low, high = (int(np.searchsorted(edges, rank + 1)) for rank in (below, above))
    return low + (high - low) * (place - below)
