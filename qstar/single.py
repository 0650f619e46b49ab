"""A decode step of one model alone: the pure baselines, and two models that are one.

q is then the model itself, alpha a constant, and nothing is solved.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from qstar import solvers
from qstar.columns import map_rows
from qstar.diagnostics import TokenDiagnostics
from qstar.law import log_weights
from qstar.pair import Norms, Pair, make_pair, working_dtype
from qstar.sampling import log_probabilities
from qstar.step import MixedToken, take
from qstar.tilt import IDENTICAL, INVALID, AlphaSettings, Tilt, solve_temperature

if TYPE_CHECKING:
    from qstar.slots import Columns, Decoding


def constant_alpha(settings: AlphaSettings) -> float:
    """Alpha where both models agree: the method's value for identical rows, within its bounds."""
    if settings.method == "fixed":
        return settings.fixed
    return min(max(0.5, settings.min), settings.max)


def single_step(
    x: jax.Array,
    keys: jax.Array | None,
    decoding: "Decoding",
    columns: "Columns",
    given: jax.Array | None = None,
) -> MixedToken:
    """Draws from one model's law under the same rules, filters and keys as a mixture.

    Divergences from a model that is not run are NaN: not defined.

    Args:
        x: [B, U] raw logits.
        keys: [B] typed keys of this token.
        decoding, columns: how to choose; `decoding.source` says which model x belongs to.
        given: [B] int32, tokens whose probabilities are wanted; nothing is drawn then.
    """
    temperature = float(solve_temperature(decoding.temperature))
    x = x.astype(working_dtype(x))

    def rows(x: jax.Array) -> tuple[Norms, jax.Array]:
        pair = make_pair(x, x, temperature)
        return pair.norms, solvers.entropies(pair)[0]

    norms, entropy = map_rows(rows, x)
    same = decoding.source == "same"
    alpha = jnp.full_like(norms.offset, constant_alpha(decoding.alpha))
    alpha = jnp.where(norms.invalid, 0.0, alpha)
    flags = jnp.where(norms.invalid, INVALID, IDENTICAL if same else 0).astype(jnp.int32)
    found = Tilt(Pair(x, x, norms), alpha, flags)
    weights = log_weights(found, decoding.law, columns.special, columns.allowed)
    law, heat = decoding.law, decoding.temperature
    token = take(found, weights, keys, law, heat, decoding.draw) if given is None else given
    log_q, log_own, _ = log_probabilities(found, weights, token)
    zero = jnp.zeros_like(alpha)
    one, none = jnp.ones_like(alpha), jnp.full_like(alpha, jnp.nan)
    theta, t = decoding.source != "t", decoding.source != "theta"
    both = theta and t
    diagnostics = TokenDiagnostics(
        alpha=alpha,
        kl_theta=zero if theta else none,
        kl_t=zero if t else none,
        kl_diff=zero if both else none,
        ess_theta=one if theta else none,
        ess_t=one if t else none,
        ess_ratio=one if both else none,
        log_ess_theta=zero if theta else none,
        log_ess_t=zero if t else none,
        entropy_q=jnp.where(norms.invalid, 0.0, entropy),
        log_z=zero if both else none,
        overlap_theta=one if theta else none,
        overlap_t=one if t else none,
        flags=flags,
    )
    return MixedToken(token, log_q, log_own if theta else none, log_own if t else none, diagnostics)
