"""Speed of the q* solvers as ratios to one logsumexp pass over both models' logits.

Groups of `python -m qstar.bench`. `floor` is one jitted logsumexp of both [B, V] arrays. The pairs
of rows are close, far, peaked and flat in turn.
  solve     alpha by every method, from raw logits; "halvings" are 20 bisections in log space.
  original  the same 20 halvings on clamped probabilities, as the original does them, compiled;
            ratio = original / ours.
  step      diagnostics, filters, both ways to draw, and all a decode step does with logits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import Row, TraceCounter, compare, take_turns
from qstar.diagnostics import diagnose
from qstar.law import LawSettings, log_weights
from qstar.sampling import draw
from qstar.step import MixedToken, mix_step
from qstar.tilt import AlphaSettings, solve, tilt

SOLVERS: tuple[tuple[str, AlphaSettings, float | None], ...] = (
    ("KL", AlphaSettings(), 8.0),
    ("ESS balance", AlphaSettings("ess_balance"), 16.0),
    ("KL, halvings", AlphaSettings(solver="bisection"), None),
    ("entropy", AlphaSettings("entropy"), None),
    ("reverse KL", AlphaSettings("reverse_kl_symmetry"), None),
    ("fixed", AlphaSettings("fixed"), None),
)
Clock = Callable[[], float]
# Standard deviation, rank exponent, correlation, noise, spikes of pi_t and pi_theta.
FAMILIES = (
    (1.0, 1.5, 0.9, 0.5, 0.0, 0.0),
    (1.5, 1.0, 0.6, 1.0, 0.0, 0.0),
    (2.0, 2.0, 1.0, 0.1, 0.0, 0.0),
    (1.0, 1.2, 0.8, 1.0, 18.0, 0.0),
    (1.0, 1.2, 0.8, 1.0, 18.0, 16.0),
    (2.5, 0.5, 0.3, 2.0, 0.0, 12.0),
    (1.2, 1.5, 0.9, 0.6, 0.0, 0.0),
    (0.3, 0.0, 0.5, 0.3, 0.0, 0.0),
)


def make_rows(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, V] float32 of pi_theta and pi_t, the families in turn."""
    rng = np.random.default_rng(0)
    theta, t = np.empty((2, rows, width), np.float32)
    for row in range(rows):
        sigma, zipf, rho, noise, spike_t, spike_theta = FAMILIES[row % len(FAMILIES)]
        t[row] = sigma * rng.standard_normal(width) - zipf * np.log1p(rng.permutation(width))
        theta[row] = rho * t[row] + noise * rng.standard_normal(width)
        t[row, rng.integers(width)] += spike_t
        theta[row, rng.integers(width)] += spike_theta
    return theta, t


def floor_pass(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One logsumexp over both arrays."""
    return jax.nn.logsumexp(x, axis=-1), jax.nn.logsumexp(y, axis=-1)


def clamped_halvings(x: jax.Array, y: jax.Array) -> jax.Array:
    """20 halvings on the difference of the two divergences of clamped probabilities."""
    p_theta, p_t = (jnp.clip(jax.nn.softmax(z, axis=-1), 1e-10, None) for z in (x, y))
    log_theta, log_t = jnp.log(p_theta), jnp.log(p_t)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        mixed = middle[:, None] * log_theta + (1 - middle[:, None]) * log_t
        q = jnp.clip(jax.nn.softmax(mixed, axis=-1), 1e-10, None)
        log_q = jnp.log(q)
        to_theta = jnp.sum(q * (log_q - log_theta), axis=-1)
        to_t = jnp.sum(q * (log_q - log_t), axis=-1)
        right = to_theta > to_t
        return jnp.where(right, middle, low), jnp.where(right, high, middle)

    zero = jnp.zeros(x.shape[0])
    low, high = jax.lax.fori_loop(0, 20, halve, (zero, zero + 1.0))
    return 0.5 * (low + high)


def exact_alpha(theta: np.ndarray, t: np.ndarray) -> tuple[float, float]:
    """KL-symmetric alpha of one row and its D(theta || t) + D(t || theta), in float64."""
    a, b = (z.astype(np.float64) - z.max() for z in (theta, t))
    a, b = a - np.log(np.exp(a).sum()), b - np.log(np.exp(b).sum())
    d, low, high = a - b, 0.0, 1.0
    jeffreys = float(np.sum((np.exp(a) - np.exp(b)) * d))
    for _ in range(45):
        middle = 0.5 * (low + high)
        weight = b + middle * d
        slope = np.sum(np.exp(weight - weight.max()) * d)
        low, high = (low, middle) if slope >= 0 else (middle, high)
    return 0.5 * (low + high), jeffreys


def alpha_error(alpha: np.ndarray, theta: np.ndarray, t: np.ndarray) -> float:
    """Largest error over one row of each family, where J >= 0.1."""
    errors = [0.0]
    for row in range(min(len(alpha), len(FAMILIES))):
        wanted, jeffreys = exact_alpha(theta[row], t[row])
        if jeffreys >= 0.1:
            errors.append(abs(float(alpha[row]) - wanted))
    return max(errors)


def _alpha(x: jax.Array, y: jax.Array, settings: AlphaSettings) -> jax.Array:
    return solve(x, y, settings)[0]


def solve_rows(
    rows: int, width: int, repeats: int, clock: Clock
) -> tuple[list[Row], dict[str, float]]:
    """Every method beside the floor."""
    theta, t = make_rows(rows, width)
    x, y = jnp.asarray(theta), jnp.asarray(t)
    counter = TraceCounter()
    bare = counter.jit(floor_pass)
    things: dict[str, Callable[[], Any]] = {"floor": lambda: bare(x, y)}
    for name, settings, _ in SOLVERS:
        compiled = counter.jit(functools.partial(_alpha, settings=settings))
        things[name] = functools.partial(compiled, x, y)
    timings = take_turns(things, repeats, counter, clock=clock)
    table = [
        compare(f"solve {name} [{rows}, {width}]", timings, name, "floor", bar)
        for name, _, bar in SOLVERS
    ]
    error = alpha_error(np.asarray(things["KL"]()), theta, t)
    return table, {f"solve KL [{rows}, {width}]": error}


def original_rows(
    rows: int, width: int, repeats: int, clock: Clock
) -> tuple[list[Row], dict[str, float]]:
    """The original's way beside ours: work is ours, floor the original's."""
    theta, t = make_rows(rows, width)
    x, y = jnp.asarray(theta), jnp.asarray(t)
    counter = TraceCounter()
    ours = counter.jit(lambda x, y: solve(x, y, AlphaSettings())[0])
    clamped = counter.jit(clamped_halvings)
    things = {"ours": lambda: ours(x, y), "clamped": lambda: clamped(x, y)}
    timings = take_turns(things, max(repeats // 3, 1), counter, clock=clock)
    name = f"original halvings / ours [{rows}, {width}]"
    row = Row(
        name,
        timings.median("ours"),
        timings.median("clamped"),
        timings.ratio("clamped", "ours"),
        3.0,
        at_least=True,
        compile_seconds=timings.compile_seconds,
        traces=timings.traces,
    )
    return [row], {name: alpha_error(np.asarray(clamped(x, y)), theta, t)}


def _mix(x: jax.Array, y: jax.Array, keys: jax.Array, method: str) -> MixedToken:
    return mix_step(x, y, keys, AlphaSettings(), LawSettings(), 0.8, method=method)


def step_rows(
    rows: int, width: int, repeats: int, clock: Clock
) -> tuple[list[Row], dict[str, float]]:
    """What follows the solution, and the whole step."""
    x, y = (jnp.asarray(z) for z in make_rows(rows, width))
    keys = jax.random.split(jax.random.key(0), rows)
    counter = TraceCounter()
    bare = counter.jit(floor_pass)
    found = jax.jit(lambda x, y: tilt(x, y, AlphaSettings()))(x, y)
    weights = jax.jit(lambda found: log_weights(found, LawSettings()))(found)
    filters = LawSettings(top_k=50, top_p=0.95)
    diagnoses = counter.jit(diagnose)
    filtered = counter.jit(lambda found: log_weights(found, filters))
    things: dict[str, Callable[[], Any]] = {
        "floor": lambda: bare(x, y),
        "diagnostics": lambda: diagnoses(found),
        "top-k 50, top-p 0.95": lambda: filtered(found),
    }
    for method in ("gumbel", "cumulative"):
        drawn = counter.jit(functools.partial(draw, method=method))
        things[f"draw, {method}"] = functools.partial(drawn, keys, weights)
        whole = counter.jit(functools.partial(_mix, method=method))
        things[f"whole step, {method}"] = functools.partial(whole, x, y, keys)
    timings = take_turns(things, repeats, counter, clock=clock)
    names = [name for name in things if name != "floor"]
    return [compare(f"step {name} [{rows}, {width}]", timings, name, "floor") for name in names], {}
