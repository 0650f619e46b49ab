"""The builder's command: sources, options, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from halting_jax.datasets import aug8, build_maze, maze_solver
from halting_jax.datasets.build_maze import Recipe, ensure_generated
from halting_jax.datasets.maze_csv import read_csv, write_csv
from halting_jax.datasets.maze_files import load_maze, stored_recipe
from halting_jax.datasets.maze_tokens import OPEN, PATH
from tests.halting_jax.maze_cases import random_mazes

GENERATE = ("--generate", "--side=6", "--train_size=12", "--test_size=4")


def build(*args: object) -> int:
    return build_maze.main(["build_maze", *(str(arg) for arg in args)])


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """CSV files with 20 training and 6 test mazes."""
    directory = tmp_path / "csv"
    directory.mkdir()
    for seed, (split, count) in enumerate({"train": 20, "test": 6}.items()):
        inputs = random_mazes(np.random.default_rng(seed), count, 6)
        labels = maze_solver.canonical_labels(inputs)
        write_csv(directory / f"{split}.csv", "toy", inputs, labels, maze_solver.path_moves(inputs))
    return directory


def test_csv_round_trip(source: Path) -> None:
    inputs, labels = read_csv(source / "train.csv")
    np.testing.assert_array_equal(inputs, random_mazes(np.random.default_rng(0), 20, 6))
    np.testing.assert_array_equal(labels, maze_solver.canonical_labels(inputs))
    lines = (source / "train.csv").read_text().splitlines()
    assert lines[0] == "source,question,answer,rating"
    ratings = [int(line.rsplit(",", 1)[1]) for line in lines[1:]]
    assert ratings == maze_solver.path_moves(inputs).tolist()


def test_csv_from_other_programs(source: Path) -> None:
    path = source / "train.csv"
    expected = read_csv(path)
    rows = [line.split(",") for line in path.read_text().splitlines()]
    quoted = [",".join(f'"{row[k]}"' for k in (3, 2, 0, 1)) for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(quoted).encode() + b"\r\n\r\n")
    for got, wanted in zip(read_csv(path), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_names_of_the_original_flags(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ("--source-repo", source, "--output-dir", out, "--subsample-size", 8, "--aug")
    assert build(*args, "--val-ratio", 0.25, "--seed", 3) == 0
    train, val, test = (load_maze(out, split) for split in ("train", "val", "test"))
    assert (len(train.inputs), len(val.inputs), len(test.inputs)) == (48, 2, 6)
    np.testing.assert_array_equal(train.groups, np.repeat(np.arange(6), 8))
    originals = train.inputs[::8]
    known = {row.tobytes() for row in read_csv(source / "train.csv").inputs}
    chosen = [row.tobytes() for row in np.concatenate([originals, val.inputs])]
    assert len(set(chosen)) == 8 and set(chosen) <= known
    # Without a known rule the labels are turned along.
    for name in ("inputs", "labels"):
        images = aug8.transform_all(getattr(train, name)[::8]).swapaxes(0, 1).reshape(-1, 36)
        np.testing.assert_array_equal(getattr(train, name), images)
    description = json.loads((out / "train" / "dataset.json").read_text())
    assert (description["total_puzzles"], description["total_groups"]) == (48, 6)


def test_the_seed_chooses(source: Path, tmp_path: Path) -> None:
    rows = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(f"--source={source}", f"--output_dir={tmp_path / name}", f"--seed={seed}",
              "--subsample_size=10", "--val_ratio=0.3")  # fmt: skip
        rows[name] = load_maze(tmp_path / name, "train").inputs
    np.testing.assert_array_equal(rows["a"], rows["b"])
    assert rows["a"].shape == rows["c"].shape == (7, 36)
    assert (rows["a"] != rows["c"]).any()
    build(f"--source={source}", f"--output_dir={tmp_path / 'all'}", "--subsample_size=99")
    assert len(load_maze(tmp_path / "all", "train").inputs) == 20


def test_relabelling_where_the_rule_is_known(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(f"--source={source}", f"--output_dir={tmp_path / 'a'}", "--aug", "--infer_tiebreak")
    printed = capsys.readouterr().out
    assert "100.00%  from S: up, left, down, right" in printed
    assert printed.count("from S") == printed.count("from G") == 24
    train = load_maze(tmp_path / "a", "train")
    np.testing.assert_array_equal(train.labels, maze_solver.canonical_labels(train.inputs))
    build(f"--source={source}", f"--output_dir={tmp_path / 'b'}", "--aug", "--aug_relabel")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    args = (f"--source={source}", f"--output_dir={tmp_path / 'c'}", "--aug", "--infer_tiebreak")
    build(*args, "--noaug_relabel")
    turned = load_maze(tmp_path / "c", "train")
    np.testing.assert_array_equal(turned.inputs, train.inputs)
    assert (turned.labels != train.labels).any()


def test_relabelling_where_no_rule_fits(source: Path, tmp_path: Path) -> None:
    inputs, labels = read_csv(source / "train.csv")
    labels[0, np.flatnonzero(labels[0] == OPEN)[0]] = PATH
    write_csv(source / "train.csv", "odd", inputs, labels, np.ones(20, int))
    args = (f"--source={source}", f"--output_dir={tmp_path / 'out'}", "--aug")
    with pytest.raises(UserError, match="no tie-break reproduces all labels.*--noaug_relabel"):
        build(*args, "--aug_relabel")
    assert not (tmp_path / "out").exists()
    build(*args, "--infer_tiebreak")
    np.testing.assert_array_equal(load_maze(tmp_path / "out", "train").labels[::8], labels)


def test_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    build(*GENERATE, f"--output_dir={out}", "--aug", "--val_ratio=0.25")
    assert "built; train 72 (copying the input gets 0." in capsys.readouterr().out
    train = load_maze(out, "train")
    assert len(train.inputs) == 72 and (train.difficulty > 6).all()
    np.testing.assert_array_equal(train.labels, maze_solver.canonical_labels(train.inputs))
    assert len(load_maze(out, "val").inputs) == 3
    # The mazes can be read again as a source.
    again = tmp_path / "again"
    build(f"--source={out / 'csv'}", f"--output_dir={again}", "--aug", "--infer_tiebreak")
    for name in ("inputs", "labels"):
        np.testing.assert_array_equal(
            getattr(load_maze(again, "train"), name), getattr(train, name)
        )


def test_options_of_the_generator(tmp_path: Path) -> None:
    args = ("--style=perfect", "--tree=wilson", "--loops=1", "--labels=unique", "--seed=4")
    build(*GENERATE, *args, "--min_path_moves=3", "--nowrite_csv", f"--output_dir={tmp_path / 'x'}")
    assert not (tmp_path / "x" / "csv").exists()
    test = load_maze(tmp_path / "x", "test")
    assert maze_solver.has_unique_path(test.inputs).all() and (test.difficulty > 3).all()
    recipe = stored_recipe(tmp_path / "x")
    assert recipe is not None
    assert (recipe["seed"], recipe["loops"], recipe["tree"]) == (4, 1, "wilson")


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    build(*GENERATE, f"--output_dir={out}")
    before = contents(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    build(*GENERATE, f"--output_dir={out}")
    assert "kept, it is there already" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(UserError, match="seed 0 there, 1 asked.*--overwrite"):
        build(*GENERATE, f"--output_dir={out}", "--seed=1")
    assert contents(out) == before
    build(*GENERATE, f"--output_dir={out}", "--seed=1", "--overwrite")
    after = contents(out)
    assert after["train/all__inputs.npy"] != before["train/all__inputs.npy"]
    build(*GENERATE, f"--output_dir={tmp_path / 'other'}", "--seed=1")
    assert contents(tmp_path / "other") == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_the_way_of_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(side=6, min_path_moves=6, train_size=9, val_size=3, test_size=4, seed=2)
    path = ensure_generated(tmp_path / "sets", recipe)
    assert "generating 9 training, 3 validation, 4 test mazes in" in capsys.readouterr().err
    assert [len(load_maze(path, s).inputs) for s in ("train", "val", "test")] == [9, 3, 4]
    before = contents(path)
    assert ensure_generated(tmp_path / "sets", recipe) == path
    assert "is there already" in capsys.readouterr().err
    assert contents(path) == before
    other = ensure_generated(tmp_path / "sets", Recipe(side=6, min_path_moves=6, train_size=9))
    assert other != path and contents(path) == before
    # A directory of this name that holds something else is not touched.
    (path / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match="holds another data set"):
        ensure_generated(tmp_path / "sets", recipe)


def _lines(path: Path, change: object) -> None:
    lines = path.read_text().splitlines()
    assert callable(change)
    path.write_text("\n".join(change(lines)) + "\n")


BAD_CSV = {
    "missing column": (
        lambda ls: [line.rsplit(",", 2)[0] for line in ls],
        r"train.csv:1: no column answer, rating; the first line must be source,question",
    ),
    "no header": (lambda ls: ls[1:], r"train.csv:1: no column"),
    "length": (
        lambda ls: [*ls[:3], ls[3].replace(",", ",#", 1), *ls[4:]],
        r"train.csv:4: question: a grid of 37 cells is not square",
    ),
    "answer length": (
        lambda ls: [*ls[:3], f"toy,{ls[3].split(',')[1]},oooo,7", *ls[4:]],
        r"train.csv:4: answer has 4 characters, others have 36",
    ),
    "character": (
        lambda ls: [*ls[:5], ls[5].replace("S", "x"), *ls[6:]],
        r"train.csv:6: question: unknown character 'x' at position \d+",
    ),
    "too few columns": (lambda ls: [*ls[:2], "toy"], r"train.csv:3: question is missing"),
    "open quote": (lambda ls: [*ls, '"toy'], r"train.csv:\d+: not CSV"),
    "empty": (lambda ls: ls[:1], r"train.csv has no mazes"),
    "nothing": (lambda ls: [""], r"train.csv:1: no column"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_bad_csv_is_one_line(kind: str, source: Path, tmp_path: Path) -> None:
    change, message = BAD_CSV[kind]
    _lines(source / "train.csv", change)
    with pytest.raises(UserError, match=message) as caught:
        build(f"--source={source}", f"--output_dir={tmp_path / 'out'}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_sources_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    out = f"--output_dir={tmp_path / 'out'}"
    with pytest.raises(UserError, match="not a local directory; nothing is downloaded"):
        build("--source=someone/maze-30x30-hard-1k", out)
    (source / "test.csv").write_bytes(b"source,question\xff")
    with pytest.raises(UserError, match="test.csv is not UTF-8"):
        build(f"--source={source}", out)
    (source / "test.csv").write_text("source,question,answer,rating\ntoy,S  G,SooG,2\n")
    with pytest.raises(UserError, match="36 cells per maze but test.csv 4"):
        build(f"--source={source}", out)
    (source / "test.csv").unlink()
    with pytest.raises(UserError, match="test.csv: no such file; --source must be"):
        build(f"--source={source}", out)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give either --source=DIRECTORY"),
        (("--generate", "--source=x"), "give either --source=DIRECTORY"),
        (("--generate", "--subsample_size=3"), "--subsample_size cannot be used with --generate"),
        (("--source=x", "--side=9", "--loops=0"), "--side, --loops cannot be used with --source"),
        (("--generate", "--aug_relabel"), "add --aug"),
        (("--generate", "--sides=9"), "Unknown command line flag 'sides'.*--help"),
        (("--generate", "--side=nine"), "flag --side=nine"),
        (("--generate", "--style=cave"), "random_walls"),
        (("--generate", "--val_ratio=2"), "val_ratio"),
        (("--generate", "maze"), "unexpected argument"),
        ((*GENERATE, "--min_path_moves=400"), "no maze of side 6"),
        (("--generate", "--train_size=1", "--val_ratio=0.5"), "leaves none for training"),
    ],
)
def test_bad_options(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(*args, f"--output_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert build("--help") == 0
    printed = capsys.readouterr().out
    assert "From the generator:" in printed and "--[no]infer_tiebreak" in printed


def test_exit_status_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "halting_jax.datasets.build_maze"]
    bad = subprocess.run([*command, "--source=nowhere"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: nowhere is not a local directory")
    assert bad.stderr.count("\n") == 1
    args = [*GENERATE, f"--output_dir={tmp_path / 'out'}"]
    good = subprocess.run([*command, *args], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("\n") == 1 and "built" in good.stdout
