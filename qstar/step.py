"""One decode step of both models: logits in, token and diagnostics out."""

from typing import NamedTuple

import jax

from qstar.diagnostics import TokenDiagnostics, diagnose
from qstar.law import LawSettings, log_weights
from qstar.sampling import draw, greedy, log_probabilities
from qstar.tilt import AlphaSettings, Tilt, tilt


class MixedToken(NamedTuple):
    """What a decode step yields; all arrays [B].

    Attributes:
        token: int32; -1 = nothing could be drawn (flag invalid, or an empty support).
        log_q: log probability under the law that was sampled, after rules and filters. Greedy
            decoding reports it under the law at temperature 1.
        log_theta, log_t: log probabilities under the models at the same temperature.
        diagnostics: of q before rules and filters.
    """

    token: jax.Array
    log_q: jax.Array
    log_theta: jax.Array
    log_t: jax.Array
    diagnostics: TokenDiagnostics


def mix_step(
    x: jax.Array,
    y: jax.Array,
    keys: jax.Array | None,
    alpha: AlphaSettings,
    law: LawSettings,
    temperature: float | jax.Array = 1.0,
    forced: jax.Array | None = None,
    special: jax.Array | None = None,
    allowed: jax.Array | None = None,
    method: str = "gumbel",
    given: jax.Array | None = None,
) -> MixedToken:
    """Chooses alpha, diagnoses and draws.

    Args:
        x, y: [B, V] raw logits of pi_theta and pi_t over the common vocabulary, any float type.
        keys: [B] typed keys of this token, used once (`sampling.token_keys`); may be None where
            nothing is drawn.
        alpha, law, method: static settings.
        temperature: a number (0 = greedy), or a positive array [] or [B].
        forced: [B] bool, rows that take pi_t unfiltered.
        special, allowed: [V] bool, see `law.log_weights`.
        given: [B] int32, tokens whose probabilities are wanted; nothing is drawn then.
    """
    found = tilt(x, y, alpha, temperature, forced)
    weights = log_weights(found, law, special, allowed)
    token = take(found, weights, keys, law, temperature, method) if given is None else given
    return MixedToken(token, *log_probabilities(found, weights, token), diagnose(found))


def take(
    found: Tilt,
    weights: jax.Array,
    keys: jax.Array | None,
    law: LawSettings,
    temperature: float | jax.Array,
    method: str,
) -> jax.Array:
    """Draws a token per row from log weights [B, V], or takes the most probable one at T = 0."""
    if isinstance(temperature, (int, float)) and temperature == 0:
        return greedy(found, weights, law.special_tokens == "mix")
    if keys is None:
        raise ValueError("drawing needs keys")
    return draw(keys, weights, method)
