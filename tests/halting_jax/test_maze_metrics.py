"""Path and cell metrics against plain Python, and the task built on them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from halting_jax import losses
from halting_jax.datasets import aug8, maze_solver
from halting_jax.datasets.maze_tokens import GOAL, OPEN, PATH, START, WALL
from halting_jax.tasks import maze as maze_task
from halting_jax.tasks import maze_metrics, single_path
from halting_jax.tasks.factory import make_task
from halting_jax.tasks.maze import make_maze, maze_batch
from halting_jax.types import Batch, Ratio
from tests.halting_jax.maze_cases import around, covers_all, maze, random_mazes, shortest_paths

SIDE = 5


def token_logits(tokens: np.ndarray, vocab_size: int = 6) -> jax.Array:
    """Logits whose largest entry names these tokens."""
    return 9.0 * jax.nn.one_hot(jnp.asarray(tokens, jnp.int32), vocab_size)


def batch_of(inputs: np.ndarray, labels: np.ndarray) -> Batch:
    moves = jnp.ones(len(inputs), jnp.int32)
    rows = jnp.arange(len(inputs))
    return maze_batch(jnp.asarray(inputs), jnp.asarray(labels), moves, rows)


def wander(np_rng: np.random.Generator, grid: np.ndarray) -> np.ndarray:
    """Marks a random walk from S that never visits a cell twice; it may end anywhere."""
    table = grid.reshape(SIDE, SIDE).copy()
    cell = divmod(int(np.flatnonzero(grid == START)[0]), SIDE)
    while True:
        choices = [c for c in around(cell, SIDE) if table[c] in (OPEN, GOAL)]
        if not choices:
            return table.reshape(-1)
        cell = choices[np_rng.integers(len(choices))]
        if table[cell] == GOAL:
            return table.reshape(-1)
        table[cell] = PATH


@functools.cache
def predictions() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and predictions of all kinds: paths of all lengths, blobs, flipped cells."""
    np_rng = np.random.default_rng(7)
    inputs = random_mazes(np_rng, 400, SIDE)
    inputs[:200] = np.where(np_rng.random((200, SIDE * SIDE)) < 0.85, OPEN, inputs[:200])
    for row in inputs[:200]:
        row[np_rng.permutation(SIDE * SIDE)[:2]] = START, GOAL
        row[np.flatnonzero(row == START)[1:]] = OPEN
        row[np.flatnonzero(row == GOAL)[1:]] = OPEN
    inputs = inputs[((inputs == START).sum(1) == 1) & ((inputs == GOAL).sum(1) == 1)]
    guesses = []
    for index, grid in enumerate(inputs):
        kind = index % 4
        if kind == 0:
            guess = wander(np_rng, grid)
        elif kind == 1:
            share = np_rng.uniform(0.3, 0.9)
            is_blob = (np_rng.random(len(grid)) < share) & (grid == OPEN)
            guess = np.where(is_blob, PATH, grid)
        else:
            table = grid.reshape(SIDE, SIDE).copy()
            paths = shortest_paths(grid) or [[]]
            for cell in paths[np_rng.integers(len(paths))][1:-1]:
                table[cell] = PATH
            guess = table.reshape(-1)
            if kind == 3:
                guess[np_rng.integers(len(guess))] = np_rng.integers(0, 6)
        guesses.append(guess)
    return inputs, np.stack(guesses)


def plain_flags(grid: np.ndarray, guess: np.ndarray) -> tuple[bool, bool]:
    """Valid and optimal, by trying all walks."""
    kept = np.where(grid == OPEN, (guess == OPEN) | (guess == PATH), guess == grid).all()
    if not kept:
        return False, False
    ends = [divmod(int(np.flatnonzero(grid == token)[0]), SIDE) for token in (START, GOAL)]
    members = np.isin(guess, (PATH, START, GOAL)).reshape(SIDE, SIDE)
    valid = covers_all(members, *ends)
    moves = maze_solver.path_moves(grid[None])[0]
    return valid, valid and members.sum() - 1 == moves


def test_paths_are_judged_as_by_trying_everything() -> None:
    inputs, guesses = predictions()
    valid, optimal = maze_metrics.path_flags(inputs, guesses)
    expected = np.array([plain_flags(*pair) for pair in zip(inputs, guesses, strict=True)])
    np.testing.assert_array_equal(valid, expected[:, 0])
    np.testing.assert_array_equal(optimal, expected[:, 1])
    longer = expected[:, 0] & ~expected[:, 1]
    assert min(expected[:, 1].sum(), longer.sum(), (~expected[:, 0]).sum()) > 30


# Input, prediction, valid, optimal.
CHOSEN: tuple[tuple[tuple[str, ...], tuple[str, ...], bool, bool], ...] = (
    (("SG", ".."), ("SG", ".."), True, True),
    (("SG", ".."), ("SG", "oo"), True, False),
    (("SG", ".."), ("SG", ".o"), False, False),
    (("S.G", "...", "..."), ("SoG", "...", "..."), True, True),
    (("S.G", "...", "..."), ("S.G", "ooo", "..."), True, False),
    (("S.G", "...", "..."), ("S.G", "o.o", "ooo"), True, False),
    # A detour whose turn touches itself: more neighbours than a path without it has.
    (("S..", "...", "..G"), ("Soo", "ooo", "ooG"), True, False),
    # A separate ring, a branch, a gap, a wall walked through, an end moved.
    (("S.G.", "....", "....", "...."), ("SoG.", "....", "..oo", "..oo"), False, False),
    (("S.G", "...", "..."), ("SoG", ".o.", "..."), False, False),
    (("S.G", "...", "..."), ("S.G", "o.o", "o.o"), False, False),
    (("S#G", "...", "..."), ("SoG", "...", "..."), False, False),
    (("S.G", "...", "..."), ("SGG", "...", "..."), False, False),
    (("S.G", "...", "..."), ("S#G", "ooo", "..."), False, False),
    # No way at all, and inputs that are not mazes.
    (("S#G", ".#.", ".#."), ("S#G", ".#.", ".#."), False, False),
    (("S..", "...", "..."), ("Soo", "...", "..."), False, False),
    (("SS.", "..G", "..."), ("SSo", "..G", "..."), False, False),
)


def test_chosen_cases() -> None:
    def padded(rows: tuple[str, ...]) -> np.ndarray:
        return maze(*(f"{row:#<5}" for row in (*rows, *["#"] * (5 - len(rows)))))

    inputs = np.stack([padded(case[0]) for case in CHOSEN])
    guesses = np.stack([padded(case[1]) for case in CHOSEN])
    valid, optimal = maze_metrics.path_flags(inputs, guesses)
    assert valid.tolist() == [case[2] for case in CHOSEN]
    assert optimal.tolist() == [case[3] for case in CHOSEN]


def test_a_marked_room_needs_guesses() -> None:
    # Whether a snake through every cell exists follows from the colours of a chessboard here.
    side = 6
    inputs = np.full((side, side * side), OPEN, np.uint8)
    inputs[:, 0] = START
    for row, goal in enumerate(range(side * side - side, side * side)):
        inputs[row, goal] = GOAL
    guesses = np.where(inputs == OPEN, PATH, inputs)
    valid, _ = maze_metrics.path_flags(inputs, guesses)
    np.testing.assert_array_equal(valid, [True, False] * 3)


def test_the_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_path, "MAX_ROUNDS", 3)
    is_open = jnp.ones((1, 7, 7), bool)
    start, goal = is_open & False, is_open & False
    start, goal = start.at[0, 0, 0].set(True), goal.at[0, 6, 6].set(True)
    found = single_path.single_path_exists(is_open, start, goal, jnp.ones(1, bool))
    assert not found[0]


def test_distances_on_the_device() -> None:
    mazes = random_mazes(np.random.default_rng(0), 20, 6)
    grids = jnp.asarray(mazes.reshape(20, 6, 6))
    distance = maze_metrics.grid_distances(grids != WALL, grids == GOAL).reshape(20, 36)
    expected = maze_solver.goal_distances(mazes).astype(np.int32)
    np.testing.assert_array_equal(distance, np.where(expected < 0, 36, expected))


def test_a_row_does_not_depend_on_the_others() -> None:
    inputs, guesses = predictions()
    whole = maze_metrics.path_flags(inputs[:128], guesses[:128])
    for row in (0, 17, 41):
        alone = maze_metrics.path_flags(inputs[row : row + 1], guesses[row : row + 1])
        assert [bool(x[0]) for x in alone] == [bool(x[row]) for x in whole]


def test_perfect_predictor_scores_one() -> None:
    inputs = random_mazes(np.random.default_rng(1), 12, SIDE)
    labels = maze_solver.canonical_labels(inputs)
    task, batch = make_maze(25, 6), batch_of(inputs, labels)
    logits = token_logits(labels)
    metrics = task.metrics(logits, batch) | maze_metrics.path_metrics(logits, batch)
    assert set(metrics) == {
        *("puz_acc", "cell_acc", "focus_precision", "focus_recall", "focus_f1"),
        *("valid_path", "optimal_path"),
    }
    for name, value in maze_task.finalize(metrics).items():
        assert value == pytest.approx(1.0, abs=1e-7), name
    assert task.example_correct(logits, batch).all()
    loss = task.example_loss(logits, batch)
    assert loss.total.shape == (12,) and (loss.count == 25).all()
    assert float(loss.total.sum()) < 1.0


def test_sums_of_batches_are_those_of_the_whole() -> None:
    inputs, guesses = predictions()
    labels = np.roll(guesses, 4, axis=0)
    task = make_maze(25, 6)

    def measure(part: slice) -> dict[str, Ratio]:
        batch, logits = batch_of(inputs[part], labels[part]), token_logits(guesses[part])
        return task.metrics(logits, batch) | maze_metrics.path_metrics(logits, batch)

    first, second = measure(slice(0, 128)), measure(slice(128, 256))
    summed = {name: first[name] + second[name] for name in first}
    whole = measure(slice(0, 256))
    assert maze_task.finalize(summed) == maze_task.finalize(whole)
    values = maze_task.finalize(whole)
    said, true = guesses[:256] == PATH, labels[:256] == PATH
    precision, recall = (said & true).sum() / said.sum(), (said & true).sum() / true.sum()
    assert values["focus_precision"] == pytest.approx(precision, rel=1e-7)
    assert values["focus_recall"] == pytest.approx(recall, rel=1e-7)
    f1 = 2 * precision * recall / (precision + recall)
    assert values["focus_f1"] == pytest.approx(f1, rel=1e-7)
    assert float(whole["focus_f1"].value) == pytest.approx(f1, rel=1e-6)
    assert values["cell_acc"] == pytest.approx((guesses[:256] == labels[:256]).mean(), rel=1e-7)


def test_nothing_marked_is_not_nan() -> None:
    inputs = random_mazes(np.random.default_rng(2), 3, SIDE)
    metrics = make_maze(25, 6).metrics(token_logits(inputs), batch_of(inputs, inputs))
    values = maze_task.finalize(metrics)
    assert values["focus_f1"] == values["focus_precision"] == values["focus_recall"] == 0.0
    assert values["puz_acc"] == 1.0


def test_filling_rows_count_in_nothing() -> None:
    inputs = random_mazes(np.random.default_rng(3), 6, SIDE)
    labels = maze_solver.canonical_labels(inputs)
    task = make_maze(25, 6)
    moves = jnp.asarray(maze_solver.path_moves(inputs))
    rows = jnp.array([2, 4, -1, -1])
    batch = maze_batch(jnp.asarray(inputs), jnp.asarray(labels), moves, rows)
    assert batch.input_mask[:2].all() and not batch.target_mask[2:].any()
    logits = token_logits(np.where(np.arange(4)[:, None] < 1, labels[[2, 4, 0, 0]], PATH))
    logits = logits.at[2:].set(jnp.nan)
    metrics = task.metrics(logits, batch) | maze_metrics.path_metrics(logits, batch)
    assert float(metrics["puz_acc"].count) == float(metrics["valid_path"].count) == 2
    assert float(metrics["puz_acc"].total) == float(metrics["optimal_path"].total) == 1
    assert float(metrics["cell_acc"].count) == 50

    def loss(logits: jax.Array) -> jax.Array:
        return jnp.sum(task.example_loss(logits, batch).total)

    value, gradient = jax.value_and_grad(loss)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert not gradient[2:].any() and gradient[:2].any()
    np.testing.assert_array_equal(task.example_correct(logits, batch), [True, False, False, False])


def test_batches_of_turned_mazes() -> None:
    inputs = random_mazes(np.random.default_rng(4), 9, SIDE)
    canonical = maze_solver.canonical_labels(inputs)
    moves = jnp.asarray(maze_solver.path_moves(inputs))
    maps = jnp.asarray(aug8.index_maps(SIDE))
    rows, turns = jnp.array([8, 0, 3, 3, 5, 1, 2, 7]), jnp.arange(8)
    stored = jnp.asarray(inputs), jnp.asarray(aug8.relabel_all(inputs)), moves
    batch = jax.jit(maze_batch)(*stored, rows, turns, maps)
    images = aug8.transform_all(inputs)[np.arange(8), np.asarray(rows)]
    np.testing.assert_array_equal(batch.inputs, images)
    np.testing.assert_array_equal(batch.targets, maze_solver.canonical_labels(images))
    np.testing.assert_array_equal(batch.difficulty, maze_solver.path_moves(images))
    assert batch.inputs.dtype == batch.targets.dtype == batch.difficulty.dtype == jnp.int32
    assert batch.decoder_inputs.shape == (8, 0)
    for labels in (canonical, canonical[None]):
        turned = maze_batch(stored[0], jnp.asarray(labels), moves, rows, turns, maps)
        expected = aug8.transform_all(canonical)[np.arange(8), np.asarray(rows)]
        np.testing.assert_array_equal(turned.targets, expected)
    plain = maze_batch(*stored, rows)
    np.testing.assert_array_equal(plain.inputs, inputs[np.asarray(rows)])
    np.testing.assert_array_equal(plain.targets, canonical[np.asarray(rows)])
    with pytest.raises(ValueError, match="go together"):
        maze_batch(*stored, rows, turns)


def test_copying_the_input() -> None:
    inputs = random_mazes(np.random.default_rng(5), 30, SIDE)
    labels = maze_solver.canonical_labels(inputs)
    values = maze_metrics.copy_input_baseline(inputs, labels)
    assert values["cell_acc"] == pytest.approx((inputs == labels).mean())
    assert values["puz_acc"] == pytest.approx((inputs == labels).all(1).mean())
    assert values["focus_recall"] == 0.0


def test_tasks() -> None:
    task = make_task("maze", seq_len=36, vocab_size=6)
    assert (task.shape.length, task.shape.features, task.shape.classes) == (36, 6, 6)
    assert (task.name, task.sample, task.shape.form) == ("maze", None, "grid")
    assert task.selection_metric == "puz_acc" and task.eval_sets == ("test",)
    sudoku = make_task("sudoku", seq_len=81, vocab_size=11)
    assert sudoku.name == "sudoku"
    tokens = np.random.default_rng(0).integers(1, 11, (3, 81))
    metrics = sudoku.metrics(token_logits(tokens, 11), batch_of(tokens, tokens))
    assert set(metrics) == {"puz_acc", "cell_acc"}
    assert maze_task.finalize(metrics) == {"puz_acc": 1.0, "cell_acc": 1.0}
    with pytest.raises(UserError, match="not square"):
        make_maze(35, 6)
    with pytest.raises(UserError, match="5 token ids, so id 5 .* set task.name=sudoku"):
        make_maze(36, 5)


def test_one_compiled_program_per_shape() -> None:
    inputs = random_mazes(np.random.default_rng(6), 8, 4)
    traces = 0

    @jax.jit
    def measure(logits: jax.Array, batch: Batch) -> dict[str, Ratio]:
        nonlocal traces
        traces += 1
        return maze_metrics.path_metrics(logits, batch)

    for seed in range(3):
        labels = np.roll(maze_solver.canonical_labels(inputs), seed, axis=0)
        measure(token_logits(labels), batch_of(inputs, labels))
    assert traces == 1


def test_loss_is_the_mean_over_all_cells() -> None:
    np_rng = np.random.default_rng(8)
    inputs = random_mazes(np_rng, 5, SIDE)
    batch = batch_of(inputs, maze_solver.canonical_labels(inputs))
    logits = np_rng.normal(size=(5, 25, 6)).astype(np.float32)
    ratio = make_maze(25, 6).example_loss(jnp.asarray(logits), batch)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(probabilities, np.asarray(batch.targets)[..., None], -1)
    np.testing.assert_allclose(ratio.total / ratio.count, -np.log(chosen).mean((1, 2)), rtol=1e-5)
    empty = dataclasses.replace(batch, target_mask=batch.target_mask & False)
    assert not losses.rows_with_targets(empty).any()
