"""The five operators: which positions of the generation are rewritten, and at what cost."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from common.errors import UserError
from reoac_jax.selection import descending_rank
from reoac_jax.tables import Tables
from reoac_jax.types import OPERATORS

_BASE_COST = {"O_NUM": 1.2, "O_OP": 1.1, "O_SCOPE": 1.0, "O_BRANCH": 2.0, "O_FAST": 1.5}
_SCOPE_LEN = {"O_FAST": 64}
_FAST_SURCHARGE = 0.5


class OperatorSpec(NamedTuple):
    """One operator.

    Attributes:
        name: its id.
        max_tokens: most positions of O_NUM and O_OP.
        scope_len: most positions of O_SCOPE, O_BRANCH and O_FAST.
        branch_depth: decisions looked ahead by O_BRANCH; part of its cost.
        step_scale: multiplies the pace of the "plus" method; 0 = at least one position, which needs
            a confidence rule.
        threshold: plus: also write every candidate of at least this confidence; 0 = off.
        factor: plus: also write by the factor rule (`reoac_jax.unmasking`); 0 = off.
    """

    name: str
    max_tokens: int = 16
    scope_len: int = 32
    branch_depth: int = 1
    step_scale: float = 1.0
    threshold: float = 0.0
    factor: float = 0.0

    @property
    def limit(self) -> int:
        """Most positions one execution may flag."""
        return self.max_tokens if self.name in ("O_NUM", "O_OP") else self.scope_len

    @property
    def by_confidence(self) -> bool:
        """Whether a confidence rule adds to what is written."""
        return self.threshold > 0 or self.factor > 0

    @property
    def cost(self) -> float:
        """Price of one execution."""
        base = _BASE_COST[self.name]
        if self.name == "O_BRANCH":
            return base + self.branch_depth
        return base + _FAST_SURCHARGE if self.name == "O_FAST" else base


class OperatorParams(NamedTuple):
    """The operators in their order; hashable, so it can be a static argument."""

    specs: tuple[OperatorSpec, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """Operator ids in order."""
        return tuple(spec.name for spec in self.specs)

    @property
    def max_cost(self) -> float:
        """Price of the dearest operator."""
        return max(spec.cost for spec in self.specs)

    def fallback_index(self, name: str | None) -> int:
        """Index of the fallback operator; an unknown name means O_SCOPE.

        Raises:
            UserError: if O_SCOPE would be needed but is not among the operators.
        """
        wanted = name if name in self.ids else "O_SCOPE"
        if wanted not in self.ids:
            raise UserError(
                f"rollout.fallback_operator: '{name}' is not among the operators "
                f"{', '.join(self.ids)}; choose one of them"
            )
        return self.ids.index(wanted)


class Executed(NamedTuple):
    """What is really executed: operator [B] i32, mask [B, G], fell_back [B] bool, cost [B] f32."""

    operator: jax.Array
    mask: jax.Array
    fell_back: jax.Array
    cost: jax.Array


class PlusMasks(NamedTuple):
    """Per operator: positions written and re-masked [B, A, G] bool, and valid [B, A] bool."""

    write: jax.Array
    remask: jax.Array
    valid: jax.Array


def operator_params(entries: Sequence[Mapping[str, Any] | str] | None = None) -> OperatorParams:
    """Reads and checks the `operators` entries of a config.

    Args:
        entries: {"id", "params", ...} or a bare id each; None or empty = all five with defaults.

    Returns:
        The operators in the order given.

    Raises:
        UserError: for unknown or repeated ids, unknown parameters and values out of range.
    """
    specs: list[OperatorSpec] = []
    for entry in entries or OPERATORS:
        name = entry if isinstance(entry, str) else str(entry.get("id"))
        given = {} if isinstance(entry, str) else dict(entry.get("params") or {})
        if name not in OPERATORS:
            raise UserError(f"operators: unknown id '{name}', choose from {', '.join(OPERATORS)}")
        if any(spec.name == name for spec in specs):
            raise UserError(f"operators: '{name}' is listed twice, keep one entry")
        known = OperatorSpec._fields[1:]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise UserError(
                f"operators: {name} has no parameter '{unknown[0]}', known are {', '.join(known)}"
            )
        spec = OperatorSpec(name, scope_len=_SCOPE_LEN.get(name, 32))._replace(**given)
        for field, lowest in (("max_tokens", 1), ("scope_len", 1), ("branch_depth", 0)):
            value = getattr(spec, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise UserError(
                    f"operators: {name}.{field} = {value!r} must be a whole number >= {lowest}"
                )
        _check_amount(spec)
        specs.append(spec)
    return OperatorParams(tuple(specs))


def _check_amount(spec: OperatorSpec) -> None:
    """Refuses values that say nothing about how much an operator writes."""
    if not 0.0 <= spec.threshold <= 1.0:
        raise UserError(
            f"operators: {spec.name}.threshold = {spec.threshold} must lie between 0 and 1"
        )
    if not spec.factor >= 0.0:
        raise UserError(f"operators: {spec.name}.factor = {spec.factor} must not be negative")
    if spec.step_scale < 0 or not (spec.step_scale > 0 or spec.by_confidence):
        raise UserError(
            f"operators: {spec.name}.step_scale = {spec.step_scale} must be above 0 "
            "(0 needs a threshold or a factor)"
        )


def operator_costs(params: OperatorParams) -> jax.Array:
    """Cost of one execution per operator (operators table, spec 4); [A] f32."""
    return jnp.asarray([spec.cost for spec in params.specs], jnp.float32)


def operator_masks(
    tables: Tables, gen_ids: jax.Array, params: OperatorParams, use_strings: bool = True
) -> jax.Array:
    """Positions each operator would rewrite: the last k flagged ones (operators, spec 4 and 5.3).

    Args:
        tables: lookup tables.
        gen_ids: [B, G] i32, current tokens.
        params: the operators.
        use_strings: False = O_NUM and O_OP flag every position too.

    Returns:
        [B, A, G] bool.
    """
    everything = jnp.ones(gen_ids.shape, bool)
    flags = []
    for spec in params.specs:
        if use_strings and spec.name == "O_NUM":
            flags.append(jnp.take(jnp.asarray(tables.has_digit), gen_ids, mode="clip"))
        elif use_strings and spec.name == "O_OP":
            flags.append(jnp.take(jnp.asarray(tables.op_char), gen_ids, mode="clip"))
        else:
            flags.append(everything)
    flagged = jnp.stack(flags, axis=1)  # [B, A, G]
    limits = jnp.asarray([spec.limit for spec in params.specs], jnp.int32)
    from_right = lax.cumsum(flagged.astype(jnp.int32), axis=2, reverse=True)
    return flagged & (from_right <= limits[:, None])


def select_and_fallback(
    masks: jax.Array,
    costs: jax.Array,
    chosen: jax.Array,
    fallback: int,
    ensure_update: bool = True,
) -> Executed:
    """Executes the chosen operator, or the fallback where that flags nothing (spec 2.2 step 4).

    Args:
        masks: [B, A, G] bool, positions per operator.
        costs: [A] f32.
        chosen: [B] i32, the actor's choice.
        fallback: index of the fallback operator.
        ensure_update: whether the fallback runs at all.

    Returns:
        The executed operator with its positions and cost; the fallback may be empty as well.
    """
    mask = jnp.take_along_axis(masks, chosen[:, None, None], axis=1)[:, 0]
    operator = chosen.astype(jnp.int32)
    fell_back = jnp.zeros(chosen.shape, bool)
    if ensure_update:
        fell_back = ~jnp.any(mask, axis=1)
        operator = jnp.where(fell_back, fallback, operator)
        mask = jnp.where(fell_back[:, None], masks[:, fallback], mask)
    return Executed(operator, mask, fell_back, costs[operator])


def ranked_operators(q: jax.Array, count: int) -> jax.Array:
    """Indices [B, count] of the operators of highest q [B, A], ties to the earlier one."""
    return lax.top_k(q, min(count, q.shape[1]))[1]


def plus_operator_masks(
    tables: Tables,
    pred_ids: jax.Array,
    confidence: jax.Array,
    class_mass: tuple[jax.Array, jax.Array] | None,
    masked: jax.Array,
    pace: jax.Array,
    params: OperatorParams,
    remask_ratio: float,
    *,
    active: jax.Array | None = None,
    branching: bool = False,
) -> PlusMasks:
    """Positions each operator writes, or re-masks when nothing is masked (spec 10.1).

    Candidates are the masked positions, or all written ones when nothing is masked. O_NUM and O_OP
    take those whose predicted token is of the class, O_SCOPE the left-most scope_len, O_FAST the
    most confident scope_len. Of these the ceil(pace * step_scale) most confident are written (at
    least one), and those that the operator's threshold or factor rule calls sure; in a complete row
    the ceil(remask_ratio * number) least confident are masked again.

    Args:
        tables: lookup tables.
        pred_ids: [B, G] i32, predicted token at masked positions, the present one elsewhere.
        confidence: [B, G] f32.
        class_mass: softmax mass of the number class and of the operator class, [B, G] each; None =
            the predicted token decides alone.
        masked: [B, G] bool.
        pace: [B] i32, positions due at this step.
        params: the operators.
        remask_ratio: share of a complete row's candidates that is masked again.
        active: [B, G] bool, positions that may be touched; None = all.
        branching: whether O_BRANCH is available (then it has the candidates of O_SCOPE).

    Returns:
        Disjoint write and re-mask positions, and the operators that touch anything.
    """
    usable = jnp.ones(masked.shape, bool) if active is None else active
    waiting = masked & usable
    writing = jnp.any(waiting, axis=1)  # [B]
    candidates = jnp.where(writing[:, None], waiting, usable & ~masked)  # [B, G]
    from_left = lax.cumsum(candidates.astype(jnp.int32), axis=1)
    rank = descending_rank(confidence, candidates)

    number = jnp.take(jnp.asarray(tables.has_digit), pred_ids, mode="clip")
    operator = jnp.take(jnp.asarray(tables.op_char), pred_ids, mode="clip")
    # The mask string may itself contain operator characters; a mask is of no class.
    is_text = pred_ids != tables.mask_id
    number, operator = number & is_text, operator & is_text
    if class_mass is not None:
        number = number | (class_mass[0] >= 0.5)
        operator = operator | (class_mass[1] >= 0.5)

    subsets = []
    for spec in params.specs:
        if spec.name == "O_NUM":
            subsets.append(candidates & number)
        elif spec.name == "O_OP":
            subsets.append(candidates & operator)
        elif spec.name == "O_FAST":
            subsets.append(candidates & (rank < spec.scope_len))
        elif spec.name == "O_BRANCH" and not branching:
            subsets.append(jnp.zeros_like(candidates))
        else:
            subsets.append(candidates & (from_left <= spec.scope_len))
    flags = jnp.stack(subsets, axis=1)  # [B, A, G]

    # Counting the better ones inside every subset at once: a product with the "beats" matrix.
    beats = (rank[:, :, None] < rank[:, None, :]).astype(jnp.float32)  # [B, G better, G worse]
    members = flags.astype(jnp.float32)
    rank_inside = jnp.einsum("bag,bgh->bah", members, beats)
    size = members.sum(axis=2)  # [B, A]
    scale = jnp.asarray([spec.step_scale for spec in params.specs], jnp.float32)
    # The small offset keeps products such as 10 * 0.3 from being rounded up twice.
    due = jnp.ceil(pace.astype(jnp.float32)[:, None] * scale - 1e-4)
    if any(spec.by_confidence for spec in params.specs):
        due = jnp.maximum(due, _sure(params, confidence, flags, rank_inside))
    again = jnp.ceil(size * remask_ratio - 1e-4)
    write = flags & (rank_inside < due[..., None]) & writing[:, None, None]
    remask = flags & (rank_inside >= (size - again)[..., None]) & ~writing[:, None, None]
    return PlusMasks(write, remask, jnp.any(write | remask, axis=2))


def _sure(
    params: OperatorParams, confidence: jax.Array, flags: jax.Array, rank_inside: jax.Array
) -> jax.Array:
    """Number [B, A] f32 of candidates that an operator's confidence rules call sure, at least one.

    Confident candidates come first in every operator's order, so a count says which ones.

    Args:
        params: the operators; confidence: [B, G]; flags: bool [B, A, G], candidates of each.
        rank_inside: [B, A, G] f32, place among them, the most confident first.
    """
    at_least = jnp.ones(flags.shape[:2], jnp.float32)
    threshold = jnp.asarray([spec.threshold for spec in params.specs], jnp.float32)[:, None]
    factor = jnp.asarray([spec.factor for spec in params.specs], jnp.float32)[:, None]
    sure = (threshold > 0) & (confidence[:, None] >= threshold)
    sure |= (rank_inside + 2.0) * (1.0 - confidence[:, None]) < factor
    return jnp.maximum(at_least, jnp.max(jnp.where(flags & sure, rank_inside + 1.0, 0.0), axis=2))
