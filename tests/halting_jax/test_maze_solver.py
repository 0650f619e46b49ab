"""Distances, path counts and labels against plain Python."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from halting_jax.datasets import maze_bits, maze_solver, maze_tiebreak
from halting_jax.datasets.maze_tokens import (
    GOAL,
    OPEN,
    PATH,
    START,
    WALL,
    decode,
    encode,
)
from tests.halting_jax.maze_cases import maze, plain_distances, random_mazes, shortest_paths

sizes = st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 7))


def marked(grid: np.ndarray, paths: list) -> np.ndarray:
    side = int(len(grid) ** 0.5)
    label = grid.reshape(side, side).copy()
    for path in paths:
        for cell in path[1:-1]:
            label[cell] = PATH
    return label.reshape(-1)


def test_text_round_trip() -> None:
    text = "#S oG# #"
    assert encode(text).tolist() == [WALL, START, OPEN, PATH, GOAL, WALL, OPEN, WALL]
    assert decode(encode(text)) == text
    for bad in ("#x", "#é", "#\N{SNOWMAN}", "#\0"):
        with pytest.raises(UserError, match="unknown character .* at position 2"):
            encode(bad)


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_everything_agrees_with_plain_python(size: tuple[int, int]) -> None:
    seed, side = size
    mazes = random_mazes(np.random.default_rng(seed), 5, side)
    paths = [shortest_paths(grid) for grid in mazes]
    np.testing.assert_array_equal(
        maze_solver.goal_distances(mazes), [plain_distances(grid, GOAL) for grid in mazes]
    )
    np.testing.assert_array_equal(
        maze_solver.start_distances(mazes), [plain_distances(grid, START) for grid in mazes]
    )
    np.testing.assert_array_equal(maze_solver.path_moves(mazes), [len(p[0]) - 1 for p in paths])
    np.testing.assert_array_equal(maze_solver.num_shortest_paths(mazes), [len(p) for p in paths])
    np.testing.assert_array_equal(maze_solver.has_unique_path(mazes), [len(p) == 1 for p in paths])
    # The walk that prefers up, left, down, right is the first in that order.
    np.testing.assert_array_equal(
        maze_solver.canonical_labels(mazes),
        [marked(grid, p[:1]) for grid, p in zip(mazes, paths, strict=True)],
    )
    np.testing.assert_array_equal(
        maze_solver.all_optimal_labels(mazes),
        [marked(grid, p) for grid, p in zip(mazes, paths, strict=True)],
    )


@settings(max_examples=20, deadline=None)
@given(sizes, st.permutations(range(4)), st.booleans())
def test_every_tie_break_takes_its_first_choice(
    size: tuple[int, int], order: list[int], from_goal: bool
) -> None:
    mazes = random_mazes(np.random.default_rng(size[0]), 4, size[1])
    labels = maze_solver.canonical_labels(mazes, order, from_goal)
    names = ((-1, 0), (0, -1), (1, 0), (0, 1))

    def choices(path: list) -> list[int]:
        moves = [names.index((b[0] - a[0], b[1] - a[1])) for a, b in itertools.pairwise(path)]
        return [order.index(move) for move in moves]

    for grid, label in zip(mazes, labels, strict=True):
        paths = [p[::-1] if from_goal else p for p in shortest_paths(grid)]
        np.testing.assert_array_equal(label, marked(grid, [min(paths, key=choices)]))


def test_long_distances_do_not_wrap() -> None:
    # A corridor that winds through 31 x 31 cells takes more moves than a byte counts.
    side = 31
    grid = np.full((side, side), OPEN, np.uint8)
    grid[1::2] = WALL
    for index, row in enumerate(range(1, side, 2)):
        grid[row, -1 if index % 2 == 0 else 0] = OPEN
    grid[0, 0], grid[-1, 0] = START, GOAL
    tokens = grid.reshape(1, -1)
    moves = int((grid != WALL).sum()) - 1
    assert moves > 255
    assert maze_solver.path_moves(tokens)[0] == moves
    assert maze_solver.num_shortest_paths(tokens)[0] == 1
    assert (maze_solver.canonical_labels(tokens) == PATH).sum() == moves - 1


def test_neighbouring_ends_have_nothing_to_mark() -> None:
    tokens = maze("SG", "..")[None]
    np.testing.assert_array_equal(maze_solver.canonical_labels(tokens), tokens)
    np.testing.assert_array_equal(maze_solver.all_optimal_labels(tokens), tokens)
    assert maze_solver.has_unique_path(tokens)[0]
    assert maze_solver.num_shortest_paths(tokens)[0] == 1


def test_mazes_without_a_way() -> None:
    tokens = np.stack([maze("S..", "...", "..G"), maze("S#.", "##.", "..G")])
    assert maze_solver.path_moves(tokens).tolist() == [4, -1]
    assert maze_solver.num_shortest_paths(tokens).tolist() == [6, 0]
    for labels in (maze_solver.canonical_labels, maze_solver.all_optimal_labels):
        with pytest.raises(UserError, match="maze 1 .* has no path from S to G"):
            labels(tokens)


@pytest.mark.parametrize("rows", [("..", ".G"), ("SS", ".G"), ("S.", "..")])
def test_mazes_need_both_ends_once(rows: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="exactly one"):
        maze_solver.path_moves(maze(*rows)[None])
    with pytest.raises(UserError, match="not square"):
        maze_solver.path_moves(np.full((1, 6), OPEN, np.uint8))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 30))
def test_word_search_agrees_with_distances(seed: int, side: int, steps: int) -> None:
    np_rng = np.random.default_rng(seed)
    is_open = np_rng.random((7, side, side)) < np_rng.uniform(0.4, 1.0)
    is_open[:, 0, 0] |= ~is_open.reshape(7, -1).any(1)
    cells = np.array([np_rng.choice(np.flatnonzero(grid)) for grid in is_open.reshape(7, -1)])
    distance = maze_solver.distances(is_open, cells)
    rooms, start = maze_bits.pack(is_open), maze_bits.single_cells(cells, side)
    np.testing.assert_array_equal(maze_bits.unpack(rooms), is_open)
    np.testing.assert_array_equal(maze_bits.unpack(start), distance == 0)
    reached, farthest, depth = maze_bits.flood(rooms, start)
    np.testing.assert_array_equal(maze_bits.unpack(reached), distance >= 0)
    np.testing.assert_array_equal(depth, distance.max((1, 2)))
    np.testing.assert_array_equal(maze_bits.unpack(farthest), distance == depth[:, None, None])
    far = maze_bits.beyond(reached, start, steps)
    np.testing.assert_array_equal(maze_bits.unpack(far), distance > steps)
    first = maze_bits.unpack(maze_bits.first_cell(farthest)).reshape(7, -1)
    assert (first.sum(1) == 1).all()
    np.testing.assert_array_equal(
        first.argmax(1), maze_bits.unpack(farthest).reshape(7, -1).argmax(1)
    )


def test_rules_are_told_apart() -> None:
    mazes = random_mazes(np.random.default_rng(3), 80, 7)
    for rule in (maze_tiebreak.RULES[0], maze_tiebreak.RULES[17], maze_tiebreak.RULES[40]):
        labels = rule.label_fn(mazes)
        # A walk from G may equal one from S: both follow the same edge of all shortest paths.
        found = maze_tiebreak.find_rule(mazes, labels)
        assert found is not None and (found.label_fn(mazes) == labels).all()
        scores = maze_tiebreak.score_rules(mazes, labels)
        assert len(scores) == 48 and scores[rule] == 1.0 and min(scores.values()) < 0.5
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert maze_tiebreak.find_rule(mazes, maze_solver.canonical_labels(mazes)) == (
        maze_tiebreak.Rule()
    )
    labels[3, np.flatnonzero(labels[3] == OPEN)[0]] = PATH
    assert maze_tiebreak.find_rule(mazes, labels) is None
    assert maze_tiebreak.find_label_fn(mazes, labels) is None
    everything = maze_solver.all_optimal_labels(mazes)
    assert maze_tiebreak.find_label_fn(mazes, everything) is maze_solver.all_optimal_labels
