"""The files of a puzzle data set: one directory per split, inputs and labels as token ids.

The same form holds mazes (6 ids) and sudokus (11 ids). Only `all__inputs.npy`, `all__labels.npy`
and two numbers of `dataset.json` are needed; the rest is for programs that expect it.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import log
from common.errors import UserError, require
from common.json_files import read_json_object
from common.rundir import atomic_write_json
from halting_jax.datasets import aug8
from halting_jax.datasets.maze_solver import path_moves, side_of
from halting_jax.datasets.maze_tiebreak import find_label_fn
from halting_jax.datasets.maze_tokens import GOAL, START, VOCAB_SIZE

RECIPE_FILE = "recipe.json"
BUILD_COMMAND = "python -m halting_jax.datasets.build_maze"

# What stands in for a split that is missing.
_INSTEAD = {"train": (), "val": ("test", "train"), "test": ("val", "train")}
_SOLVE_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class MazeData:
    """One split in memory.

    Attributes:
        inputs: uint8 [P, S].
        labels: uint8 [P, S].
        groups: int32 [P], which original puzzle each one comes from.
        difficulty: int32 [P], see `difficulty_of`.
        seq_len: S.
        vocab_size: V; every id is below it.
        side: of the square grid.
        source: the directory of the split that was read.
    """

    inputs: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    difficulty: np.ndarray
    seq_len: int
    vocab_size: int
    side: int
    source: str


def load_maze(directory: str | Path, split: str) -> MazeData:
    """Reads one split; a missing one is replaced by the next best.

    Args:
        directory: holds `train`, `test` and perhaps `val`.
        split: one of them. Without `val` it is `test`, and without both, loudly, `train`.

    Returns:
        The split.

    Raises:
        UserError: names the file that is missing, cut off or contradicts the others.
    """
    root = Path(directory).expanduser()
    require(split in _INSTEAD, f"split must be one of {', '.join(_INSTEAD)}, got {split!r}")
    require(
        root.is_dir(),
        f"{root}: no such data directory; make it with {BUILD_COMMAND} or mend data.dir",
    )
    for name in (split, *_INSTEAD[split]):
        if (root / name).is_dir():
            break
    else:
        raise UserError(
            f"{root} has no directory {split}; it is no puzzle data set, make one with "
            f"{BUILD_COMMAND}"
        )
    if name == "train" != split:
        log.warning(
            "%s HAS NO TEST OR VALIDATION SPLIT: %s numbers are measured on TRAINING mazes",
            root,
            split,
        )
    elif split == "test" != name:
        log.warning("%s has no test split: test numbers are measured on %s", root, name)
    return _read_split(root / name)


def difficulty_of(inputs: np.ndarray, labels: np.ndarray, vocab_size: int) -> np.ndarray:
    """Measures how hard each puzzle is.

    Args:
        inputs: uint8 [P, S].
        labels: uint8 [P, S].
        vocab_size: V.

    Returns:
        int32 [P]: moves of the shortest path; for anything but a maze (and a maze without a way)
        the number of cells to be filled in.
    """
    result = (inputs != labels).sum(1).astype(np.int32)
    is_maze = ((inputs == START).sum(1) == 1) & ((inputs == GOAL).sum(1) == 1)
    mazes = np.flatnonzero(is_maze) if vocab_size == VOCAB_SIZE else np.arange(0)
    for first in range(0, len(mazes), _SOLVE_AT_ONCE):
        part = mazes[first : first + _SOLVE_AT_ONCE]
        moves = path_moves(inputs[part])
        result[part] = np.where(moves > 0, moves, result[part])
    return result


def label_variants(data: MazeData, relabel: bool = True) -> np.ndarray:
    """Makes the labels of all eight transformed inputs, once for a whole run.

    Args:
        data: a split.
        relabel: label each transformed maze anew by the rule that made the labels, instead of
            transforming its label along.

    Returns:
        uint8 [8, P, S]; entry 0 is `data.labels`.

    Raises:
        UserError: if no known rule made the labels.
    """
    if not relabel:
        return aug8.transform_all(data.labels)
    require(
        data.vocab_size == VOCAB_SIZE,
        f"{data.source} holds no mazes, so they cannot be solved again; switch relabelling off",
    )
    label_fn = find_label_fn(data.inputs, data.labels)
    if label_fn is None:
        raise UserError(
            f"{data.source}: no known tie-break made these labels, so transformed mazes cannot be "
            "labelled alike; switch relabelling off or augmentation off"
        )
    return aug8.relabel_all(data.inputs, label_fn)


def write_split(
    directory: Path, inputs: np.ndarray, labels: np.ndarray, vocab_size: int, group_size: int = 1
) -> None:
    """Writes the files of one split.

    Args:
        directory: made here.
        inputs: uint8 [P, S].
        labels: uint8 [P, S].
        vocab_size: V.
        group_size: puzzles per group; 8 after augmentation.
    """
    puzzles, seq_len = inputs.shape
    groups = puzzles // group_size
    directory.mkdir(parents=True)
    arrays: dict[str, np.ndarray] = {
        "inputs": inputs.astype(np.uint8),
        "labels": labels.astype(np.uint8),
        "puzzle_identifiers": np.zeros(puzzles, np.int32),
        "puzzle_indices": np.arange(puzzles + 1, dtype=np.int32),
        "group_indices": np.arange(groups + 1, dtype=np.int32) * np.int32(group_size),
    }
    for name, array in arrays.items():
        np.save(directory / f"all__{name}.npy", array)
    description = {
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "num_puzzle_identifiers": 1,
        "total_groups": groups,
        "mean_puzzle_examples": 1.0,
        "total_puzzles": puzzles,
        "sets": ["all"],
    }
    (directory / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


@contextlib.contextmanager
def new_dataset(directory: str | Path, recipe: dict[str, Any]) -> Iterator[Path]:
    """Gives a temporary directory to write splits into, and puts it in place at the end.

    Other processes see either nothing or the finished data set; if one of them finished the same
    recipe in the meantime, theirs stays.

    Args:
        directory: where the data set shall be; nothing, an empty directory, or a data set that
            is to be replaced.
        recipe: stored with it, see `stored_recipe`.

    Raises:
        UserError: if the directory cannot be written.
    """
    target = Path(directory).expanduser().absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise UserError(f"cannot write beside {target} ({error.strerror})") from error
    try:
        built = temporary / "new"
        built.mkdir()
        yield built
        (built / "identifiers.json").write_text(json.dumps(["<blank>"]), encoding="utf-8")
        atomic_write_json(built / RECIPE_FILE, recipe)
        found = stored_recipe(target)
        if found == _as_stored(recipe):
            return
        if found is not None:
            os.rename(target, temporary / "old")
        try:
            os.rename(built, target)
        except OSError as error:
            others = (
                stored_recipe(target) if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else None
            )
            if others != _as_stored(recipe):
                raise UserError(
                    f"cannot move the data set to {target} ({error.strerror})"
                ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stored_recipe(directory: str | Path) -> dict[str, Any] | None:
    """Returns the recipe of a data set written by `new_dataset`, None where there is none."""
    try:
        return json.loads((Path(directory).expanduser() / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def already_built(directory: str | Path, recipe: dict[str, Any], replace: bool = False) -> bool:
    """Tells whether a directory holds the data set of this recipe.

    Args:
        directory: where it shall be.
        recipe: what shall be there.
        replace: whether a data set of another recipe may be replaced.

    Returns:
        True if it is there, False if it may be written.

    Raises:
        UserError: if something else is there.
    """
    target = Path(directory).expanduser()
    wanted, found = _as_stored(recipe), stored_recipe(target)
    if found == wanted:
        return True
    if found is not None:
        names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        differences = ", ".join(
            f"{n} {found.get(n)!r} there, {wanted.get(n)!r} asked" for n in names
        )
        require(
            replace,
            f"{target} holds another data set ({differences}); choose another directory, or "
            "replace it with --overwrite",
        )
    elif target.exists():
        require(
            target.is_dir() and not any(target.iterdir()),
            f"{target} exists and was not made by this builder; choose another directory or "
            "delete it",
        )
    return False


def _as_stored(recipe: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(recipe))


def _read_split(directory: Path) -> MazeData:
    cure = f"build the data set again with {BUILD_COMMAND}"
    path = directory / "dataset.json"
    description = read_json_object(path, cure, {"seq_len": int, "vocab_size": int})
    seq_len, vocab_size = description["seq_len"], description["vocab_size"]
    require(seq_len > 0, f"{path}: seq_len must be positive, got {seq_len}; {cure}")
    require(
        1 <= vocab_size <= 256, f"{path}: vocab_size must be 1 to 256, got {vocab_size}; {cure}"
    )
    inputs, labels = (
        _read_tokens(directory / f"all__{name}.npy", seq_len, vocab_size, cure)
        for name in ("inputs", "labels")
    )
    require(
        inputs.shape == labels.shape,
        f"{directory}: all__inputs.npy has {len(inputs)} puzzles but all__labels.npy "
        f"{len(labels)}; {cure}",
    )
    require(len(inputs) > 0, f"{directory} holds no puzzles; {cure}")
    return MazeData(
        inputs=inputs,
        labels=labels,
        groups=_read_groups(directory / "all__group_indices.npy", len(inputs), cure),
        difficulty=difficulty_of(inputs, labels, vocab_size),
        seq_len=seq_len,
        vocab_size=vocab_size,
        side=side_of(seq_len),
        source=str(directory),
    )


def _read_tokens(path: Path, seq_len: int, vocab_size: int, cure: str) -> np.ndarray:
    array = _read_array(path, cure)
    require(
        array.ndim == 2 and np.issubdtype(array.dtype, np.integer),
        f"{path} must hold integers [puzzles, cells], got {array.dtype} {list(array.shape)}; "
        f"{cure}",
    )
    require(
        array.shape[1] == seq_len,
        f"{path} has {array.shape[1]} cells per puzzle but dataset.json says seq_len {seq_len}; "
        f"{cure}",
    )
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise UserError(
            f"{path} holds ids {array.min()} to {array.max()} but dataset.json says vocab_size "
            f"{vocab_size}; {cure}"
        )
    return array.astype(np.uint8)


def _read_groups(path: Path, puzzles: int, cure: str) -> np.ndarray:
    if not path.exists():
        return np.arange(puzzles, dtype=np.int32)
    bounds = _read_array(path, cure)
    is_good = (
        bounds.ndim == 1
        and np.issubdtype(bounds.dtype, np.integer)
        and len(bounds) > 1
        and bounds[0] == 0
        and bounds[-1] == puzzles
        and bool((np.diff(bounds) > 0).all())
    )
    require(is_good, f"{path} does not divide {puzzles} puzzles into groups; delete it or {cure}")
    return np.repeat(np.arange(len(bounds) - 1, dtype=np.int32), np.diff(bounds))


def _read_array(path: Path, cure: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {cure}") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); {cure}") from None
    require(isinstance(array, np.ndarray), f"{path} is not a single array; {cure}")
    return array
