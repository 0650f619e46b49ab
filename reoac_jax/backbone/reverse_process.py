"""Samplers of the reverse process: MDLM (Sahoo et al., 2024) and SEDD (Lou et al., 2024).

Every sampler is one compiled loop around a prediction function, so the same code runs networks and
exact laws. Positions that hold no mask at the start (a prompt, padding) stay as they are. Row b of
step i draws from fold_in(fold_in(key, i), row_id_b).

Masked diffusion writes a masked position between times t and s < t with probability
(m(t) - m(s)) / m(t), m = share of masked tokens, and then draws it from the prediction. Whether a
position moves does not depend on the prediction, so the draw comes first and steps in which
nothing moves need no network ("cached"; the original reaches that by keeping the last prediction).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError
from reoac_jax.backbone import score_entropy
from reoac_jax.backbone.noise import Schedule
from reoac_jax.sampling import row_keys, sample_tokens, summarise_scores

LAST_TIME = 1e-5
METHODS = ("ancestral", "cached", "first_hitting")
PREDICTORS = ("analytic", "euler")

LogitsFn = Callable[[jax.Array, jax.Array], jax.Array]
"""(ids [B, L] int32, t [B]) -> logits of the clean tokens [B, L, V]; the mask id is ignored."""

LogScoreFn = Callable[[jax.Array, jax.Array], jax.Array]
"""(ids [B, L] int32, sigma [B]) -> log s [B, L, V]."""


class Sampled(NamedTuple):
    """ids [B, L] int32, and the number of network passes, [] int32."""

    ids: jax.Array
    forwards: jax.Array


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """How masked positions are filled; hashable.

    Attributes:
      method: "ancestral" (every step asks the network), "cached" (only steps in which a position
        moves, with the share of masks m(t) = t), "first_hitting" (no grid: the time of the next
        move is drawn, one token per row and step; exact; Zheng et al., 2025).
      num_steps: N of the time grid 1 .. 1e-5.
      temperature: of the drawn tokens.
    """

    method: str = "ancestral"
    num_steps: int = 128
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"sampler '{self.method}' is none of {', '.join(METHODS)}")
        if self.num_steps < 1:
            raise UserError(f"a sampler needs at least 1 step, got {self.num_steps}")


class _State(NamedTuple):
    step: jax.Array
    ids: jax.Array
    time: jax.Array  # [B], of first_hitting
    forwards: jax.Array


def masked_share(schedule: Schedule, t: jax.Array) -> jax.Array:
    """m(t) = 1 - alpha(t), without cancellation at small t."""
    return -jnp.expm1(-schedule.sigma(t))


def move_chance(schedule: Schedule, t: jax.Array, s: jax.Array, method: str) -> jax.Array:
    """Probability that a masked position is written between t and the earlier time s."""
    if method == "cached":
        return (t - s) / t
    share = masked_share(schedule, t)
    return (share - masked_share(schedule, s)) / share


def sample_masked(
    logits_fn: LogitsFn,
    schedule: Schedule,
    mask_id: int,
    ids: jax.Array,
    key: jax.Array,
    row_id: jax.Array,
    settings: SamplerSettings,
) -> Sampled:
    """Fill every mask of ids by the reverse process of masked diffusion.

    Args:
      logits_fn: the prediction.
      schedule: noise schedule.
      mask_id: m.
      ids: [B, L] int32, m where something is to be written.
      key: typed key.
      row_id: [B] uint32.
      settings: which sampler.

    Returns:
      ids without a mask, and the passes. Leftovers of the grid are filled by the best tokens of
      one more pass.
    """
    batch, length = ids.shape
    first_hitting = settings.method == "first_hitting"
    steps = length if first_hitting else settings.num_steps
    times = jnp.linspace(1.0, LAST_TIME, steps + 1)
    span = (1.0 - LAST_TIME) / settings.num_steps

    def draw(ids: jax.Array, t: jax.Array, keys: jax.Array) -> jax.Array:
        logits = logits_fn(ids, t)
        return sample_tokens(keys, logits, settings.temperature, suppress_id=mask_id)

    def body(state: _State) -> _State:
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(
            row_keys(key, state.step, row_id)
        )  # where, what, when
        masked = state.ids == mask_id
        chance = jax.vmap(lambda k: jax.random.uniform(k, (length,)))(keys[:, 0])
        if first_hitting:
            open_ = jnp.sum(masked, axis=1)
            uniform = jax.vmap(jax.random.uniform)(keys[:, 2])
            share = masked_share(schedule, state.time)
            share = share * uniform ** (1.0 / jnp.maximum(open_, 1))
            time = schedule.inverse(1.0 - share)
            best = jnp.argmax(jnp.where(masked, chance, -1.0), axis=1)
            hit = masked & (jnp.arange(length) == best[:, None])
        else:
            time = jnp.full(batch, times[state.step])
            moves = move_chance(schedule, time, time - span, settings.method)
            hit = masked & (chance < moves[:, None])
        ask = jnp.any(hit) if settings.method == "cached" else jnp.bool_(True)
        tokens = jax.lax.cond(ask, draw, lambda ids, *_: ids, state.ids, time, keys[:, 1])
        return _State(
            state.step + 1,
            jnp.where(hit, tokens, state.ids),
            time if first_hitting else state.time,
            state.forwards + ask,
        )

    def unfinished(state: _State) -> jax.Array:
        return (state.step < steps) & jnp.any(state.ids == mask_id)

    start = _State(jnp.int32(0), ids, jnp.ones(batch), jnp.int32(0))
    state = jax.lax.while_loop(unfinished, body, start)
    left = jnp.any(state.ids == mask_id)

    def finish(ids: jax.Array) -> jax.Array:
        logits = logits_fn(ids, jnp.full(batch, LAST_TIME))
        best = summarise_scores(logits, suppress_id=mask_id).best
        return jnp.where(ids == mask_id, best, ids)

    ids = jax.lax.cond(left, finish, lambda ids: ids, state.ids)
    return Sampled(ids, state.forwards + left)


def semi_autoregressive(
    sample_fn: Callable[[jax.Array, jax.Array], Sampled],
    first: jax.Array,
    key: jax.Array,
    *,
    windows: int,
    stride: int,
    mask_id: int,
) -> Sampled:
    """Sequences longer than a window: each keeps the last L - stride tokens of the one before.

    Args:
      sample_fn: (ids [B, L], key) -> Sampled.
      first: [B, L] int32 first window, m where something is to be written.
      key: typed key; window w draws from fold_in(key, w).
      windows: number of windows.
      stride: new tokens per window, at most L.
      mask_id: m.

    Returns:
      ids [B, L + (windows - 1) stride] and all passes.

    Raises:
      UserError: stride is out of range.
    """
    length = first.shape[1]
    if not 1 <= stride <= length:
        raise UserError(f"semi-autoregressive stride {stride} must lie between 1 and {length}")
    total = length + (windows - 1) * stride
    blank = jnp.full((first.shape[0], total - length), mask_id, first.dtype)

    def body(window: jax.Array, done: Sampled) -> Sampled:
        start = window * stride
        ids = jax.lax.dynamic_slice_in_dim(done.ids, start, length, axis=1)
        part = sample_fn(ids, jax.random.fold_in(key, window))
        ids = jax.lax.dynamic_update_slice_in_dim(done.ids, part.ids, start, axis=1)
        return Sampled(ids, done.forwards + part.forwards)

    start = Sampled(jnp.concatenate([first, blank], axis=1), jnp.int32(0))
    return jax.lax.fori_loop(0, windows, body, start)


# ------------------------------------------------------------------------------------------ SEDD
@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """Attributes: predictor "analytic" | "euler"; num_steps; graph; denoise: a last step to t=0."""

    predictor: str = "analytic"
    num_steps: int = 128
    graph: str = "absorb"
    denoise: bool = True

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise UserError(f"predictor '{self.predictor}' is none of {', '.join(PREDICTORS)}")
        if self.num_steps < 1:
            raise UserError(f"a sampler needs at least 1 step, got {self.num_steps}")


def _draw(weights: jax.Array, keys: jax.Array) -> jax.Array:
    """Tokens [B, L] in proportion to weights [B, L, V]; negative ones count as 0."""
    return sample_tokens(keys, jnp.log(jnp.maximum(weights, 0.0)))


def sample_scores(
    log_score_fn: LogScoreFn,
    schedule: Schedule,
    ids: jax.Array,
    fixed: jax.Array,
    key: jax.Array,
    row_id: jax.Array,
    settings: ScoreSettings,
) -> Sampled:
    """Run the reverse process of score entropy diffusion from t = 1 to 0.

    Args:
      log_score_fn: the network's scores.
      schedule: noise schedule.
      ids: [B, L] int32 start: masks (absorbing) or random tokens (uniform), given tokens where
        `fixed`.
      fixed: bool [B, L], True = put back before every step.
      key: typed key.
      row_id: [B] uint32.
      settings: which sampler.
    """
    batch, steps = ids.shape[0], settings.num_steps
    times = jnp.linspace(1.0, LAST_TIME, steps + 1)
    span = (1.0 - LAST_TIME) / steps
    given = ids

    def body(step: jax.Array, ids: jax.Array) -> jax.Array:
        t = jnp.full(batch, times[step])
        sigma = schedule.sigma(t)
        score = jnp.exp(log_score_fn(ids, sigma))
        if settings.predictor == "analytic":
            d_sigma = sigma - schedule.sigma(t - span)
            weights = score_entropy.analytic_weights(score, ids, d_sigma, settings.graph)
        else:
            length = span * schedule.sigma_prime(t)
            weights = score_entropy.euler_weights(score, ids, length, settings.graph)
        tokens = _draw(weights, row_keys(key, step, row_id))
        return jnp.where(fixed, given, tokens)

    ids = jax.lax.fori_loop(0, steps, body, ids)
    if settings.denoise:
        sigma = schedule.sigma(jnp.full(batch, times[steps]))
        score = jnp.exp(log_score_fn(ids, sigma))
        weights = score_entropy.denoising_weights(score, ids, sigma, settings.graph)
        tokens = _draw(weights, row_keys(key, steps, row_id))
        ids = jnp.where(fixed, given, tokens)
    return Sampled(ids, jnp.int32(steps + settings.denoise))
