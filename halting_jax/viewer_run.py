"""A trained model opened for looking at: its examples by split and index, and its answers."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common.errors import UserError, require
from halting_jax.defaults import FILE_TASKS
from halting_jax.loader import Trained, load_trained
from halting_jax.source import EvalSet, data_directory, generated_source, only
from halting_jax.tasks.addition import make_addition
from halting_jax.tasks.digits import places_of_sum
from halting_jax.types import Batch, Model, Params, Ponder, Task

FILE_SPLITS = ("test", "val", "train")
OOD = "ood"


@flax.struct.dataclass
class Reply:
    """What a model says to B examples.

    Attributes:
      ids: int32 like `Batch.targets`, the answers.
      chances: float32, probability of each answer; like ids, or [B] for one answer per row.
      exact: bool [B], the whole example is right.
      ponder: how long it thought.
    """

    ids: jax.Array
    chances: jax.Array
    exact: jax.Array
    ponder: Ponder


class OpenRun:
    """A trained model and the examples it can be shown."""

    def __init__(self, trained: Trained, directory: Path | None) -> None:
        """Use `open_run`; directory holds the files of a task that is read from files."""
        self.trained = trained
        self.directory = directory
        self.task = trained.built.task
        self.model: Model = trained.built.model
        self._longer = longer_sums(trained.config)
        self.splits = self._split_names()
        self._sets: dict[str, EvalSet] = {}
        self._draw: dict[str, Callable[[jax.Array], Batch]] = {}
        self._reply = jax.jit(self._reply_of, static_argnames="fixed_steps")

    def examples(self, split: str = "") -> EvalSet:
        """A set by name; "" is the first test set.

        Raises:
          UserError: there is no such set.
        """
        split = split or self.splits[0]
        if split not in self.splits:
            where = self.directory or f"task {self.task.name}"
            raise UserError(f"{where} has no split {split!r}; choose {', '.join(self.splits)}")
        if split not in self._sets:
            self._sets[split] = self._load(split)
        return self._sets[split]

    def batch(self, split: str, index: int) -> Batch:
        """One example as a batch of one row.

        Raises:
          UserError: the index is beyond the set.
        """
        chosen = self.examples(split)
        require(
            0 <= index < chosen.size,
            f"sample index {index} is out of range: split {chosen.name} has {chosen.size} samples, "
            f"0 to {chosen.size - 1}",
        )
        return self.rows(chosen.name, np.array([index]))

    def rows(self, split: str, indices: np.ndarray) -> Batch:
        """Examples of a set by index; those beyond its end are masked out."""
        if split not in self._draw:
            self._draw[split] = jax.jit(self.examples(split).batch)
        return self._draw[split](jnp.asarray(indices, jnp.int32))

    def reply(self, batch: Batch, fixed_steps: int = 0) -> Reply:
        """The model's answers; fixed_steps > 0 overrules halting. Compiled once per number."""
        return self._reply(self.trained.params, batch, fixed_steps=fixed_steps)

    def _reply_of(self, params: Params, batch: Batch, fixed_steps: int = 0) -> Reply:
        outputs = self.model.apply(params, batch, fixed_steps=fixed_steps)
        logits = like_targets(outputs.logits, batch.targets.ndim)
        return Reply(
            ids=answer_ids(logits, batch.targets, batch.target_mask),
            chances=answer_chances(logits, batch.targets.ndim),
            exact=self.task.example_correct(outputs.logits, batch),
            ponder=outputs.ponder,
        )

    @property
    def test_splits(self) -> tuple[str, ...]:
        """The splits that test, the in-distribution one first."""
        if self.directory is not None:
            return self.splits[:1]
        return tuple(name for name in self.splits if name != "val")

    def _split_names(self) -> tuple[str, ...]:
        if self.directory is None:
            longer = (OOD,) if self._longer is not None else ()
            return (*self.task.eval_sets, *longer, "val")
        found = tuple(name for name in FILE_SPLITS if (self.directory / name).is_dir())
        require(
            bool(found),
            f"{self.directory} has none of the directories {', '.join(FILE_SPLITS)}: it is no "
            "puzzle data set",
        )
        return found

    def _load(self, split: str) -> EvalSet:
        config = self.trained.config
        if self.directory is None:
            sizes = config.eval
            if self._longer is not None and split == OOD:
                source = generated_source(self._longer, sizes.val_size, sizes.test_size, sizes.seed)
                return dataclasses.replace(source.evaluation["id"], name=OOD)
            source = generated_source(self.task, sizes.val_size, sizes.test_size, sizes.seed)
            return source.evaluation[split]
        return _file_set(self.trained, self.directory, split)


def open_run(checkpoint: str | Path, data: str | Path = "") -> OpenRun:
    """Loads the model of a run; the task is the one it was trained on.

    Args:
      checkpoint: RUN, RUN/checkpoints or RUN/checkpoints/STEP.
      data: directory of other puzzle files of the same size; "" = those of the run.

    Raises:
      UserError: no checkpoint or no data there, or data for a task that is generated.
    """
    trained = load_trained(checkpoint)
    if trained.config.task.name not in FILE_TASKS:
        require(
            not data,
            f"{trained.path} was trained on {trained.config.task.name}, which is generated: leave "
            "the data directory out",
        )
        return OpenRun(trained, None)
    if data:
        directory = Path(data).expanduser()
        require(directory.is_dir(), f"{data}: no such data directory")
    else:
        directory = data_directory(trained.config, trained.path)
    return OpenRun(trained, directory)


@functools.lru_cache(maxsize=8)
def _held(source: str, split: str, stamp: float) -> Any:
    """A split in memory; the time stamp makes changed files load anew."""
    from halting_jax.datasets.maze_files import load_maze

    del stamp
    return load_maze(source, split)


def like_targets(logits: jax.Array, target_dims: int) -> jax.Array:
    """[B, T, V] of logits [B, T, 1, V], a task with one place per frame; others as they are."""
    return logits[..., 0, :] if logits.ndim == target_dims + 2 else logits


def answer_ids(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """The most likely answers, in the layout of the targets.

    Args:
      logits: of one of the forms of `types.Outputs`, by `like_targets`.
      targets: int32 [B, ...]; mask: bool like targets.

    Returns:
      int32 like targets; a model that answers once per row has its answer at every scored place.
    """
    if logits.ndim == targets.ndim + 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    said = (logits > 0).astype(jnp.int32)
    if logits.ndim == targets.ndim:
        return said
    return jnp.where(mask, said[:, None], 0)


def answer_chances(logits: jax.Array, target_dims: int) -> jax.Array:
    """Probability of the most likely answer: logits with classes [B, ..., V] -> [B, ...], without
    (as many axes as the targets, or one answer per row) -> like logits."""
    if logits.ndim == target_dims + 1:
        return jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)
    return jax.nn.sigmoid(jnp.abs(logits))


def longer_sums(config: ConfigDict) -> Task | None:
    """Addition of more numbers than were trained: up to twice as many, as long as the sums fit the
    places of the model's answer; None for other tasks and where not even one more fits."""
    if config.task.name != "addition":
        return None
    trained, digits = config.task.sequence_length, config.task.max_digits
    places = places_of_sum(digits, trained)
    fitting = [
        length
        for length in range(trained + 1, 2 * trained + 1)
        if places_of_sum(digits, length) == places
    ]
    return make_addition(fitting[-1], digits, fixed_sequence_length=True) if fitting else None


def _file_set(trained: Trained, directory: Path, split: str) -> EvalSet:
    from halting_jax.tasks.maze import maze_batch

    data = _held(str(directory), split, (directory / split).stat().st_mtime)
    for name, found in (("seq_len", data.seq_len), ("vocab_size", data.vocab_size)):
        require(
            trained.facts[name] == found,
            f"the model was trained on data of {name} {trained.facts[name]}, {directory} has "
            f"{found}; name a data set of the same kind",
        )
    size = len(data.inputs)
    inputs, labels = jnp.asarray(data.inputs), jnp.asarray(data.labels)[None]
    moves = jnp.asarray(data.difficulty)

    def batch(rows: jax.Array) -> Batch:
        taken = maze_batch(inputs, labels, moves, jnp.clip(rows, 0, size - 1))
        return only(taken, rows < size)

    return EvalSet(split, size, batch)
