"""From a tilt to the law that is sampled: special tokens, support, top-k and top-p.

All in log weights, which need no normaliser; -inf = impossible.
"""

import dataclasses

import jax
import jax.numpy as jnp

from common.errors import require
from common.lm.sampling import keep_mask
from qstar.tilt import Tilt

SPECIAL_MODES = ("mix", "target_mass")
SUPPORTS = ("full", "target")


@dataclasses.dataclass(frozen=True)
class LawSettings:
    """What happens between q_alpha and the drawn token; static.

    Attributes:
        special_tokens: "mix" = like any other token; "target_mass" = the special tokens keep
            pi_t's probability, the rest of q is scaled to what is left.
        support: "target" keeps only pi_t's top-k and nucleus of `support_top_k`, `support_top_p`.
        support_top_k, support_top_p: <= 0 and 1 switch them off.
        top_k, top_p: filters of q; <= 0 and 1 switch them off.
    """

    special_tokens: str = "mix"
    support: str = "full"
    support_top_k: int = -1
    support_top_p: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuses settings that make no sense, naming the key."""
        require(
            self.special_tokens in SPECIAL_MODES,
            f"q.special_tokens {self.special_tokens!r} is none of {', '.join(SPECIAL_MODES)}",
        )
        require(
            self.support in SUPPORTS, f"q.support {self.support!r} is none of {', '.join(SUPPORTS)}"
        )
        for key, value in (
            ("q.support_top_p", self.support_top_p),
            ("sampling.top_p", self.top_p),
        ):
            require(0.0 < value <= 1.0, f"{key} must lie in (0, 1], not {value}")


def log_weights(
    tilt: Tilt,
    settings: LawSettings,
    special: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """Log weights of the law to be sampled.

    Rows that take pi_t alone (no overlap, forced) take it whole: no rule and no filter applies.

    Args:
        tilt: both models and alpha.
        settings: rules and filters; static.
        special: [V] bool, the special tokens; needed by "target_mass".
        allowed: [V] bool, tokens that may be drawn at all (both tokenizers have them); None = all.

    Returns:
        [B, V], not normalised. Nothing but -inf where the rules leave nothing (a support that the
        other model forbids); invalid rows are NaN.
    """
    pair = tilt.pair
    common, raised, _ = pair.gap(pair.x, pair.y)
    log_t = pair.log_weight(pair.y)
    weights = jnp.where(common, log_t + tilt.alpha[:, None] * raised, -jnp.inf)
    if settings.special_tokens == "target_mass":
        if special is None:
            raise ValueError("q.special_tokens='target_mass' needs the special tokens' mask")
        weights = keep_target_mass(weights, log_t, special)
    if settings.support == "target":
        weights = jnp.where(
            _kept(log_t, settings.support_top_k, settings.support_top_p), weights, -jnp.inf
        )
    weights = jnp.where(_kept(weights, settings.top_k, settings.top_p), weights, -jnp.inf)
    weights = jnp.where(tilt.target_only[:, None], log_t, weights)
    return weights if allowed is None else jnp.where(allowed, weights, -jnp.inf)


def keep_target_mass(weights: jax.Array, log_t: jax.Array, special: jax.Array) -> jax.Array:
    """Gives special tokens pi_t's probability and the others the rest, in q's proportions.

    Args:
        weights: [B, V] log weights of q.
        log_t: [B, V] log weights of pi_t.
        special: [V] bool.

    Returns:
        [B, V] log weights in the units of `log_t`.
    """
    others = jnp.where(special, -jnp.inf, weights)
    left = jax.nn.logsumexp(jnp.where(special, -jnp.inf, log_t), axis=-1, keepdims=True)
    mixed = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    scaled = jnp.where(mixed > -jnp.inf, others + (left - mixed), -jnp.inf)
    return jnp.where(special, log_t, scaled)


def _kept(weights: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """[B, V] bool, what top-k and then top-p leave of log weights [B, V]."""
    rows, size = weights.shape
    k = jnp.full((rows,), top_k, jnp.int32) if 0 < top_k < size else None
    p = jnp.full((rows,), top_p, jnp.float32) if top_p < 1.0 else None
    possible = weights > -jnp.inf
    if k is None and p is None:
        return possible
    return possible & keep_mask(weights, k, p)
