"""Noise level of a denoising step, and how many positions are due at it."""

import jax
import jax.numpy as jnp


def sigma(
    step: jax.Array | int,
    *,
    num_steps: int = 32,
    sigma_min: float = 0.0,
    sigma_max: float = 1.0,
    schedule: str = "cosine",
) -> jax.Array:
    """Noise level of a step (noise schedule, spec 2.4).

    u = clip(step / (num_steps - 1), 0, 1); cosine: min + (max - min)(1 + cos(pi u)) / 2; linear:
    max + (min - max) u. A single step has the smallest level; unknown names mean cosine.

    Args:
        step: any shape, i32.
        num_steps: N.
        sigma_min: level of the last step.
        sigma_max: level of the first step.
        schedule: "cosine" or "linear".

    Returns:
        f32 of the shape of step.
    """
    position = jnp.asarray(step, jnp.float32)
    if num_steps <= 1:
        return jnp.full(position.shape, sigma_min, jnp.float32)
    u = jnp.clip(position / (num_steps - 1), 0.0, 1.0)
    if schedule == "linear":
        return sigma_max + (sigma_min - sigma_max) * u
    return sigma_min + (sigma_max - sigma_min) * (1.0 + jnp.cos(jnp.pi * u)) / 2.0


def pace(remaining: jax.Array, steps_left: jax.Array | int) -> jax.Array:
    """ceil(remaining [B] / max(steps_left, 1)): positions due now so that the last step completes.

    Args:
        remaining: [B] i32, masked positions.
        steps_left: [] or [B] i32, this step included.

    Returns:
        [B] i32.
    """
    left = jnp.maximum(jnp.asarray(steps_left, jnp.int32), 1)
    return ((remaining + left - 1) // left).astype(jnp.int32)
