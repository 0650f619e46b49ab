"""Mazes made from a recipe: the same ones whatever the batch size and the number of processes.

Maze k of a split draws from `default_rng([seed, split, k, attempt])` alone; `attempt` counts up
only where a maze equals an earlier one. Layouts whose longest way is too short are rejected (double
sweep); start and goal are uniform among the pairs farther apart than the threshold.

Instance procedure of style "random_walls": Lehnert et al. 2024 (Searchformer), with the length
filter of the "Maze-Hard" sets.
"""

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence

import numpy as np

from common.errors import UserError, require
from halting_jax.datasets import aug8, maze_bits, maze_layouts, maze_solver
from halting_jax.datasets.maze_tokens import GOAL, OPEN, START, WALL

STYLES = ("random_walls", "perfect")
# Part of every maze's seed. The order of generation is test, val, train: each split avoids the
# mazes of those before it, so the size of the training set never changes the test set.
SPLIT_IDS = {"train": 0, "val": 1, "test": 2}
SPLIT_ORDER = ("test", "val", "train")

# Layouts drawn together per maze; part of the random stream, so changing it changes all mazes.
_LAYOUTS_EACH = 128
_MAX_LAYOUTS = {"random_walls": 200_000, "perfect": 2_000}
_MAX_ATTEMPTS = 200
_MAX_FRUITLESS_ATTEMPTS = 10
# Only for speed: how much is searched at once, and handed to a process at once.
_LAYOUTS_AT_ONCE = 2048
_SOURCES_AT_ONCE = 8192
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides which mazes are made.

    Attributes:
        style: "random_walls" or "perfect" (a spanning tree on a lattice).
        side: of the square grid.
        min_path_moves: the way from S to G must take more moves than this.
        train_size: number of training mazes.
        test_size: number of test mazes.
        val_size: number of validation mazes.
        seed: of everything random.
        labels: "canonical", "unique" (mazes with one shortest path only) or "all_optimal".
        tree: for "perfect": "depth_first" or "wilson".
        loops: for "perfect": walls opened beyond the tree.
        wall_share: for "random_walls": smallest and largest share of walls; None = 0.3 to 0.5, or
            0.33 to 0.43 where more than 100 moves are asked for (others are hardly ever accepted).
    """

    style: str = "random_walls"
    side: int = 30
    min_path_moves: int = 110
    train_size: int = 1000
    test_size: int = 1000
    val_size: int = 0
    seed: int = 0
    labels: str = "canonical"
    tree: str = "depth_first"
    loops: int = 0
    wall_share: tuple[float, float] | None = None

    @property
    def walls(self) -> tuple[float, float]:
        """The share of walls that is drawn from."""
        if self.wall_share is not None:
            return self.wall_share
        return (0.33, 0.43) if self.min_path_moves > 100 else (0.3, 0.5)

    def validate(self) -> "Recipe":
        """Returns itself.

        Raises:
            UserError: names the first setting that makes no sense.
        """
        for name, known in (
            ("style", STYLES),
            ("labels", maze_solver.LABEL_POLICIES),
            ("tree", maze_layouts.TREES),
        ):
            value = getattr(self, name)
            require(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("min_path_moves", "train_size", "test_size", "val_size", "seed", "loops"):
            require(getattr(self, name) >= 0, f"{name} must not be negative")
        smallest = 2 if self.style == "random_walls" else 4
        require(
            smallest <= self.side <= maze_bits.MAX_SIDE,
            f"side must be {smallest} to {maze_bits.MAX_SIDE} for style {self.style}, "
            f"got {self.side}",
        )
        low, high = self.walls
        require(0 <= low <= high < 1, f"wall_share must rise within 0 to 1, got {low}, {high}")
        if self.style == "random_walls":
            require(self.loops == 0, "loops are openings of style perfect; leave them at 0")
        else:
            most = maze_layouts.num_lattice_walls(self.side)
            require(self.loops <= most, f"side {self.side} has room for {most} loops only")
        # A shortest path visits at most two of every 2 x 2 cells but for its ends.
        longest = (self.side * self.side + 1) // 2 + self.side
        require(
            self.min_path_moves < longest,
            f"no maze of side {self.side} has a shortest path of more than {self.min_path_moves} "
            "moves; lower min_path_moves",
        )
        return self


@dataclasses.dataclass(frozen=True)
class Mazes:
    """Generated mazes.

    Attributes:
        inputs: uint8 [P, S].
        labels: uint8 [P, S].
        moves: int32 [P], length of the shortest path.
    """

    inputs: np.ndarray
    labels: np.ndarray
    moves: np.ndarray


def generate(recipe: Recipe, processes: int = 1, progress: bool = False) -> dict[str, Mazes]:
    """Makes all splits of a recipe.

    Args:
        recipe: what to make.
        processes: worker processes; the result does not depend on it.
        progress: whether to draw a progress bar.

    Returns:
        {split: mazes}, without splits of no mazes. No maze occurs twice, and no training maze
        is a rotation or reflection of a validation or test maze.

    Raises:
        UserError: for a bad recipe, or one whose mazes are too rare.
    """
    recipe.validate()
    seen: set[bytes] = set()
    made: dict[str, Mazes] = {}
    with _workers(processes) as pool:
        for split in SPLIT_ORDER:
            count = getattr(recipe, f"{split}_size")
            if not count:
                continue
            made[split] = _split(recipe, split, count, seen, pool, progress)
            if split != "train":
                # Otherwise augmentation would carry held-out mazes into training.
                for image in aug8.transform_all(made[split].inputs)[1:]:
                    seen.update(_digests(image))
    return {split: made[split] for split in SPLIT_IDS if split in made}


def make_mazes(
    recipe: Recipe, split: str, numbers: Sequence[int] | np.ndarray, attempt: int = 0
) -> np.ndarray:
    """Makes single mazes of a split, without looking for duplicates.

    Args:
        recipe: what to make.
        split: a key of `SPLIT_IDS`.
        numbers: which mazes.
        attempt: part of the seed.

    Returns:
        uint8 [len(numbers), S].

    Raises:
        UserError: if a maze needs too many layouts.
    """
    generators = [
        np.random.default_rng([recipe.seed, SPLIT_IDS[split], int(number), attempt])
        for number in numbers
    ]
    result = np.empty((len(generators), recipe.side**2), np.uint8)
    budget = np.full(len(generators), _MAX_LAYOUTS[recipe.style])
    todo = np.arange(len(generators))
    while todo.size:
        waiting = [generators[index] for index in todo]
        is_open, areas, corner = _wide_layouts(recipe, waiting, budget, todo)
        tokens = _place_ends(is_open, areas, corner, waiting, recipe.min_path_moves)
        if recipe.labels == "unique":
            is_good = maze_solver.has_unique_path(tokens)
        else:
            is_good = np.ones(todo.size, bool)
        result[todo[is_good]] = tokens[is_good]
        todo = todo[~is_good]
    return result


def _wide_layouts(
    recipe: Recipe, generators: list[np.random.Generator], budget: np.ndarray, todo: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws layouts until every generator has one with a way of enough moves.

    Args:
        recipe: what to make.
        generators: one per maze.
        budget: int [mazes of the block], layouts each may still draw; lowered in place.
        todo: int [n], where in `budget` each generator stands.

    Returns:
        bool [n, side, side], the open cells; words [n, side + 1], an area of them; int64 [n], a
        cell of the area with a cell more than `min_path_moves` away.
    """
    count, side = len(generators), recipe.side
    is_open = np.empty((count, side, side), bool)
    areas = np.empty((count, side + 1), maze_bits.word_type(side))
    corner = np.empty(count, np.intp)
    each = _LAYOUTS_EACH if recipe.style == "random_walls" else 1
    in_flight = _LAYOUTS_AT_ONCE // each
    active, next_up = np.arange(0), 0
    while True:
        more = min(in_flight - active.size, count - next_up)
        active = np.concatenate([active, np.arange(next_up, next_up + more)])
        next_up += more
        if not active.size:
            return is_open, areas, corner
        budget[todo[active]] -= each
        if (budget[todo[active]] < 0).any():
            unique = "unique " if recipe.labels == "unique" else ""
            raise UserError(
                f"none of {_MAX_LAYOUTS[recipe.style]} layouts of side {side}, style "
                f"{recipe.style}, has a {unique}path of more than {recipe.min_path_moves} moves; "
                "lower min_path_moves or choose style perfect"
            )
        drawing = [generators[index] for index in active]
        if recipe.style == "random_walls":
            number, rooms, cell = maze_layouts.random_walls(drawing, side, recipe.walls, each)
        else:
            rooms, cell = maze_layouts.spanning_trees(drawing, side, recipe.tree, recipe.loops)
            number = np.arange(active.size)
        reached, far, depth = maze_bits.flood(
            maze_bits.pack(rooms), maze_bits.single_cells(cell, side)
        )
        # Any two cells of an area are at most twice the depth of a search apart.
        hopeful = np.flatnonzero(2 * depth > recipe.min_path_moves)
        start = maze_bits.first_cell(far[hopeful])
        is_wide = maze_bits.beyond(reached[hopeful], start, recipe.min_path_moves).any(1)
        # The first layout of each maze that passes.
        place, first = np.unique(number[hopeful[is_wide]] // each, return_index=True)
        chosen = hopeful[is_wide][first]
        done = active[place]
        is_open[done], areas[done] = rooms[chosen], reached[chosen]
        start_bits = maze_bits.unpack(start[is_wide][first])
        corner[done] = start_bits.reshape(len(done), side * side).argmax(1)
        active = np.delete(active, place)


def _place_ends(
    is_open: np.ndarray,
    areas: np.ndarray,
    corner: np.ndarray,
    generators: list[np.random.Generator],
    threshold: int,
) -> np.ndarray:
    """Draws S and G uniformly among all pairs of an area more than `threshold` moves apart.

    Args:
        is_open: bool [n, side, side].
        areas: words [n, side + 1], connected, with at least one such pair.
        corner: int [n], a cell of the area with a cell more than `threshold` moves away.
        generators: one per maze.
        threshold: see above.

    Returns:
        uint8 [n, S].
    """
    count, side = is_open.shape[:2]
    # With c half way along a longest known path, d(v, w) <= d(v, c) + max d(., c): cells near the
    # middle need no search of their own.
    from_corner = maze_solver.distances(is_open, corner).reshape(count, -1)
    other = from_corner.argmax(1)
    from_other = maze_solver.distances(is_open, other).reshape(count, -1)
    length = from_corner.max(1)
    middle = (
        (from_corner + from_other == length[:, None]) & (from_corner == length[:, None] // 2)
    ).argmax(1)
    from_middle = maze_solver.distances(is_open, middle).reshape(count, -1)
    reach = from_middle.max(1)
    maze, cell = np.nonzero((from_middle >= 0) & (from_middle + reach[:, None] > threshold))
    far = np.concatenate(
        [
            maze_bits.beyond(areas[maze[part]], maze_bits.single_cells(cell[part], side), threshold)
            for part in _slices(len(maze), _SOURCES_AT_ONCE)
        ]
    )
    partners = np.bitwise_count(far).sum(1, dtype=np.int64)
    pairs = np.bincount(maze, partners, count).astype(np.int64)
    drawn = np.array([g.integers(total) for g, total in zip(generators, pairs, strict=True)])
    # Pairs are numbered through all mazes, source by source.
    drawn += np.cumsum(pairs) - pairs
    last = np.cumsum(partners)
    source = np.searchsorted(last, drawn, side="right")
    rank = drawn - (last - partners)[source]
    goals = maze_bits.unpack(far[source]).reshape(count, -1)
    goal = (goals.cumsum(1) > rank[:, None]).argmax(1)
    tokens = np.where(is_open.reshape(count, -1), np.uint8(OPEN), np.uint8(WALL))
    every = np.arange(count)
    tokens[every, cell[source]] = START
    tokens[every, goal] = GOAL
    return tokens


def _split(
    recipe: Recipe,
    split: str,
    count: int,
    seen: set[bytes],
    pool: concurrent.futures.Executor | None,
    progress: bool,
) -> Mazes:
    from tqdm import tqdm

    inputs = np.empty((count, recipe.side**2), np.uint8)
    todo = np.arange(count)
    with tqdm(total=count, desc=f"{split} mazes", disable=not progress, unit="maze") as bar:
        fruitless = 0
        for attempt in range(_MAX_ATTEMPTS):
            again = []
            for numbers, tokens in _blocks(recipe, split, todo, attempt, pool):
                fresh = []
                for digest in _digests(tokens):
                    fresh.append(digest not in seen)
                    seen.add(digest)
                inputs[numbers[fresh]] = tokens[fresh]
                again.append(numbers[np.logical_not(fresh)])
                bar.update(sum(fresh))
            missing = np.concatenate(again)
            fruitless = fruitless + 1 if missing.size == todo.size else 0
            todo = missing
            if not todo.size or fruitless == _MAX_FRUITLESS_ATTEMPTS:
                break
        if todo.size:
            raise UserError(
                f"cannot find {count} different {split} mazes of side {recipe.side}, style "
                f"{recipe.style}, with more than {recipe.min_path_moves} moves ({todo.size} are "
                "missing); ask for fewer, or for a larger side"
            )
    labels, moves = np.empty_like(inputs), np.empty(count, np.int32)
    for part in _slices(count, _BLOCK):
        to_goal = maze_solver.goal_distances(inputs[part])
        labels[part] = maze_solver.labels_of(inputs[part], recipe.labels, to_goal)
        moves[part] = maze_solver.path_moves(inputs[part], to_goal)
    return Mazes(inputs, labels, moves)


def _blocks(
    recipe: Recipe,
    split: str,
    numbers: np.ndarray,
    attempt: int,
    pool: concurrent.futures.Executor | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (numbers, mazes) in order."""
    blocks = [numbers[part] for part in _slices(len(numbers), _BLOCK)]
    if pool is None or len(blocks) < 2:
        for block in blocks:
            yield block, make_mazes(recipe, split, block, attempt)
        return
    arguments = ([recipe] * len(blocks), [split] * len(blocks), blocks, [attempt] * len(blocks))
    yield from zip(blocks, pool.map(make_mazes, *arguments), strict=True)


class _workers:
    """A pool of spawned processes, or None for a single one."""

    def __init__(self, processes: int) -> None:
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        if processes > 1:
            # Not forked: the parent may hold the threads of JAX.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context)

    def __enter__(self) -> concurrent.futures.Executor | None:
        return self._pool

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _digests(tokens: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in tokens]


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]
