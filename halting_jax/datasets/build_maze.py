"""Builds a maze data set from CSV files or from the generator.

From local files (a directory with train.csv and test.csv):
  python -m halting_jax.datasets.build_maze --source=maze-30x30-hard-1k \\
      --output_dir=data/maze-30x30-hard-1k-aug8 --subsample_size=1000 --aug
From the generator:
  python -m halting_jax.datasets.build_maze --generate --side=30 --train_size=1000 \\
      --test_size=1000 --output_dir=data/maze-30x30-generated

An existing data set of the same recipe is kept; one of another recipe is never replaced without
--overwrite. Names may be written with hyphens.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from absl import flags

from common.errors import UserError, require
from halting_jax.datasets import aug8, maze_files, maze_tiebreak
from halting_jax.datasets.maze_csv import CsvMazes, read_csv, write_csv
from halting_jax.datasets.maze_generator import STYLES, Mazes, Recipe, generate
from halting_jax.datasets.maze_layouts import TREES
from halting_jax.datasets.maze_solver import LABEL_POLICIES, labels_of
from halting_jax.datasets.maze_tokens import VOCAB_SIZE

EXIT_USER_ERROR = 2

_GENERATOR_FLAGS = (
    *("style", "side", "min_path_moves", "train_size", "test_size", "labels", "tree", "loops"),
    *("processes", "write_csv"),
)
_FILE_FLAGS = ("subsample_size", "infer_tiebreak")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the options of the builder."""
    at: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("source", "", "directory with train.csv and test.csv", **at)
    flags.DEFINE_alias("source_repo", "source", **at)
    flags.DEFINE_boolean("generate", False, "make mazes instead of reading them", **at)
    flags.DEFINE_string("output_dir", "data/maze-30x30-hard-1k", "where the data set goes", **at)
    flags.DEFINE_integer(
        "subsample_size", None, "training mazes to keep, drawn at random", lower_bound=1, **at
    )
    flags.DEFINE_boolean("aug", False, "store 8 rotations and reflections for training", **at)
    flags.DEFINE_boolean(
        "aug_relabel",
        None,
        "label augmented mazes anew instead of turning their labels along (default: where the rule "
        "is known, that is with --generate or a successful --infer_tiebreak)",
        **at,
    )
    flags.DEFINE_float(
        "val_ratio",
        0.0,
        "share of the training mazes for validation",
        lower_bound=0.0,
        upper_bound=0.99,
        **at,
    )
    flags.DEFINE_integer("seed", 0, "of everything random", lower_bound=0, **at)
    flags.DEFINE_boolean("infer_tiebreak", False, "report which rule made the labels", **at)
    flags.DEFINE_boolean("overwrite", False, "replace a data set of another recipe", **at)
    flags.DEFINE_enum("style", "random_walls", STYLES, "kind of maze", **at)
    flags.DEFINE_integer("side", 30, "cells per side", **at)
    flags.DEFINE_integer(
        "min_path_moves", None, "paths take more moves (default 110 at side 30, else side)", **at
    )
    flags.DEFINE_integer("train_size", 1000, "mazes for training (and validation)", **at)
    flags.DEFINE_integer("test_size", 1000, "mazes for testing", **at)
    flags.DEFINE_enum("labels", "canonical", LABEL_POLICIES, "which path is marked", **at)
    flags.DEFINE_enum("tree", "depth_first", TREES, "spanning tree of style perfect", **at)
    flags.DEFINE_integer("loops", 0, "extra openings of style perfect", **at)
    flags.DEFINE_integer("processes", 1, "worker processes", lower_bound=1, **at)
    flags.DEFINE_boolean("write_csv", True, "also write the mazes as csv/SPLIT.csv", **at)


def main(argv: Sequence[str]) -> int:
    """Runs the builder.

    Args:
        argv: program name and options.

    Returns:
        Exit status 0.

    Raises:
        UserError: for bad options or files.
    """
    options = _parse(argv)
    if options is None:
        return 0
    _check_combination(options)
    if options.generate:
        recipe = _recipe_of(options)
        built = build_generated(
            options.output_dir,
            recipe,
            aug=options.aug,
            aug_relabel=options.aug_relabel is not False,
            csv=options.write_csv,
            processes=options.processes,
            progress=sys.stderr.isatty(),
            overwrite=options.overwrite,
        )
    else:
        built = build_from_csv(
            options.output_dir,
            Path(options.source).expanduser(),
            subsample_size=options.subsample_size,
            aug=options.aug,
            aug_relabel=options.aug_relabel,
            val_ratio=options.val_ratio,
            seed=options.seed,
            infer_tiebreak=options.infer_tiebreak,
            overwrite=options.overwrite,
        )
    print(_summary(options.output_dir, built))
    return 0


def build_generated(
    directory: str | Path,
    recipe: Recipe,
    aug: bool = False,
    aug_relabel: bool = True,
    csv: bool = False,
    processes: int = 1,
    progress: bool = False,
    overwrite: bool = False,
) -> bool:
    """Generates a data set, unless it is there.

    Args:
        directory: where it goes.
        recipe: what to make.
        aug: store the training mazes in all eight orientations.
        aug_relabel: label them anew.
        csv: also write `csv/<split>.csv`, without augmentation; only when it is built now.
        processes: worker processes.
        progress: draw a progress bar.
        overwrite: replace a data set of another recipe.

    Returns:
        Whether it was built now.

    Raises:
        UserError: for a bad recipe, or if something else is in the directory.
    """
    recipe.validate()
    stored: dict[str, Any] = {"source": "generator", **dataclasses.asdict(recipe)}
    stored |= {"aug": aug, "aug_relabel": aug and aug_relabel}
    if maze_files.already_built(directory, stored, overwrite):
        return False
    made = generate(recipe, processes, progress)
    splits = {name: CsvMazes(mazes.inputs, mazes.labels) for name, mazes in made.items()}

    def label_fn(tokens: np.ndarray) -> np.ndarray:
        return labels_of(tokens, recipe.labels)

    with maze_files.new_dataset(directory, stored) as root:
        _write_splits(root, splits, aug, label_fn if aug_relabel else None)
        if csv:
            _write_all_csv(root / "csv", recipe.style, made)
    return True


def ensure_generated(
    directory: str | Path, recipe: Recipe, processes: int = 1, progress: bool = False
) -> Path:
    """Makes sure that a generated data set is there; the trainer's way in.

    Args:
        directory: holds generated data sets, one directory per recipe.
        recipe: what it holds.
        processes: worker processes.
        progress: draw a progress bar.

    Returns:
        The directory of the data set.

    Raises:
        UserError: if the directory holds anything else.
    """
    from common import log

    text = json.dumps(dataclasses.asdict(recipe.validate()), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    name = f"{recipe.style}-{recipe.side}x{recipe.side}-{digest}"
    path = Path(directory).expanduser() / name
    if maze_files.stored_recipe(path) is None:
        sizes = recipe.train_size, recipe.val_size, recipe.test_size
        log.info("generating %d training, %d validation, %d test mazes in %s", *sizes, path)
    if not build_generated(path, recipe, processes=processes, progress=progress):
        log.info("mazes: using %s, which is there already", path)
    return path


def build_from_csv(
    directory: str | Path,
    source: Path,
    subsample_size: int | None = None,
    aug: bool = False,
    aug_relabel: bool | None = None,
    val_ratio: float = 0.0,
    seed: int = 0,
    infer_tiebreak: bool = False,
    overwrite: bool = False,
) -> bool:
    """Builds a data set from `train.csv` and `test.csv`, unless it is there.

    Args:
        directory: where it goes.
        source: directory of the files.
        subsample_size: training mazes to keep, in file order.
        aug: store the training mazes in all eight orientations.
        aug_relabel: label them anew; None: if `infer_tiebreak` finds the rule.
        val_ratio: share of the (kept) training mazes that go to a validation split, unaugmented.
        seed: of the choices.
        infer_tiebreak: print how well each tie-break explains the training labels.
        overwrite: replace a data set of another recipe.

    Returns:
        Whether it was built now.

    Raises:
        UserError: for bad files, or if something else is in the directory.
    """
    require(
        source.is_dir(),
        f"{source} is not a local directory; nothing is downloaded, so fetch the files first and "
        "give their directory as --source",
    )
    train, test = (read_csv(source / f"{name}.csv") for name in ("train", "test"))
    require(
        train.inputs.shape[1] == test.inputs.shape[1],
        f"{source}: train.csv has {train.inputs.shape[1]} cells per maze but test.csv "
        f"{test.inputs.shape[1]}; use files of one size",
    )
    rule = None
    if infer_tiebreak:
        scores = maze_tiebreak.score_rules(*train)
        print("share of the training labels that each tie-break reproduces:")
        print("\n".join(f"  {share:7.2%}  {rule}" for rule, share in scores.items()))
    if infer_tiebreak or aug_relabel:
        rule = maze_tiebreak.find_rule(*train)
    relabel = aug and (rule is not None if aug_relabel is None else aug_relabel)
    require(
        not relabel or rule is not None,
        f"no tie-break reproduces all labels of {source / 'train.csv'}, so augmented mazes cannot "
        "be labelled anew; use --noaug_relabel",
    )
    digests = [hashlib.sha256((source / f"{n}.csv").read_bytes()) for n in ("train", "test")]
    stored: dict[str, Any] = {"source": "csv", "sha256": [d.hexdigest() for d in digests]}
    stored |= {"subsample_size": subsample_size, "val_ratio": val_ratio, "seed": seed}
    stored |= {"aug": aug, "aug_relabel": str(rule) if relabel else False}
    if maze_files.already_built(directory, stored, overwrite):
        return False
    np_rng = np.random.default_rng(seed)
    if subsample_size is not None and subsample_size < len(train.inputs):
        kept = np.sort(np_rng.choice(len(train.inputs), subsample_size, replace=False))
        train = CsvMazes(train.inputs[kept], train.labels[kept])
    splits = {"train": train, "test": test}
    held_out = num_validation(len(train.inputs), val_ratio)
    if held_out:
        is_val = np.zeros(len(train.inputs), bool)
        is_val[np_rng.choice(len(is_val), held_out, replace=False)] = True
        splits["train"] = CsvMazes(train.inputs[~is_val], train.labels[~is_val])
        splits["val"] = CsvMazes(train.inputs[is_val], train.labels[is_val])
    with maze_files.new_dataset(directory, stored) as root:
        _write_splits(root, splits, aug, rule.label_fn if relabel and rule else None)
    return True


def num_validation(count: int, val_ratio: float) -> int:
    """Returns how many of `count` training mazes are held out; some, if the share is not 0.

    Raises:
        UserError: if that leaves none for training.
    """
    held_out = max(1, round(count * val_ratio)) if val_ratio > 0 else 0
    require(
        held_out == 0 or held_out < count,
        f"val_ratio {val_ratio} of {count} mazes leaves none for training; lower it",
    )
    return held_out


def _write_splits(
    root: Path,
    splits: dict[str, CsvMazes],
    aug: bool,
    label_fn: maze_tiebreak.LabelFn | None,
) -> None:
    for name, (inputs, labels) in splits.items():
        group_size = 1
        if aug and name == "train":
            group_size = aug8.NUM_MAPS
            if label_fn is None:
                variants = aug8.transform_all(labels)
            else:
                variants = aug8.relabel_all(inputs, label_fn)
            # From [8, P, S]: the images of a maze follow each other.
            seq_len = inputs.shape[1]
            inputs = aug8.transform_all(inputs).swapaxes(0, 1).reshape(-1, seq_len)
            labels = variants.swapaxes(0, 1).reshape(-1, seq_len)
        maze_files.write_split(root / name, inputs, labels, VOCAB_SIZE, group_size)


def _write_all_csv(directory: Path, style: str, made: dict[str, Mazes]) -> None:
    directory.mkdir()
    for name, mazes in made.items():
        write_csv(directory / f"{name}.csv", style, mazes.inputs, mazes.labels, mazes.moves)


def _parse(argv: Sequence[str]) -> flags.FlagValues | None:
    """Returns the options, or None after printing the help."""
    values = flags.FlagValues()
    define_flags(values)
    arguments = [re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    if any(re.fullmatch(r"--?(h|help|helpshort|helpfull)", word) for word in arguments[1:]):
        print(f"{__doc__}\noptions:{values.get_help()}")
        return None
    try:
        rest = values(arguments)
    except flags.Error as error:
        raise UserError(f"{error}; --help lists the options") from None
    require(len(rest) == 1, f"unexpected argument {rest[1:2]}; options are written --name=value")
    return values


def _check_combination(options: flags.FlagValues) -> None:
    require(
        options.generate != bool(options.source),
        "give either --source=DIRECTORY with train.csv and test.csv, or --generate",
    )
    useless = _FILE_FLAGS if options.generate else _GENERATOR_FLAGS
    given = [f"--{name}" for name in useless if options[name].present]
    other = "--generate" if options.generate else "--source"
    require(
        not given,
        f"{', '.join(given)} cannot be used with {other}",
    )
    require(
        options.aug or not options["aug_relabel"].present,
        "--aug_relabel says how to augment; add --aug",
    )


def _recipe_of(options: flags.FlagValues) -> Recipe:
    threshold = options.min_path_moves
    if threshold is None:
        threshold = 110 if options.side == 30 else options.side
    held_out = num_validation(options.train_size, options.val_ratio)
    return Recipe(
        style=options.style,
        side=options.side,
        min_path_moves=threshold,
        train_size=options.train_size - held_out,
        test_size=options.test_size,
        val_size=held_out,
        seed=options.seed,
        labels=options.labels,
        tree=options.tree,
        loops=options.loops,
    )


def _summary(directory: str, built: bool) -> str:
    parts = []
    for split in ("train", "val", "test"):
        if (Path(directory).expanduser() / split).is_dir():
            data = maze_files.load_maze(directory, split)
            copied = float((data.inputs == data.labels).mean())
            parts.append(
                f"{split} {len(data.inputs)} (copying the input gets {copied:.3f} of cells)"
            )
    return f"{directory}: {'built' if built else 'kept, it is there already'}; {', '.join(parts)}"


def run() -> NoReturn:
    """Calls `main` with the command line; bad input ends in one line and exit status 2."""
    try:
        status = main(sys.argv)
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = EXIT_USER_ERROR
    sys.exit(status)


if __name__ == "__main__":
    run()
