"""Mazes: builder, rotations, solver and metrics against recorded data.

Data sets are found by their layout: `<name>/csv` holds the source, `<name>/built*` what the
original builder made of it (with augmentation where the name says aug8).
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halting_jax.datasets import aug8, build_maze, maze_solver
from halting_jax.datasets.maze_csv import read_csv
from halting_jax.datasets.maze_files import load_maze
from halting_jax.datasets.maze_tokens import OPEN, PATH
from halting_jax.tasks.maze import finalize, make_maze, maze_batch
from halting_jax.tasks.maze_metrics import cell_metrics, path_flags
from halting_jax.types import Batch, Ratio
from tests.parity.fixtures import fixture_root
from tests.parity.halting_cases import Case, case_name, cases

X64_ATOL = 1e-9
PUZZLES = cases("act_puzzle") + cases("ut_puzzle")
BUILT = sorted(
    path
    for source in (fixture_root() / "halting").glob("*/csv/train.csv")
    for path in source.parent.parent.glob("built*")
)


def built_name(path: Path) -> str:
    return f"{path.parent.name}-{path.name}"


@pytest.fixture(params=BUILT, ids=built_name)
def built(request: pytest.FixtureRequest) -> Path:
    """A directory the original builder made."""
    return request.param


def test_every_kind_of_recording_is_there() -> None:
    assert {"aug8" in path.name for path in BUILT} == {True, False}
    for kind in ("aug8", "maze_examples", "maze_metrics"):
        assert cases(kind), kind
    assert PUZZLES


def test_builder_writes_the_same_bytes(built: Path, tmp_path: Path) -> None:
    with_aug = "aug8" in built.name
    args = [f"--source={built.parent / 'csv'}", f"--output_dir={tmp_path / 'out'}"]
    assert build_maze.main(["build_maze", *args, *(["--aug"] if with_aug else [])]) == 0
    expected = sorted(p.relative_to(built) for p in built.rglob("*") if p.is_file())
    made = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.*"))
    assert set(made) - set(expected) == {Path("recipe.json")}
    for name in expected:
        got, wanted = tmp_path / "out" / name, built / name
        if name.name == "dataset.json" and with_aug and name.parent.name == "train":
            description = json.loads(wanted.read_text())
            description["total_puzzles"] = len(np.load(wanted.parent / "all__inputs.npy"))
            assert got.read_text() == json.dumps(description)
        else:
            assert got.read_bytes() == wanted.read_bytes(), name


def test_loader_reads_what_the_original_built(built: Path) -> None:
    source = read_csv(built.parent / "csv" / "train.csv")
    data = load_maze(built, "train")
    each = len(data.inputs) // len(source.inputs)
    np.testing.assert_array_equal(data.inputs[::each], source.inputs)
    np.testing.assert_array_equal(data.labels[::each], source.labels)
    np.testing.assert_array_equal(data.groups, np.repeat(np.arange(len(source.inputs)), each))
    # No validation split was built.
    assert load_maze(built, "val").source == load_maze(built, "test").source


def test_ratings_are_path_lengths(built: Path) -> None:
    for name in ("train.csv", "test.csv"):
        path = built.parent / "csv" / name
        inputs, labels = read_csv(path)
        ratings = [int(line.rsplit(",", 1)[1]) for line in path.read_text().splitlines()[1:]]
        np.testing.assert_array_equal(maze_solver.path_moves(inputs), ratings)
        np.testing.assert_array_equal((labels == PATH).sum(1), np.array(ratings) - 1)


def test_relabelled_images_stay_canonical(built: Path) -> None:
    inputs = read_csv(built.parent / "csv" / "train.csv").inputs
    moves = maze_solver.path_moves(inputs)
    for images, labels in zip(aug8.transform_all(inputs), aug8.relabel_all(inputs), strict=True):
        np.testing.assert_array_equal(labels, maze_solver.canonical_labels(images))
        valid, optimal = path_flags(images, labels)
        assert valid.all() and optimal.all()
        np.testing.assert_array_equal((labels == PATH).sum(1), moves - 1)


@pytest.mark.parametrize("case", cases("aug8"), ids=case_name)
def test_rotations_and_reflections(case: Case) -> None:
    grid, expected = case.arrays["in/grid"], case.arrays["out/transforms"]
    images = aug8.transform_all(grid.reshape(1, -1))
    np.testing.assert_array_equal(images.reshape(expected.shape), expected)
    np.testing.assert_array_equal(aug8.INVERSE_IDS, case.arrays["out/inverse_id"])


@pytest.mark.parametrize("case", cases("maze_examples"), ids=case_name)
def test_solver(case: Case) -> None:
    inputs, labels = case.arrays["in/inputs"], case.arrays["out/labels"]
    np.testing.assert_array_equal(maze_solver.canonical_labels(inputs), labels)
    np.testing.assert_array_equal(maze_solver.path_moves(inputs), case.arrays["out/path_moves"])
    counts = case.arrays["out/num_shortest_paths"]
    np.testing.assert_array_equal(maze_solver.num_shortest_paths(inputs), counts)
    np.testing.assert_array_equal(maze_solver.has_unique_path(inputs), counts == 1)
    every = maze_solver.all_optimal_labels(inputs)
    assert (every[labels == PATH] == PATH).all()
    np.testing.assert_array_equal((every == labels).all(1), counts == 1)
    if "threshold" in case.meta:
        assert (maze_solver.path_moves(inputs) > case.meta["threshold"]).all()


@pytest.mark.parametrize("case", cases("maze_examples"), ids=case_name)
def test_labels_are_optimal_paths_on_the_device(case: Case) -> None:
    inputs, labels = case.arrays["in/inputs"], case.arrays["out/labels"]
    valid, optimal = path_flags(inputs, labels)
    assert valid.all() and optimal.all()
    broken = labels.copy()
    for row in broken:
        row[np.flatnonzero(row == PATH)[0]] = OPEN
    valid, optimal = path_flags(inputs, broken)
    assert not valid.any() and not optimal.any()


@pytest.mark.parametrize("case", cases("maze_metrics"), ids=case_name)
def test_metrics(case: Case) -> None:
    inputs, labels, guesses = (case.arrays[f"in/{n}"] for n in ("inputs", "labels", "preds"))
    valid, optimal = path_flags(inputs, guesses)
    np.testing.assert_array_equal(valid, case.arrays["out/valid_path"].astype(bool))
    np.testing.assert_array_equal(optimal, case.arrays["out/optimal_path"].astype(bool))
    logits = jax.nn.one_hot(jnp.asarray(guesses, jnp.int32), 6)
    task = make_maze(inputs.shape[1], 6, focus_token=case.meta["focus_token_id"])
    batch = _batch(inputs, labels)
    exact = case.arrays["out/exact"].astype(bool)
    np.testing.assert_array_equal(task.example_correct(logits, batch), exact)
    values = finalize(task.metrics(logits, batch))
    assert values["puz_acc"] == pytest.approx(exact.mean(), abs=X64_ATOL)
    cell_accuracy = case.arrays["out/cell_accuracy"]
    assert values["cell_acc"] == pytest.approx(cell_accuracy.mean(), abs=X64_ATOL)
    for name in ("focus_precision", "focus_recall", "focus_f1"):
        assert values[name] == pytest.approx(float(case.arrays[f"out/{name}"]), abs=X64_ATOL)


@pytest.mark.parametrize("case", PUZZLES, ids=case_name)
@pytest.mark.parametrize("x64", [True, False], ids=["x64", "float32"])
def test_loss_and_metrics_of_recorded_logits(case: Case, x64: bool) -> None:
    with jax.enable_x64(x64):
        logits = jnp.asarray(case.arrays["out/logits"])
        batch = _batch(case.arrays["in/x"], case.arrays["in/y"])
        seq_len, vocab_size = logits.shape[1:]
        task = make_maze(seq_len, vocab_size, focus_token=case.meta["focus_token_id"])
        rows = task.example_loss(logits, batch)
        loss = float(jnp.sum(rows.total) / jnp.sum(rows.count))
        metrics: dict[str, Ratio] = task.metrics(logits, batch)
    relative, absolute = (0.0, X64_ATOL) if x64 else (1e-4, 1e-5)
    expected_loss = float(case.arrays["out/loss_cls"])
    assert loss == pytest.approx(expected_loss, rel=relative, abs=absolute)
    values = finalize(metrics)
    for name in ("puz_acc", "cell_acc", "focus_precision", "focus_recall", "focus_f1"):
        # Recorded in single precision.
        expected = case.arrays[f"metric/{name}"]
        allowed = X64_ATOL if expected.dtype == np.float64 else 1e-7
        assert values[name] == pytest.approx(float(expected), abs=allowed), name


def test_cell_metrics_leave_the_focus_out_on_request() -> None:
    case = cases("maze_metrics")[0]
    guesses, labels = (jnp.asarray(case.arrays[f"in/{n}"]) for n in ("preds", "labels"))
    metrics = cell_metrics(guesses, labels, jnp.ones(labels.shape, bool), None)
    assert set(metrics) == {"puz_acc", "cell_acc"}


def _batch(inputs: np.ndarray, labels: np.ndarray) -> Batch:
    moves = jnp.ones(len(inputs), jnp.int32)
    rows = jnp.arange(len(inputs))
    return maze_batch(jnp.asarray(inputs), jnp.asarray(labels), moves, rows)
