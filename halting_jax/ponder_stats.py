"""Statistics of one batch's halting, exact and on device; `ponder_sums` adds up many batches.

Names are those of the original: remainder_mean and remainder_std (population), natural_halt_ratio
and forced_halt_ratio, mean_steps, steps_p50 and steps_p90 (linear interpolation),
accumulated_p_curve, n_updates_histogram.
"""

import jax
import jax.numpy as jnp

from halting_jax.types import Ponder


def masked_quantile(values: jax.Array, mask: jax.Array, q: float) -> jax.Array:
    """The linearly interpolated q-quantile of the values under a mask; 0 if there are none.

    Args:
      values: any shape, finite where it counts.
      mask: bool of the same shape, True = counted.
      q: 0..1.
    """
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf).reshape(-1))
    place = q * (jnp.maximum(jnp.sum(mask), 1) - 1)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.ceil(place).astype(jnp.int32)]
    return jnp.where(jnp.any(mask), low + (high - low) * (place - below), 0.0)


def steps_histogram(steps: jax.Array, mask: jax.Array, max_steps: int) -> jax.Array:
    """How many calls took 1, 2, .. max_steps steps; values outside are clipped.

    Args:
      steps: [B, C] whole numbers.
      mask: bool [B, C], True = counted.
      max_steps: M, static.

    Returns:
      int32 [M]; entry i counts i + 1 steps.
    """
    clipped = jnp.clip(steps, 1, max_steps).astype(jnp.int32)
    # Comparisons, not a scatter: M is small and a scatter of B * C ones is slow on CPU.
    hits = (clipped[..., None] == jnp.arange(1, max_steps + 1)) & mask[..., None]
    return jnp.sum(hits, axis=tuple(range(steps.ndim)), dtype=jnp.int32)


def ponder_stats(ponder: Ponder, max_steps: int) -> dict[str, jax.Array]:
    """All statistics over the calls that count.

    Args:
      ponder: [B, C] arrays.
      max_steps: M of the histogram, static.

    Returns:
      scalars by name (module docstring), accumulated_p_curve [len(mass)] and n_updates_histogram
      int32 [M]; no gradient flows through any of them.
    """
    ponder = jax.lax.stop_gradient(ponder)
    mask, steps = ponder.mask, ponder.steps
    count = jnp.maximum(jnp.sum(mask), 1)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, values, 0)) / count

    remainder = mean(ponder.remainder)
    return {
        "remainder_mean": remainder,
        "remainder_std": jnp.sqrt(mean(jnp.square(ponder.remainder - remainder))),
        "natural_halt_ratio": mean(~ponder.forced),
        "forced_halt_ratio": mean(ponder.forced),
        "mean_steps": mean(steps),
        "steps_p50": masked_quantile(steps, mask, 0.5),
        "steps_p90": masked_quantile(steps, mask, 0.9),
        "accumulated_p_curve": ponder.mass / count,
        "n_updates_histogram": steps_histogram(steps, mask, max_steps),
    }
