"""Which rollouts of a question stand for "right" and which for "wrong" at each control point."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

OK, NO_ROLLOUT, FEW_INCORRECT, NO_POSITIVE, NO_NEGATIVE = range(5)
REASONS = ("ok", "no_rollout", "too_few_incorrect", "no_positive", "no_negative")

POSITIVE_SOURCES = ("rollout", "gold", "rollout_or_gold")


class SetRules(NamedTuple):
    """How sets are chosen; `contrast` and `positive_source` are static, the numbers need not be.

    Attributes:
        k_pos: most positives, at least 1.
        k_neg: most negatives, at least 1.
        contrast: positives must be correct and negatives incorrect; otherwise the best and the
            worst rewards are taken, and the sets may overlap.
        min_correct: correct rollouts below which there are no positives among the rollouts.
        min_incorrect: incorrect rollouts below which a control point is skipped.
        positive_source: one of POSITIVE_SOURCES; without `contrast` only rollouts count.
    """

    k_pos: int
    k_neg: int
    contrast: bool = True
    min_correct: int = 1
    min_incorrect: int = 1
    positive_source: str = "rollout"


class Sets(NamedTuple):
    """The chosen rollouts of one question.

    Attributes:
        pos: [M, K + 1] bool; the last column is the reference answer.
        neg: [M, K + 1] bool.
        reason: [M] int32, index into REASONS; 0 = ok.
    """

    pos: jax.Array
    neg: jax.Array
    reason: jax.Array


def rank_sets(reward: jax.Array, correct: jax.Array, valid: jax.Array, rules: SetRules) -> Sets:
    """Chooses positives and negatives at every control point of one question.

    Sorting is stable, so equal rewards keep the order of the rollouts; the worst rewards are read
    from the end of that order.

    Args:
        reward: [K + 1] float, K rollouts and the reference answer.
        correct: [K + 1] bool.
        valid: [M, K + 1] bool, the answer reaches control point m; the reference column is False
            where there is none.
        rules: static.
    """
    first = jax.vmap(lambda mask, key, n: _first(mask, key, n), in_axes=(0, None, None))
    rollouts = valid.at[:, -1].set(False)
    reference = valid & ~rollouts & rollouts.any(axis=1, keepdims=True)
    any_rollout = rollouts.any(axis=1)
    k_pos, k_neg = jnp.maximum(1, rules.k_pos), jnp.maximum(1, rules.k_neg)
    if not rules.contrast:
        pos = first(rollouts, -reward, k_pos)
        # The reversed stable order: worst first, and of equal rewards the last rollout first.
        neg = first(rollouts[:, ::-1], reward[::-1], k_neg)[:, ::-1]
        return Sets(pos, neg, jnp.where(any_rollout, OK, NO_ROLLOUT).astype(jnp.int32))
    right, wrong = rollouts & correct, rollouts & ~correct
    enough = right.sum(axis=1, keepdims=True) >= jnp.maximum(1, rules.min_correct)
    pos = first(right, -reward, k_pos) & enough
    if rules.positive_source == "gold":
        pos = reference
    elif rules.positive_source == "rollout_or_gold":
        pos = jnp.where(enough, pos, reference)
    neg = first(wrong, reward, k_neg)
    reason = jnp.where(pos.any(axis=1), OK, NO_POSITIVE)
    reason = jnp.where(neg.any(axis=1), reason, NO_NEGATIVE)
    few = wrong.sum(axis=1) < rules.min_incorrect
    reason = jnp.where(few, FEW_INCORRECT, reason)
    reason = jnp.where(any_rollout, reason, NO_ROLLOUT)
    return Sets(pos, neg, reason.astype(jnp.int32))


def random_sets(
    valid: list[int], k_pos: int, k_neg: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Sets that ignore the rewards: the ablation "random mining".

    Args:
        valid: indices of the answers that reach the control point.
        k_pos: most positives, at least 1.
        k_neg: most negatives, at least 1; from all answers if none is left.
        rng: one permutation is drawn.
    """
    order = [int(i) for i in rng.permutation(valid)] if valid else []
    pos = order[: max(1, k_pos)]
    rest = order[max(1, k_pos) :] or order
    return pos, rest[: max(1, k_neg)]


def _first(mask: jax.Array, key: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` smallest keys among the masked entries ([K] bool, [K]), as a mask."""
    order = jnp.argsort(jnp.where(mask, key, jnp.inf), stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    return mask & (rank < count)
