"""Shortest paths on batches of mazes: distances, path counts and the labels made from them.

All mazes of a batch are searched at once: a breadth-first search is a boolean dilation of the
frontier, and with a closed border around every grid the whole batch is one flat vector, so that a
step is a handful of shifted logical operations.
"""

from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from halting_jax.datasets.maze_tokens import GOAL, OPEN, PATH, START, WALL

DIRECTIONS = ("up", "left", "down", "right")
CANONICAL_ORDER = (0, 1, 2, 3)
LABEL_POLICIES = ("canonical", "unique", "all_optimal")

# Grids searched together: what a core's cache holds.
_CHUNK_BYTES = 1 << 18


def side_of(seq_len: int) -> int:
    """Returns the side of a square grid of `seq_len` cells.

    Raises:
        UserError: if the number is not a square.
    """
    side = round(seq_len**0.5)
    if seq_len < 1 or side * side != seq_len:
        raise UserError(f"a grid of {seq_len} cells is not square; mazes have side x side cells")
    return side


def ends(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds start and goal.

    Args:
        tokens: uint8 [P, S].

    Returns:
        int64 [P] each, cell numbers of S and G.

    Raises:
        UserError: if a maze does not have exactly one of each.
    """
    for token, name in ((START, "S"), (GOAL, "G")):
        wrong = np.flatnonzero((tokens == token).sum(1) != 1)
        if wrong.size:
            raise UserError(f"maze {wrong[0]} (counted from 0) must have exactly one {name}")
    return (tokens == START).argmax(1), (tokens == GOAL).argmax(1)


def distances(is_open: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Counts the moves from one source per grid to every cell.

    Args:
        is_open: bool [P, side, side].
        sources: int [P], an open cell of each grid.

    Returns:
        int16 [P, side, side]; -1 for walls and cells that cannot be reached.
    """
    count, side = is_open.shape[:2]
    result = np.empty((count, side, side), np.int16)
    chunk = max(1, _CHUNK_BYTES // (side + 2) ** 2)
    for first in range(0, count, chunk):
        part = slice(first, first + chunk)
        result[part] = _distances(is_open[part], np.asarray(sources)[part])
    return result


def _distances(is_open: np.ndarray, sources: np.ndarray) -> np.ndarray:
    count, side = is_open.shape[:2]
    width = side + 2
    rooms = np.zeros((count, width, width), bool)
    rooms[:, 1:-1, 1:-1] = is_open
    row, column = np.divmod(sources, side)
    free = rooms.reshape(-1).copy()
    front = np.zeros_like(free)
    front[np.arange(count) * width * width + (row + 1) * width + column + 1] = True
    free &= ~front
    # A cell's distance is the number of steps before which it was still free. Bytes add eight
    # times faster than 16-bit numbers, so they are summed first and moved over before they wrap.
    total = np.zeros(free.shape, np.int16)
    recent = np.zeros(free.shape, np.uint8)
    grown = np.empty_like(front)
    step = 0
    while True:
        recent += free.view(np.uint8)
        step += 1
        if step % 255 == 0:
            total += recent
            recent[:] = 0
            step = 0
        grown[:] = False
        np.logical_or(front[: -2 * width], front[2 * width :], out=grown[width:-width])
        grown[1:] |= front[:-1]
        grown[:-1] |= front[1:]
        grown &= free
        free ^= grown
        if not grown.any():
            break
        front, grown = grown, front
    total += recent
    reached = rooms.reshape(-1) & ~free
    # The source was never free and every other reached cell was counted once per step before it.
    result = np.where(reached, total, np.int16(-1)).reshape(count, width, width)
    return result[:, 1:-1, 1:-1]


def _rooms(tokens: np.ndarray) -> np.ndarray:
    side = side_of(tokens.shape[1])
    return (tokens != WALL).reshape(-1, side, side)


def goal_distances(tokens: np.ndarray) -> np.ndarray:
    """Counts the moves from every cell to the goal.

    Args:
        tokens: uint8 [P, S].

    Returns:
        int16 [P, S]; -1 where there is no way.
    """
    return distances(_rooms(tokens), ends(tokens)[1]).reshape(tokens.shape)


def start_distances(tokens: np.ndarray) -> np.ndarray:
    """As `goal_distances`, from the start."""
    return distances(_rooms(tokens), ends(tokens)[0]).reshape(tokens.shape)


def path_moves(tokens: np.ndarray, to_goal: np.ndarray | None = None) -> np.ndarray:
    """Counts the moves of a shortest path from S to G.

    Args:
        tokens: uint8 [P, S].
        to_goal: result of `goal_distances`, if it is known.

    Returns:
        int32 [P]; -1 where there is no path.
    """
    to_goal = goal_distances(tokens) if to_goal is None else to_goal
    return to_goal[np.arange(len(tokens)), ends(tokens)[0]].astype(np.int32)


def canonical_labels(
    tokens: np.ndarray,
    order: Sequence[int] = CANONICAL_ORDER,
    from_goal: bool = False,
    to_goal: np.ndarray | None = None,
) -> np.ndarray:
    """Marks the shortest path that a fixed order of directions picks.

    From S repeatedly take the first direction of `order` that lowers the distance to G.

    Args:
        tokens: uint8 [P, S].
        order: a permutation of 0..3, indices into `DIRECTIONS`.
        from_goal: walk from G to S instead.
        to_goal: result of `goal_distances`, if it is known; unused with `from_goal`.

    Returns:
        uint8 [P, S]: the input with the open cells of the path as PATH.

    Raises:
        UserError: if a maze has no path.
    """
    count, seq_len = tokens.shape
    start, goal = ends(tokens)
    if from_goal:
        start, distance = goal, start_distances(tokens)
    else:
        distance = goal_distances(tokens) if to_goal is None else to_goal
    _require_paths(distance[np.arange(count), start])
    side = side_of(seq_len)
    width = side + 2
    padded = np.full((count, width, width), -1, np.int16)
    padded[:, 1:-1, 1:-1] = distance.reshape(count, side, side)
    table = padded.reshape(-1)
    offsets = np.array((-width, -1, width, 1))[list(order)]
    row, column = np.divmod(start, side)
    # One walker per maze, as a position in `table`; a walker leaves when it is one move away.
    here = np.arange(count) * width * width + (row + 1) * width + column + 1
    left = table[here]
    marked = np.zeros(len(table), bool)
    while True:
        walking = left > 1
        here, left = here[walking], left[walking] - 1
        if not here.size:
            break
        around = here[:, None] + offsets  # [walkers, 4]
        closer = table[around] == left[:, None]
        here = np.take_along_axis(around, closer.argmax(1)[:, None], 1)[:, 0]
        marked[here] = True
    path = marked.reshape(count, width, width)[:, 1:-1, 1:-1].reshape(count, seq_len)
    return np.where(path, np.uint8(PATH), tokens)


def optimal_cells(tokens: np.ndarray, to_goal: np.ndarray | None = None) -> np.ndarray:
    """Finds the open cells that lie on some shortest path.

    Args:
        tokens: uint8 [P, S].
        to_goal: result of `goal_distances`, if it is known.

    Returns:
        bool [P, S]: d_S + d_G = d_S(G), without S and G.

    Raises:
        UserError: if a maze has no path.
    """
    to_goal = goal_distances(tokens) if to_goal is None else to_goal
    moves = path_moves(tokens, to_goal)
    _require_paths(moves)
    total = start_distances(tokens) + to_goal
    return (tokens == OPEN) & (to_goal >= 0) & (total == moves[:, None])


def all_optimal_labels(tokens: np.ndarray, to_goal: np.ndarray | None = None) -> np.ndarray:
    """Marks every cell on some shortest path; uint8 [P, S] in and out."""
    return np.where(optimal_cells(tokens, to_goal), np.uint8(PATH), tokens)


def has_unique_path(tokens: np.ndarray, to_goal: np.ndarray | None = None) -> np.ndarray:
    """Tells which mazes have exactly one shortest path.

    Args:
        tokens: uint8 [P, S].
        to_goal: result of `goal_distances`, if it is known.

    Returns:
        bool [P].
    """
    # Every distance 1 .. L-1 has at least one optimal cell, so a sum of L-1 means one each.
    cells = optimal_cells(tokens, to_goal).sum(1)
    return cells == path_moves(tokens, to_goal) - 1


def num_shortest_paths(tokens: np.ndarray) -> np.ndarray:
    """Counts the shortest paths from S to G.

    Args:
        tokens: uint8 [P, S].

    Returns:
        float64 [P]; exact up to 2^53.
    """
    count, seq_len = tokens.shape
    side = side_of(seq_len)
    start, goal = ends(tokens)
    distance = start_distances(tokens)
    moves = distance[np.arange(count), goal]
    padded = np.full((count, side + 2, side + 2), -1, np.int16)
    padded[:, 1:-1, 1:-1] = distance.reshape(count, side, side)
    layer = padded.reshape(-1)
    ways = np.zeros(len(layer))
    ways[layer == 0] = 1.0
    # Cells in the order of their distance, so that each layer is one contiguous slice.
    by_layer = np.argsort(layer, kind="stable")
    bounds = np.searchsorted(layer[by_layer], np.arange(1, max(moves.max(), 0) + 2))
    offsets = np.array((-(side + 2), -1, side + 2, 1))
    for step in range(1, len(bounds)):
        cells = by_layer[bounds[step - 1] : bounds[step]]
        around = cells[:, None] + offsets
        ways[cells] = (ways[around] * (layer[around] == step - 1)).sum(1)
    result = ways.reshape(count, side + 2, side + 2)[:, 1:-1, 1:-1].reshape(count, seq_len)
    return np.where(moves > 0, result[np.arange(count), goal], 0.0)


def labels_of(
    tokens: np.ndarray, policy: str = "canonical", to_goal: np.ndarray | None = None
) -> np.ndarray:
    """Labels mazes by one of `LABEL_POLICIES`; uint8 [P, S] in and out.

    "unique" marks the same cells as "canonical": which mazes it admits is the generator's affair.
    """
    if policy == "all_optimal":
        return all_optimal_labels(tokens, to_goal)
    return canonical_labels(tokens, to_goal=to_goal)


def _require_paths(moves: np.ndarray) -> None:
    lost = np.flatnonzero(moves < 0)
    if lost.size:
        raise UserError(f"maze {lost[0]} (counted from 0) has no path from S to G")
