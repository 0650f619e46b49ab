"""The files of a data set: what is read, what stands in, and how damage is reported."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from halting_jax.datasets import aug8, maze_files, maze_solver
from halting_jax.datasets.maze_files import MazeData, label_variants, load_maze, new_dataset
from halting_jax.datasets.maze_tokens import PATH
from tests.halting_jax.maze_cases import random_mazes


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A data set with all three splits, the training mazes in groups of four."""
    with new_dataset(tmp_path / "set", {"kind": "test"}) as root:
        for seed, (split, count) in enumerate({"train": 8, "val": 3, "test": 5}.items()):
            inputs = random_mazes(np.random.default_rng(seed), count, 5)
            labels = maze_solver.canonical_labels(inputs)
            maze_files.write_split(root / split, inputs, labels, 6, 4 if split == "train" else 1)
    return tmp_path / "set"


def edit(directory: Path, **changes: object) -> None:
    path = directory / "dataset.json"
    description = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in description.items() if v is not None}))


def test_round_trip(dataset: Path) -> None:
    data = load_maze(dataset, "train")
    expected = random_mazes(np.random.default_rng(0), 8, 5)
    np.testing.assert_array_equal(data.inputs, expected)
    np.testing.assert_array_equal(data.labels, maze_solver.canonical_labels(expected))
    np.testing.assert_array_equal(data.difficulty, maze_solver.path_moves(expected))
    np.testing.assert_array_equal(data.groups, [0] * 4 + [1] * 4)
    assert (data.seq_len, data.vocab_size, data.side) == (25, 6, 5)
    assert data.inputs.dtype == data.labels.dtype == np.uint8
    assert data.groups.dtype == data.difficulty.dtype == np.int32
    assert data.source == str(dataset / "train")
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.side = 3  # type: ignore[misc]


def test_only_two_arrays_and_two_numbers_are_needed(dataset: Path) -> None:
    train = dataset / "train"
    whole = load_maze(dataset, "train")
    edit(train, total_puzzles=3, total_groups=1, sets=None, pad_id=None)
    for path in train.glob("*.npy"):
        if path.stem not in ("all__inputs", "all__labels"):
            path.unlink()
    (dataset / "identifiers.json").unlink()
    data = load_maze(dataset, "train")
    np.testing.assert_array_equal(data.inputs, whole.inputs)
    np.testing.assert_array_equal(data.groups, np.arange(8))


def test_wider_integers_are_read(dataset: Path) -> None:
    path = dataset / "train" / "all__inputs.npy"
    expected = load_maze(dataset, "train").inputs
    np.save(path, expected.astype(np.int64))
    data = load_maze(dataset, "train")
    assert data.inputs.dtype == np.uint8
    np.testing.assert_array_equal(data.inputs, expected)


def test_what_stands_in_for_a_missing_split(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(load_maze(dataset, "val").inputs) == 3
    shutil.rmtree(dataset / "val")
    assert len(load_maze(dataset, "val").inputs) == 5
    assert capsys.readouterr().err == ""
    shutil.rmtree(dataset / "test")
    for split in ("val", "test"):
        assert len(load_maze(dataset, split).inputs) == 8
        message = capsys.readouterr().err
        assert message.startswith("warning: ") and "TRAINING mazes" in message
    with pytest.raises(UserError, match="split must be one of"):
        load_maze(dataset, "all")


def test_test_split_may_be_replaced_by_validation(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(dataset / "test")
    assert len(load_maze(dataset, "test").inputs) == 3
    assert "no test split: test numbers are measured on val" in capsys.readouterr().err


def test_sudoku_files(tmp_path: Path) -> None:
    np_rng = np.random.default_rng(0)
    labels = np_rng.integers(2, 11, (4, 81), dtype=np.uint8)
    inputs = np.where(np_rng.random((4, 81)) < 0.6, 1, labels).astype(np.uint8)
    maze_files.write_split(tmp_path / "train", inputs, labels, 11)
    data = load_maze(tmp_path, "train")
    assert (data.seq_len, data.vocab_size, data.side) == (81, 11, 9)
    np.testing.assert_array_equal(data.difficulty, (inputs != labels).sum(1))
    with pytest.raises(UserError, match="holds no mazes"):
        label_variants(data)
    np.testing.assert_array_equal(label_variants(data, relabel=False), aug8.transform_all(labels))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _not_square(directory: Path) -> None:
    edit(directory, seq_len=24)
    for name in ("inputs", "labels"):
        np.save(directory / f"all__{name}.npy", np.ones((8, 24), np.uint8))


DAMAGE = {
    "missing inputs": (
        lambda d: (d / "all__inputs.npy").unlink(),
        r"all__inputs.npy: no such file; build",
    ),
    "missing labels": (
        lambda d: (d / "all__labels.npy").unlink(),
        r"all__labels.npy: no such file; build",
    ),
    "cut labels": (lambda d: _cut(d / "all__labels.npy"), r"all__labels.npy is damaged or cut off"),
    "empty file": (
        lambda d: (d / "all__inputs.npy").write_bytes(b""),
        r"all__inputs.npy is damaged or cut off",
    ),
    "not an array": (
        lambda d: (d / "all__inputs.npy").write_text("hello, world"),
        r"all__inputs.npy is damaged or cut off",
    ),
    "pickled": (
        lambda d: np.save(d / "all__inputs.npy", np.array([{}]), allow_pickle=True),
        r"all__inputs.npy is damaged",
    ),
    "floats": (
        lambda d: np.save(d / "all__inputs.npy", np.ones((8, 25))),
        r"must hold integers \[puzzles, cells\], got float64 \[8, 25\]",
    ),
    "three axes": (
        lambda d: np.save(d / "all__inputs.npy", np.ones((8, 5, 5), int)),
        r"must hold integers \[puzzles, cells\], got int64 \[8, 5, 5\]",
    ),
    "seq_len": (lambda d: edit(d, seq_len=36), r"25 cells per puzzle but .* seq_len 36"),
    "vocab_size": (lambda d: edit(d, vocab_size=4), r"ids 1 to 4 but .* vocab_size 4"),
    "negative": (
        lambda d: np.save(d / "all__labels.npy", np.full((8, 25), -1)),
        r"all__labels.npy holds ids -1 to -1",
    ),
    "big ids": (
        lambda d: np.save(d / "all__labels.npy", np.full((8, 25), 258)),
        r"all__labels.npy holds ids 258 to 258",
    ),
    "shapes": (
        lambda d: np.save(d / "all__labels.npy", np.ones((7, 25), np.uint8)),
        r"inputs.npy has 8 puzzles but all__labels.npy 7",
    ),
    "no puzzles": (
        lambda d: [
            np.save(d / f"all__{n}.npy", np.ones((0, 25), np.uint8)) for n in ("inputs", "labels")
        ],
        r"holds no puzzles",
    ),
    "groups": (
        lambda d: np.save(d / "all__group_indices.npy", np.arange(4)),
        r"all__group_indices.npy does not divide 8 puzzles",
    ),
    "no description": (
        lambda d: (d / "dataset.json").unlink(),
        r"dataset.json: no such file",
    ),
    "cut description": (lambda d: _cut(d / "dataset.json"), r"dataset.json is damaged: not valid"),
    "list": (lambda d: (d / "dataset.json").write_text("[3]"), r"dataset.json is damaged: a list"),
    "no seq_len": (lambda d: edit(d, seq_len=None), r"dataset.json is damaged: .*'seq_len'"),
    "text": (lambda d: edit(d, vocab_size="six"), r"dataset.json.*'vocab_size' is a text"),
    "huge": (lambda d: edit(d, vocab_size=1000), r"vocab_size must be 1 to 256, got 1000"),
    "not square": (
        _not_square,
        r"24 cells is not square",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_that_names_the_file(kind: str, dataset: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(dataset / "train")
    with pytest.raises(UserError, match=message) as caught:
        load_maze(dataset, "train")
    assert "\n" not in str(caught.value)
    assert len(load_maze(dataset, "test").inputs) == 5


def test_no_data_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data directory; make it with python -m"):
        load_maze(tmp_path / "none", "train")
    with pytest.raises(UserError, match="has no directory train"):
        load_maze(tmp_path, "train")


def test_label_variants_follow_the_rule_of_the_labels(dataset: Path) -> None:
    data = load_maze(dataset, "train")
    variants = label_variants(data)
    assert variants.shape == (8, 8, 25) and variants.dtype == np.uint8
    np.testing.assert_array_equal(variants[0], data.labels)
    for images, labels in zip(aug8.transform_all(data.inputs), variants, strict=True):
        np.testing.assert_array_equal(labels, maze_solver.canonical_labels(images))
    every = dataclasses.replace(data, labels=maze_solver.all_optimal_labels(data.inputs))
    np.testing.assert_array_equal(label_variants(every), aug8.transform_all(every.labels))


def test_labels_of_no_known_rule(dataset: Path) -> None:
    data = load_maze(dataset, "train")
    labels = data.labels.copy()
    labels[labels == PATH] = 2
    odd = dataclasses.replace(data, labels=labels)
    with pytest.raises(UserError, match="no known tie-break made these labels"):
        label_variants(odd)
    np.testing.assert_array_equal(label_variants(odd, relabel=False), aug8.transform_all(labels))


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_dataset(tmp_path / "set", {}) as root:
        (root / "half").mkdir()
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_builders_wins(tmp_path: Path) -> None:
    with new_dataset(tmp_path / "set", {"seed": 1}) as slow:
        (slow / "slow").touch()
        with new_dataset(tmp_path / "set", {"seed": 1}) as fast:
            (fast / "fast").touch()
    assert (tmp_path / "set" / "fast").exists() and not (tmp_path / "set" / "slow").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "set"
    assert not maze_files.already_built(target, {"seed": 1})
    target.mkdir()
    assert not maze_files.already_built(target, {"seed": 1})
    with new_dataset(target, {"seed": 1, "share": (1, 2)}):
        pass
    assert maze_files.already_built(target, {"seed": 1, "share": (1, 2)})
    message = "another data set .seed 1 there, 2 asked.; choose .* --overwrite"
    with pytest.raises(UserError, match=message):
        maze_files.already_built(target, {"seed": 2, "share": (1, 2)})
    assert not maze_files.already_built(target, {"seed": 2}, replace=True)
    with new_dataset(target, {"seed": 2}):
        pass
    assert maze_files.stored_recipe(target) == {"seed": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(UserError, match="was not made by this builder"):
        maze_files.already_built(tmp_path / "home", {"seed": 1}, replace=True)


def test_arrays_of_a_split_compare_by_identity(dataset: Path) -> None:
    data = load_maze(dataset, "train")
    assert isinstance(data, MazeData) and data != load_maze(dataset, "train")
