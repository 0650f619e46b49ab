"""The tilted law q_alpha of two models and its exponent: settings, methods and special rows.

Order of operations for a decode step: logits -> `make_pair` (float32, divided by T, validated) ->
`solve` (alpha on the full common vocabulary) -> `diagnostics.diagnose` (before any filter) ->
`law.log_weights` (special tokens, support, top-k, top-p) -> `sampling.draw`.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from common.errors import require
from qstar import solvers
from qstar.columns import map_rows
from qstar.pair import Norms, Pair, make_pair, working_dtype

METHODS = ("fixed", "kl_symmetry", "entropy", "ess_balance", "reverse_kl_symmetry")
SOLVERS = ("newton", "bisection")

# Bits of a token's flags.
IDENTICAL, NO_OVERLAP, BOUNDARY, CLAMPED, FORCED, INVALID = (1 << i for i in range(6))
FLAG_NAMES = {
    "identical": IDENTICAL,
    "no_overlap": NO_OVERLAP,
    "boundary": BOUNDARY,
    "clamped": CLAMPED,
    "forced": FORCED,
    "invalid": INVALID,
}


@dataclasses.dataclass(frozen=True)
class AlphaSettings:
    """How the weight of pi_theta is chosen; static.

    Attributes:
        method: one of `METHODS`. "entropy" is a heuristic, 0.01-0.5 away from the KL-symmetric
            alpha, worst where one model is peaked.
        fixed: alpha of the method "fixed".
        solver: "newton" or "bisection" (20 halvings as in the original; "kl_symmetry" only).
        tol: accuracy of "newton".
        min, max: bounds on alpha for every method except "fixed".
        extrapolate: allows `fixed` outside [0, 1].
    """

    method: str = "kl_symmetry"
    fixed: float = 0.5
    solver: str = "newton"
    tol: float = 1e-6
    min: float = 0.0
    max: float = 1.0
    extrapolate: bool = False

    def __post_init__(self) -> None:
        """Refuses settings that make no sense, naming the key."""
        require(
            self.method in METHODS,
            f"alpha.method {self.method!r} is none of {', '.join(METHODS)}",
        )
        require(
            self.solver in SOLVERS,
            f"alpha.solver {self.solver!r} is none of {', '.join(SOLVERS)}",
        )
        require(
            self.solver == "newton" or self.method == "kl_symmetry",
            f"alpha.solver 'bisection' belongs to kl_symmetry, not to {self.method}",
        )
        require(
            self.extrapolate or 0.0 <= self.fixed <= 1.0,
            f"alpha.fixed {self.fixed} lies outside [0, 1]; alpha.extrapolate=True allows it",
        )
        require(self.tol > 0.0, f"alpha.tol must be positive, not {self.tol}")
        require(
            0.0 <= self.min <= self.max <= 1.0,
            f"alpha.min and alpha.max must satisfy 0 <= {self.min} <= {self.max} <= 1",
        )


@flax.struct.dataclass
class Tilt:
    """A pair of rows with the exponent that was chosen.

    Attributes:
        pair: both models.
        alpha: [B] weight of pi_theta; 0 where `no_overlap`, `forced` or `invalid` is set.
        flags: [B] int32 bits of `FLAG_NAMES`.
    """

    pair: Pair
    alpha: jax.Array
    flags: jax.Array

    def has(self, flag: int) -> jax.Array:
        """[B] bool, whether the bit is set."""
        return (self.flags & flag) != 0

    @property
    def target_only(self) -> jax.Array:
        """[B] bool, rows whose law is pi_t itself over its own support."""
        return self.has(NO_OVERLAP | FORCED)


def solve_temperature(temperature: float | jax.Array) -> float | jax.Array:
    """Temperature of the distributions: greedy decoding (0) solves alpha at 1.

    Raises:
        UserError: if a number is negative or not a number.
    """
    if not isinstance(temperature, (int, float)):
        return temperature
    require(temperature >= 0.0, f"sampling.temperature must be 0 or more, not {temperature}")
    return 1.0 if temperature == 0.0 else float(temperature)


def tilt(
    x: jax.Array,
    y: jax.Array,
    settings: AlphaSettings,
    temperature: float | jax.Array = 1.0,
    forced: jax.Array | None = None,
) -> Tilt:
    """Normalises both models and chooses alpha.

    Args:
        x, y: [B, V] raw logits of pi_theta and pi_t over the common vocabulary, any float type;
            -inf = impossible.
        settings: how alpha is chosen; static.
        temperature: divides the logits first; a number (0 = greedy), or a positive array [] or [B].
        forced: [B] bool, rows that take pi_t (alpha 0), as for a forced first token.
    """
    temperature = solve_temperature(temperature)

    def rows(x: jax.Array, y: jax.Array, t: Any) -> tuple[Norms, jax.Array, jax.Array]:
        pair = make_pair(x, y, temperature if t is None else t)
        return pair.norms, *choose(pair, settings)

    dtype = working_dtype(x, y)
    x, y = x.astype(dtype), y.astype(dtype)
    by_row = None
    if not isinstance(temperature, float):
        by_row = jnp.broadcast_to(temperature, x.shape[:1])
    norms, alpha, flags = map_rows(rows, x, y, by_row)
    pair = Pair(x, y, norms)
    if forced is not None:
        forced = forced & ~pair.norms.invalid
        alpha = jnp.where(forced, 0.0, alpha)
        flags = jnp.where(forced, (flags & ~CLAMPED) | FORCED, flags)
    return Tilt(pair, alpha, flags)


def solve(
    x: jax.Array,
    y: jax.Array,
    settings: AlphaSettings,
    temperature: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Alpha [B] and flags [B] int32 of logits x, y [B, V]; see `tilt`."""
    found = tilt(x, y, settings, temperature)
    return found.alpha, found.flags


def choose(pair: Pair, settings: AlphaSettings) -> tuple[jax.Array, jax.Array]:
    """Alpha [B] by the method, and flags [B] int32."""
    no = jnp.zeros_like(pair.norms.invalid)
    if settings.method == "fixed":
        alpha = jnp.full_like(pair.norms.offset, settings.fixed)
        has_up, has_down = solvers.signs(pair)
        identical = ~(has_up & has_down) & pair.full
        found = solvers.Exponent(alpha, identical, no)
    elif settings.method == "kl_symmetry":
        found = solvers.kl_symmetric(pair, settings.tol, settings.solver)
    elif settings.method == "entropy":
        found = solvers.entropy_ratio(pair)
    elif settings.method == "ess_balance":
        found = solvers.ess_balanced(pair, settings.tol)
    else:
        found = solvers.reverse_kl_symmetric(pair)
    alpha, clamped = found.alpha, no
    if settings.method != "fixed" and (settings.min > 0.0 or settings.max < 1.0):
        alpha = jnp.clip(alpha, settings.min, settings.max)
        clamped = alpha != found.alpha
    empty = pair.norms.empty & ~pair.norms.invalid
    alpha = jnp.where(~pair.usable, 0.0, alpha)
    flags = jnp.zeros(alpha.shape, jnp.int32)
    for bit, present in (
        (IDENTICAL, found.identical),
        (NO_OVERLAP, empty),
        (BOUNDARY, found.boundary),
        (CLAMPED, clamped & ~empty & ~pair.norms.invalid),
        (INVALID, pair.norms.invalid),
    ):
        flags = flags | jnp.where(present, jnp.int32(bit), 0)
    return alpha, flags
