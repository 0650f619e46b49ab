"""Where the walls of a maze stand: random walls, and spanning trees of a lattice.

Every maze has a generator of its own and draws from it in a fixed order; the arithmetic is done for
many mazes at once. So a layout does not depend on which others are made beside it.
"""

from collections.abc import Sequence

import numpy as np

TREES = ("depth_first", "wilson")

# Rounds of arrows drawn at once by `_wilson`.
_ROUNDS = 8


def random_walls(
    generators: Sequence[np.random.Generator],
    side: int,
    wall_share: tuple[float, float],
    layouts_each: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places a uniform number of walls uniformly on the grid; there is no border.

    A cell is a wall where its key lies below the layout's level. With uniform keys and a uniform
    level the number of walls is uniform from none to all; levels far from the wanted share (more
    than 5 standard deviations) are not drawn, and layouts outside it are left out. That takes
    a fraction of the time of sorting keys to get an exact number.

    Args:
        generators: one per maze.
        side: of the grid.
        wall_share: smallest and largest share of walls.
        layouts_each: layouts per maze.

    Returns:
        int64 [n], which of the mazes * layouts_each layouts have a share of walls as wanted;
        bool [n, side, side], True = open; int64 [n], a random open cell.
    """
    seq_len = side * side
    words = -(-(seq_len + 1) // 4)
    raw = [g.bit_generator.random_raw((layouts_each, words)) for g in generators]
    keys = np.concatenate(raw).astype("<u8", copy=False).view("<u2")  # [layouts, 4 * words]
    low, high = wall_share
    margin = 2.5 / side
    low_level, high_level = max(low - margin, 0.0) * 2**16, min(high + margin, 1.0) * 2**16
    level = low_level + keys[:, seq_len] * ((high_level - low_level) / 2**16)
    is_open = keys[:, :seq_len] >= level.astype(np.uint16)[:, None]
    walls = seq_len - np.count_nonzero(is_open, axis=1)
    wanted = np.flatnonzero((walls >= round(low * seq_len)) & (walls <= round(high * seq_len)))
    # Of the open cells each is equally likely to have the largest key.
    cell = keys[wanted, :seq_len].argmax(1)
    return wanted, is_open[wanted].reshape(-1, side, side), cell


def spanning_trees(
    generators: Sequence[np.random.Generator], side: int, tree: str, loops: int
) -> tuple[np.ndarray, np.ndarray]:
    """Carves a spanning tree of the lattice at odd coordinates, and some extra openings.

    Args:
        generators: one per maze.
        side: of the grid; an even side has walls on its upper and left edge only.
        tree: "depth_first" (long winding corridors) or "wilson" (uniform over all trees).
        loops: walls between lattice cells opened beyond the tree.

    Returns:
        bool [mazes, side, side], True = open; int64 [mazes], an open cell.
    """
    size = side // 2
    count, cells = len(generators), size * size
    steps, neighbour = _lattice(size)
    parent = (_depth_first if tree == "depth_first" else _wilson)(generators, size, neighbour)
    is_open = np.zeros((count, side, side), bool)
    is_open[:, 1 : 2 * size : 2, 1 : 2 * size : 2] = True
    row, column = np.divmod(np.arange(cells), size)
    # The passage to a parent is the grid cell half way.
    maze, cell = np.nonzero(parent >= 0)
    to = parent[maze, cell]
    is_open[maze, row[cell] + row[to] + 1, column[cell] + column[to] + 1] = True
    if loops:
        first, way = np.nonzero(neighbour >= 0)
        second = neighbour[first, way]
        first, second = first[first < second], second[first < second]
        edge_row, edge_column = row[first] + row[second] + 1, column[first] + column[second] + 1
        keys = np.stack([g.integers(2**32, size=len(first), dtype=np.uint32) for g in generators])
        is_closed = ~is_open[:, edge_row, edge_column]
        rank = np.argsort(np.where(is_closed, keys, np.uint64(2**32)), axis=1)[:, :loops]
        maze = np.arange(count)[:, None]
        is_open[maze, edge_row[rank], edge_column[rank]] = True
    return is_open, np.full(count, side + 1)


def num_lattice_walls(side: int) -> int:
    """Returns how many walls between lattice cells a spanning tree leaves closed."""
    size = side // 2
    return 2 * size * (size - 1) - (size * size - 1)


def _lattice(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the four steps, the neighbours of every cell [cells, 4] or -1)."""
    steps = np.array(((-1, 0), (0, -1), (1, 0), (0, 1)))
    row, column = np.divmod(np.arange(size * size), size)
    to_row, to_column = row[:, None] + steps[:, 0], column[:, None] + steps[:, 1]
    inside = (to_row >= 0) & (to_row < size) & (to_column >= 0) & (to_column < size)
    return steps, np.where(inside, to_row * size + to_column, -1)


def _depth_first(
    generators: Sequence[np.random.Generator], size: int, neighbour: np.ndarray
) -> np.ndarray:
    """Walks to random unvisited neighbours and back; returns parents [mazes, cells], root -1."""
    count, cells = len(generators), size * size
    # A walk crosses every edge twice, so each maze takes this many steps.
    steps = 2 * (cells - 1)
    draws = np.stack([g.integers(2**16, size=steps + 1, dtype=np.uint16) for g in generators])
    draws = draws.astype(np.int64)
    every = np.arange(count)
    here = draws[:, -1] * cells >> 16
    parent = np.full((count, cells), -1)
    # One more column stands for the outside: it always counts as visited.
    visited = np.zeros((count, cells + 1), bool)
    visited[:, -1] = True
    visited[every, here] = True
    for step in range(steps):
        around = neighbour[here]  # [mazes, 4]
        is_new = ~visited[every[:, None], around]
        rank = is_new.cumsum(1)
        choices = rank[:, -1]
        chosen = (rank > (draws[:, step] * choices >> 16)[:, None]).argmax(1)
        forward = choices > 0
        to = np.where(forward, around[every, chosen], parent[every, here])
        # The root has no parent, but a walk that is back there has taken all its steps.
        parent[every[forward], to[forward]] = here[forward]
        visited[every, to] = True
        here = to
    return parent


def _wilson(
    generators: Sequence[np.random.Generator], size: int, neighbour: np.ndarray
) -> np.ndarray:
    """Draws a uniform spanning tree (Wilson 1996, cycle popping); parents as `_depth_first`.

    Every cell but the root holds a random arrow. All arrows on cycles are redrawn until there are
    none; the order in which cycles are popped does not change the distribution, so all are popped
    at once. An arrow that leaves the lattice is a cycle of length one.
    """
    count, cells = len(generators), size * size
    doublings = int(cells).bit_length()
    itself = np.arange(cells)
    arrow_to = np.where(neighbour >= 0, neighbour, itself[:, None])
    root = cells // 2
    result = np.empty((count, cells), np.intp)
    active = np.arange(count)
    to = np.broadcast_to(itself, (count, cells)).copy()
    redraw = np.ones((count, cells), bool)
    round_in_block = _ROUNDS
    while active.size:
        if round_in_block == _ROUNDS:
            drawn = [
                generators[maze].integers(4, size=(_ROUNDS, cells), dtype=np.uint8)
                for maze in active.tolist()
            ]
            block = np.stack(drawn)  # [active, rounds, cells]
            round_in_block = 0
        fresh = arrow_to[itself, block[:, round_in_block]]
        round_in_block += 1
        to = np.where(redraw, fresh, to)
        to[:, root] = root
        # After more steps than cells, what is still reached lies on a cycle (or is the root).
        end = to
        for _ in range(doublings):
            end = np.take_along_axis(end, end, 1)
        redraw = np.zeros((active.size, cells), bool)
        np.put_along_axis(redraw, end, True, 1)
        redraw[:, root] = False
        goes_on = redraw.any(1)
        if not goes_on.all():
            result[active[~goes_on]] = to[~goes_on]
            active, to, redraw = active[goes_on], to[goes_on], redraw[goes_on]
            block = block[goes_on]
    result[:, root] = -1
    return result
