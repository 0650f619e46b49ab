"""Which rule made the labels of a file: mazes have millions of shortest paths, labels show one.

An augmented copy of a maze keeps a consistent label only if its label is made anew by the rule of
the original, so the rule has to be known.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from halting_jax.datasets.maze_solver import (
    CANONICAL_ORDER,
    DIRECTIONS,
    all_optimal_labels,
    canonical_labels,
)

LabelFn = Callable[[np.ndarray], np.ndarray]

# Enough to tell rules apart; only one that fits these is tried on all mazes.
_SAMPLE = 64


class Rule(NamedTuple):
    """A tie-break: the first direction of `order` that comes closer to the other end.

    Attributes:
        order: permutation of 0..3, indices into `DIRECTIONS`.
        from_goal: walked from G to S.
    """

    order: tuple[int, ...] = CANONICAL_ORDER
    from_goal: bool = False

    def __str__(self) -> str:
        start = "G" if self.from_goal else "S"
        return f"from {start}: {', '.join(DIRECTIONS[index] for index in self.order)}"

    @property
    def label_fn(self) -> LabelFn:
        """Labels by this rule; uint8 [P, S] in and out."""
        return functools.partial(canonical_labels, order=self.order, from_goal=self.from_goal)


# The canonical rule first: where several fit (unique paths), it is the one that is taken.
RULES = tuple(
    Rule(order, from_goal)
    for from_goal in (False, True)
    for order in itertools.permutations(CANONICAL_ORDER)
)


def score_rules(inputs: np.ndarray, labels: np.ndarray) -> dict[Rule, float]:
    """Counts how many labels every rule reproduces.

    Args:
        inputs: uint8 [P, S].
        labels: uint8 [P, S].

    Returns:
        {rule: share of mazes}, best first.
    """
    scores = {rule: float(_matches(rule.label_fn, inputs, labels).mean()) for rule in RULES}
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def find_rule(inputs: np.ndarray, labels: np.ndarray) -> Rule | None:
    """Returns the first rule that reproduces every label, or None."""
    for rule in RULES:
        if (
            _matches(rule.label_fn, inputs[:_SAMPLE], labels[:_SAMPLE]).all()
            and _matches(rule.label_fn, inputs, labels).all()
        ):
            return rule
    return None


def find_label_fn(inputs: np.ndarray, labels: np.ndarray) -> LabelFn | None:
    """Returns the function that made the labels: all optimal cells or a rule; None if neither."""
    # Where every maze has one path, all rules agree with each other and with all_optimal.
    if _matches(all_optimal_labels, inputs, labels).all():
        return all_optimal_labels
    rule = find_rule(inputs, labels)
    return rule.label_fn if rule else None


def _matches(label_fn: LabelFn, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return (label_fn(inputs) == labels).all(1)
