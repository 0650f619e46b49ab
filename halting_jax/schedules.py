"""Learning rate, time penalty and the freezing of the halting unit, as functions of the step."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from common.errors import require

START_FACTOR = 1e-8  # of the rate at the start of the warm-up
UNITS = ("step", "epoch")
SCHEDULES = ("cosine", "constant")


def learning_rate(
    base: float, schedule: str, warmup: int, total: int, per_unit: int = 1
) -> Callable[[Any], jax.Array]:
    """Makes the rate as a function of the number of updates done.

    With e = floor(step / per_unit), W = warmup and E = total, all in the same unit:
    constant: base; W = 0: base (1 + cos(pi e / E)) / 2; W >= E: base (f + (1 - f) e / E); else
    e < W: base (f + (1 - f) e / W), and e >= W: cosine over the E - W that are left. f = 1e-8.

    Args:
      base: peak rate.
      schedule: "cosine" (with warm-up) or "constant" (which has none).
      warmup: length of the linear rise.
      total: length of the whole run.
      per_unit: updates per unit: 1, or the updates of an epoch for the original's schedule, which
        changes between epochs only (its whole first epoch trains with a rate of nearly 0).

    Raises:
      UserError: for values out of range.
    """
    require(schedule in SCHEDULES, f"optim.schedule={schedule!r} is none of {', '.join(SCHEDULES)}")
    require(base >= 0, f"optim.lr={base} must not be negative")
    require(warmup >= 0, f"the warm-up of the rate must not be negative, got {warmup}")
    require(total >= 1 and per_unit >= 1, "the run must have at least one update")
    if schedule == "constant":
        return lambda step: jnp.asarray(base, float)

    def rate(step: Any) -> jax.Array:
        e = (jnp.asarray(step) // per_unit).astype(float)
        rise = START_FACTOR + (1.0 - START_FACTOR) * e / max(min(warmup, total), 1)
        if warmup >= total:
            return base * rise
        progress = jnp.clip((e - warmup) / (total - warmup), 0.0, 1.0)
        fall = 0.5 * (1.0 + jnp.cos(math.pi * progress))
        return base * jnp.where(e < warmup, rise, fall)

    return rate


def time_penalty(target: float, start: float, warmup_steps: int) -> Callable[[Any], jax.Array]:
    """Makes tau as a function of the step: start + (target - start) min(1, step / warmup_steps).

    warmup_steps <= 0 means the target from the beginning. Evaluation uses the target.
    """

    def tau(step: Any) -> jax.Array:
        if warmup_steps <= 0:
            return jnp.asarray(target, float)
        share = jnp.minimum(1.0, jnp.asarray(step).astype(float) / warmup_steps)
        return start + (target - start) * share

    return tau
