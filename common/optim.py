"""The optimizer (AdamW with optional warm-up, cosine decay and clipping) and weight averaging."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from common.errors import require

SCHEDULES = ("constant", "cosine")

Tree = TypeVar("Tree")


def make_schedule(
    learning_rate: float,
    *,
    warmup: int = 0,
    schedule: str = "constant",
    total_steps: int = 0,
    final: float = 0.0,
) -> Callable[[Any], jax.Array]:
    """Makes the learning rate as a function of the number of updates done.

    rate(n) = learning_rate * min(1, (n + 1) / warmup) * decay(n); the cosine decay falls from 1 at
    the end of the warm-up to `final` at `total_steps`. The first update already moves.

    Args:
        learning_rate: the peak rate.
        warmup: updates of the linear rise, 0 for none.
        schedule: `constant` or `cosine`.
        total_steps: updates of the whole run; needed by `cosine`.
        final: share of the peak rate at the end, in [0, 1].

    Raises:
        UserError: for values out of range.
    """
    require(learning_rate >= 0, f"learning rate must not be negative, got {learning_rate}")
    require(0.0 <= final <= 1.0, f"the final share of the rate must lie in [0, 1], got {final}")
    require(warmup >= 0, f"warmup must not be negative, got {warmup}")
    require(
        schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}"
    )
    require(
        schedule != "cosine" or total_steps > warmup,
        f"the cosine schedule needs total_steps > warmup, got {total_steps} and {warmup}",
    )

    def rate(count: Any) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        value = jnp.asarray(learning_rate, jnp.float32)
        if warmup:
            value = value * jnp.minimum(1.0, (n + 1.0) / warmup)
        if schedule == "cosine":
            progress = jnp.clip((n - warmup) / (total_steps - warmup), 0.0, 1.0)
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
            value = value * (final + (1.0 - final) * decay)
        return value

    return rate


def make_optimizer(
    learning_rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_clip: float = 0.0,
    warmup: int = 0,
    schedule: str = "constant",
    total_steps: int = 0,
    final: float = 0.0,
    decay_mask: Any = None,
    norm: Callable[[Any], jax.Array] = optax.global_norm,
) -> optax.GradientTransformation:
    """Makes AdamW: p <- p - rate * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p).

    Args:
        learning_rate: the peak rate.
        betas: decays of the first and second moment, each in [0, 1).
        eps: added outside the root.
        weight_decay: decoupled decay, scaled by the rate.
        grad_clip: largest global gradient norm, 0 for no clipping.
        warmup: see `make_schedule`.
        schedule: see `make_schedule`.
        total_steps: see `make_schedule`.
        final: see `make_schedule`.
        decay_mask: tree of booleans (or a function of the parameters), True = decays; None = all.
        norm: of the whole gradient, where a device sees only a share (`common.fsdp`).

    Raises:
        UserError: for values out of range.
    """
    require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        f"betas must be two numbers in [0, 1), got {tuple(betas)}",
    )
    require(eps > 0, f"eps must be positive, got {eps}")
    require(weight_decay >= 0, f"weight decay must not be negative, got {weight_decay}")
    require(grad_clip >= 0, f"grad_clip must not be negative (0 = off), got {grad_clip}")
    rate = make_schedule(
        learning_rate, warmup=warmup, schedule=schedule, total_steps=total_steps, final=final
    )
    adamw = optax.adamw(
        rate, b1=betas[0], b2=betas[1], eps=eps, weight_decay=weight_decay, mask=decay_mask
    )
    if not grad_clip:
        return adamw
    return optax.chain(clip_by_norm(grad_clip, norm), adamw)


def clip_by_norm(
    limit: float, norm: Callable[[Any], jax.Array] = optax.global_norm
) -> optax.GradientTransformation:
    """Scales gradients to a global norm of at most `limit`; see `optax.clip_by_global_norm`.

    Args:
        limit: the largest norm.
        norm: of the whole gradient.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        size = norm(grads)

        def clip(g: jax.Array) -> jax.Array:
            return jnp.where(size < limit, g, (g / size.astype(g.dtype)) * limit)

        return jax.tree.map(clip, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def ema_update(average: Tree, params: Tree, count: Any, decay: float) -> Tree:
    """Moves a running average towards the parameters: a <- d a + (1 - d) p.

    d = min(decay, (1 + n) / (10 + n)), so that the early average is not ruled by its start.

    Args:
        average: tree of arrays, kept in their own dtype.
        params: tree of the same shapes.
        count: n, updates of the average done before this one.
        decay: the final decay, in [0, 1).

    Returns:
        The new average.
    """
    n = jnp.asarray(count, jnp.float32)
    d = jnp.minimum(decay, (1.0 + n) / (10.0 + n))

    def blend(old: jax.Array, new: jax.Array) -> jax.Array:
        # float32: in bfloat16 the small steps of a slow average would round to nothing.
        mixed = d * old.astype(jnp.float32) + (1.0 - d) * new.astype(jnp.float32)
        return mixed.astype(old.dtype)

    return jax.tree.map(blend, average, params)
