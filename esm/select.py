"""Which mined entries enter the library: forced picks per control point, then a rule."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from common.errors import UserError
from esm.core.dpp import NONE, dpp_greedy

METHODS = ("dpp", "top", "random")
KERNEL_SCOPES = ("all", "same_m_layer")

_dpp = jax.jit(dpp_greedy, static_argnames="size")


class Rules(NamedTuple):
    """How entries are selected.

    Attributes:
        size: B, most entries.
        method: one of METHODS.
        diversity: lambda of the determinantal process.
        epsilon: added to its diagonal.
        min_per_point: entries of best quality taken first at every control point.
        seed: of the method "random".
        condition_on_forced: the process starts from the forced picks instead of from nothing.
        kernel_scope: "all" compares every two keys; "same_m_layer" treats keys of different layers
            or control points as orthogonal (they never compete in retrieval).
    """

    size: int
    method: str = "dpp"
    diversity: float = 0.5
    epsilon: float = 1e-4
    min_per_point: int = 0
    seed: int = 0
    condition_on_forced: bool = False
    kernel_scope: str = "all"


def select_entries(
    keys: np.ndarray,
    quality: Sequence[float],
    points: Sequence[int],
    layers: Sequence[int],
    rules: Rules,
) -> list[int]:
    """Indices of the chosen entries in order: forced picks, then those of the method.

    Args:
        keys: [N, H], raw.
        quality: [N].
        points: [N] control points.
        layers: [N].
        rules: see there.

    Raises:
        UserError: a key has no direction, or the method is unknown.
    """
    forced = _forced(quality, points, rules)
    taken = set(forced)
    rest = [i for i in range(len(quality)) if i not in taken]
    left = min(max(rules.size - len(forced), 0), len(rest))
    if rules.method == "top":
        chosen = sorted(rest, key=lambda i: -quality[i])[:left]
    elif rules.method == "random":
        random.Random(rules.seed).shuffle(rest)
        chosen = rest[:left]
    elif rules.method == "dpp":
        chosen = (
            [] if left == 0 else _by_dpp(keys, quality, points, layers, forced, rest, left, rules)
        )
    else:
        raise UserError(f"offline_select.method={rules.method!r} is none of {', '.join(METHODS)}")
    return forced + chosen


def _forced(quality: Sequence[float], points: Sequence[int], rules: Rules) -> list[int]:
    forced: list[int] = []
    if rules.min_per_point <= 0:
        return forced
    for point in sorted({m for m in points if m >= 1}):
        of_point = [i for i, m in enumerate(points) if m == point]
        best = sorted(of_point, key=lambda i: -quality[i])[: rules.min_per_point]
        forced += best[: rules.size - len(forced)]
    return forced


def _by_dpp(
    keys: np.ndarray,
    quality: Sequence[float],
    points: Sequence[int],
    layers: Sequence[int],
    forced: list[int],
    rest: list[int],
    left: int,
    rules: Rules,
) -> list[int]:
    given = forced if rules.condition_on_forced else []
    order = given + rest
    group = None
    if rules.kernel_scope == "same_m_layer":
        names = {pair: n for n, pair in enumerate(sorted(set(zip(points, layers, strict=True))))}
        group = np.asarray([names[points[i], layers[i]] for i in order], np.int32)
    count, size = len(order), len(given) + left
    # Padded to powers of two, so that few programs serve all sizes; the first picks do not depend
    # on how many follow.
    capacity, length = _power_of_two(count, 64), _power_of_two(size, 16)
    first = np.full((length,), NONE, np.int32)
    first[: len(given)] = np.arange(len(given))
    # Double precision: near-duplicate keys under a small epsilon cancel to nothing in single.
    with jax.enable_x64(True):
        picks = _dpp(
            np.pad(unit_keys(keys)[order], ((0, capacity - count), (0, 0))),
            np.pad(np.asarray(quality, np.float64)[order], (0, capacity - count)),
            np.arange(capacity) < count,
            length,
            rules.diversity,
            rules.epsilon,
            first,
            None if group is None else np.pad(group, (0, capacity - count), constant_values=-1),
        )
        index = np.asarray(picks.entry)[:size]
    return [order[i] for i in index if i >= len(given)]


def _power_of_two(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


def unit_keys(keys: np.ndarray) -> np.ndarray:
    """Keys of length 1, float64 [N, H].

    Raises:
        UserError: a key is zero.
    """
    wide = np.asarray(keys, np.float64)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    if not (norm > 0).all():
        row = int(np.argmin(norm[:, 0] > 0))
        raise UserError(
            f"mined entry {row} has a key without direction (norm 0); mine again: the states of "
            "its layer are empty"
        )
    return wide / norm
