"""Small mazes and slow, plain Python versions of what is computed on them."""

from collections import deque

import numpy as np

from halting_jax.datasets.maze_tokens import GOAL, OPEN, START, WALL, encode

Cell = tuple[int, int]
STEPS = ((-1, 0), (0, -1), (1, 0), (0, 1))


def maze(*rows: str) -> np.ndarray:
    """Encodes one maze; uint8 [S]. A dot may stand for an open cell."""
    return encode("".join(rows).replace(".", " "))


def random_mazes(np_rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Mazes with random walls in which G can be reached from S; uint8 [count, S]."""
    found: list[np.ndarray] = []
    while len(found) < count:
        share = np_rng.uniform(0.1, 0.6)
        grid = np.where(np_rng.random(side * side) < share, WALL, OPEN).astype(np.uint8)
        start, goal = np_rng.choice(side * side, 2, replace=False)
        grid[start], grid[goal] = START, GOAL
        if plain_distances(grid, START)[goal] > 0:
            found.append(grid)
    return np.stack(found)


def around(cell: Cell, side: int) -> list[Cell]:
    """The neighbours of a cell: up, left, down, right, as far as they exist."""
    found = [(cell[0] + a, cell[1] + b) for a, b in STEPS]
    return [(r, c) for r, c in found if 0 <= r < side and 0 <= c < side]


def plain_distances(grid: np.ndarray, source: int) -> np.ndarray:
    """Moves from the cell with this token, by a queue; -1 where there is no way; int [S]."""
    side = int(len(grid) ** 0.5)
    table = grid.reshape(side, side)
    first = divmod(int(np.flatnonzero(grid == source)[0]), side)
    distance = np.full((side, side), -1)
    distance[first] = 0
    queue = deque([first])
    while queue:
        cell = queue.popleft()
        for other in around(cell, side):
            if table[other] != WALL and distance[other] < 0:
                distance[other] = distance[cell] + 1
                queue.append(other)
    return distance.reshape(-1)


def shortest_paths(grid: np.ndarray) -> list[list[Cell]]:
    """All shortest paths from S to G, ends included, in the order up, left, down, right."""
    side = int(len(grid) ** 0.5)
    to_goal = plain_distances(grid, GOAL).reshape(side, side)
    paths = [[divmod(int(np.flatnonzero(grid == START)[0]), side)]]
    for left in range(to_goal[paths[0][0]] - 1, -1, -1):
        paths = [[*p, c] for p in paths for c in around(p[-1], side) if to_goal[c] == left]
    return paths


def covers_all(members: np.ndarray, start: Cell, goal: Cell) -> bool:
    """Whether some walk from start to goal uses each member once, by trying all; [side, side]."""
    side, size = len(members), int(members.sum())

    def walk(cell: Cell, seen: frozenset[Cell]) -> bool:
        if cell == goal:
            return len(seen) == size
        following = [c for c in around(cell, side) if members[c] and c not in seen]
        return any(walk(c, seen | {c}) for c in following)

    return walk(start, frozenset([start]))
