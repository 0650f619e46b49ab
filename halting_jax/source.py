"""Where a run's examples come from: drawn inside the step, or rows of arrays kept on the device."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common import log
from common.data import IndexShuffler
from common.errors import UserError
from common.processes import on_main
from halting_jax.defaults import FILE_TASKS
from halting_jax.types import Batch, Task


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A fixed set of examples.

    Attributes:
      name: "val", or the name of a test set.
      size: number of examples.
      batch: rows [b] int32 -> Batch, jit-able; rows at and beyond size are masked out.
    """

    name: str
    size: int
    batch: Callable[[jax.Array], Batch]


@dataclasses.dataclass(frozen=True)
class Source:
    """A run's data.

    Attributes:
      draw: (key, row_ids [b], sent [b]) -> Batch, inside the step.
      send: (first step, count, batch size) -> what the host sends for these steps, leaves
        [B, count]; () for generated tasks.
      steps_per_epoch: 0 for generated tasks.
      evaluation: sets by name; "val" is always there.
      facts: what the run directory records about the data.
      trivial: per evaluation set, the scores of returning the input unchanged; {} where an input
        is no answer.
    """

    draw: Callable[[jax.Array, jax.Array, Any], Batch]
    send: Callable[[int, int, int], Any]
    steps_per_epoch: int
    evaluation: dict[str, EvalSet]
    facts: dict[str, Any]
    trivial: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


def generated_source(task: Task, val_size: int, test_size: int, seed: int) -> Source:
    """Examples drawn inside the step; evaluation sets are a function of their seed alone.

    Args:
      task: a task with `sample`.
      val_size, test_size: examples per set.
      seed: of the validation set; the test sets use seed + 1.
    """
    sample = task.sample
    if sample is None:
        raise UserError(f"task.name={task.name} is read from files: set data.dir")

    def fixed(name: str, split: str, size: int, key: jax.Array) -> EvalSet:
        return EvalSet(
            name, size, lambda rows: only(sample(key, rows.astype(jnp.int32), split), rows < size)
        )

    test_key = jax.random.key(seed + 1)
    sets = {"val": fixed("val", "val", val_size, jax.random.key(seed))}
    sets |= {name: fixed(name, name, test_size, test_key) for name in task.eval_sets}
    return Source(
        draw=lambda key, row_ids, sent: sample(key, row_ids, "train"),
        send=lambda step, count, batch: (),
        steps_per_epoch=0,
        evaluation=sets,
        facts={"source": "generated in the training step"},
    )


def only(batch: Batch, keep: jax.Array) -> Batch:
    """The batch with every other row's masks emptied.

    Args:
      batch: of B rows.
      keep: bool [B].
    """

    def cut(mask: jax.Array) -> jax.Array:
        return mask & keep.reshape(-1, *(1 for _ in mask.shape[1:]))

    return dataclasses.replace(
        batch, input_mask=cut(batch.input_mask), target_mask=cut(batch.target_mask)
    )


def file_source(config: ConfigDict, directory: Path) -> Source:
    """Mazes or sudokus of a directory in the file format, kept on the device as bytes.

    Raises:
      UserError: the directory lacks a file, or a file is not what it should be.
    """
    from halting_jax.datasets.aug8 import index_maps
    from halting_jax.datasets.maze_files import label_variants, load_maze
    from halting_jax.tasks.maze import maze_batch
    from halting_jax.tasks.maze_metrics import PATH, copy_input_baseline

    train = load_maze(directory, "train")
    with_aug = config.data.aug == "aug8"
    maps = jnp.asarray(index_maps(train.side)) if with_aug else None
    variants = label_variants(train) if with_aug else train.labels[None]
    inputs, labels = jnp.asarray(train.inputs), jnp.asarray(variants)
    difficulty = jnp.asarray(train.difficulty)
    shuffler = IndexShuffler(len(train.inputs), config.seed)

    def draw(key: jax.Array, row_ids: jax.Array, sent: Any) -> Batch:
        if not with_aug:
            return maze_batch(inputs, labels, difficulty, sent)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)
        aug = jax.vmap(lambda k: jax.random.randint(k, (), 0, 8))(keys)
        return maze_batch(inputs, labels, difficulty, sent, aug, maps)

    def send(step: int, count: int, batch: int) -> np.ndarray:
        rows = shuffler.indices(step * batch, count * batch).reshape(count, batch)
        return np.ascontiguousarray(rows.T.astype(np.int32))  # [B, count]

    trivial = {}

    def fixed(split: str, limit: int) -> EvalSet:
        data = load_maze(directory, split)
        size = min(limit, len(data.inputs))
        focus = PATH if config.task.name == "maze" else None
        trivial[split] = copy_input_baseline(data.inputs[:size], data.labels[:size], focus)
        held = jnp.asarray(data.inputs), jnp.asarray(data.labels)[None]
        moves = jnp.asarray(data.difficulty)

        def batch(rows: jax.Array) -> Batch:
            taken = maze_batch(*held, moves, jnp.clip(rows, 0, size - 1).astype(jnp.int32))
            return only(taken, rows < size)

        return EvalSet(split, size, batch)

    sets = {
        "val": fixed("val", config.eval.val_size),
        "test": fixed("test", config.eval.test_size),
    }
    return Source(
        draw=draw,
        send=send,
        steps_per_epoch=-(-len(train.inputs) // config.data.batch_size),
        evaluation=sets,
        facts={
            "source": str(directory),
            "seq_len": int(train.seq_len),
            "vocab_size": int(train.vocab_size),
            "train_examples": len(train.inputs),
        },
        trivial=trivial,
    )


def data_directory(config: ConfigDict, workdir: Path) -> Path:
    """Where the maze files lie; builds them with the generator where no directory is named.

    Args:
      config: finalized tree of a task from files.
      workdir: of the run; generated mazes are kept in its parent, so that runs share them.
    """
    if config.data.dir != "generated":
        path = Path(config.data.dir).expanduser()
        if not path.is_dir():
            raise UserError(
                f"data.dir={config.data.dir}: no such directory; build one with "
                "python -m halting_jax.datasets.build_maze, or set data.dir=generated"
            )
        return path
    from halting_jax.datasets.build_maze import Recipe, ensure_generated

    recipe = Recipe(
        style=config.data.style,
        side=config.data.side,
        min_path_moves=config.data.min_path_moves,
        loops=config.data.loops,
        labels=config.data.labels,
        train_size=config.data.train_size,
        val_size=config.data.val_size,
        test_size=config.data.test_size,
        seed=config.data.seed,
    )
    place = workdir.parent / "generated_mazes"
    directory = Path(on_main(lambda: str(ensure_generated(place, recipe))))
    log.info("no official maze files given (data.dir): using generated ones in %s", directory)
    return directory


def is_file_task(config: ConfigDict) -> bool:
    """Whether the task's examples come from files."""
    return config.task.name in FILE_TASKS
