"""What is measured of the halting models: sizes, configs, and the trainer's loop cut into calls."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bench import TraceCounter
from common import dist
from common.checkpoint import Checkpointer
from common.metrics import MetricWriter, StepTimer, peak_memory
from halting_jax.build import Built
from halting_jax.defaults import finalize
from halting_jax.learner import OptimSettings, compile_steps, make_step
from halting_jax.reports import progress_text, training_row
from halting_jax.source import Source
from halting_jax.structure import structure
from halting_jax.train import fresh_state, make_source, optim_settings, padded
from halting_jax.types import Batch

MAZE_TOKENS = 6
# So small that weights stay where they are: every side makes equally many inner steps throughout.
STILL_RATE = 1e-12


@dataclasses.dataclass(frozen=True)
class Blocks:
    """One shape of the Universal Transformer.

    Attributes:
      variant: of configs/halting_maze_ut.py; side: of the grid; batch: rows.
      acts: whether halting is on, one measurement each.
    """

    variant: str
    side: int
    batch: int
    acts: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of everything measured.

    Attributes:
      toys: tasks; variant: of their configs.
      maze: variant of configs/halting_maze_act.py; maze_ut: of configs/halting_maze_ut.py, with
        maze_ut_steps per interval; puzzles: mazes that are generated for them.
      maze_moves: shortest paths of these mazes; 0 = as the config says.
      torch_steps, torch_maze_steps: steps of one call of the PyTorch loops.
      blocks: shapes of the comparison with plain blocks.
      eval_side, eval_hidden, eval_batch, eval_examples: of the evaluated ACT-RNN; the Universal
        Transformer and trm have eval_grid_side, eval_grid_hidden, eval_grid_batch and twice as many
        examples. eval_trm: (layers, inner cycles, cycles).
      eval_limit: most steps; eval_mean: wanted mean.
      compile_variant: of the compiled configs; compile_limits, compile_hops: what is varied.
    """

    toys: tuple[str, ...] = ("parity", "addition", "logic")
    variant: str = "cpu"
    maze: str = "runbook"
    maze_ut: str = "act6"
    maze_ut_steps: int = 10
    puzzles: int = 256
    maze_moves: int = 30
    torch_steps: int = 50
    torch_maze_steps: int = 2
    blocks: tuple[Blocks, ...] = (
        Blocks("perfect10", 10, 32, (False, True)),
        Blocks("runbook", 30, 2, (True,)),
    )
    eval_side: int = 10
    eval_hidden: int = 512
    eval_batch: int = 128
    eval_examples: int = 256
    eval_grid_side: int = 8
    eval_grid_hidden: int = 256
    eval_grid_batch: int = 64
    eval_trm: tuple[int, int, int] = (2, 2, 1)
    eval_limit: int = 16
    eval_mean: float = 6.0
    compile_variant: str = "cpu"
    compile_limits: tuple[int, ...] = (10, 20, 100)
    compile_hops: tuple[int, ...] = (4, 8, 16)


TINY = Sizes(
    toys=("parity", "addition"),
    variant="tiny",
    maze="tiny",
    maze_ut="tiny",
    maze_ut_steps=2,
    puzzles=16,
    maze_moves=0,
    torch_steps=2,
    torch_maze_steps=2,
    blocks=(Blocks("tiny", 4, 2, (True,)),),
    eval_side=4,
    eval_hidden=16,
    eval_batch=16,
    eval_examples=32,
    eval_grid_side=4,
    eval_grid_hidden=16,
    eval_grid_batch=16,
    eval_trm=(1, 1, 1),
    eval_limit=6,
    eval_mean=3.0,
    compile_variant="tiny",
    compile_limits=(3, 5),
    compile_hops=(2, 3),
)


def get_config(name: str, variant: str) -> ConfigDict:
    """configs/halting_NAME.py:VARIANT on one device, with a rate that changes nothing."""
    config: ConfigDict = importlib.import_module(f"configs.halting_{name}").get_config(variant)
    # The plain blocks are the paper's, and halting excludes losses on the way.
    config.ut.conv_size = config.ut.supervise_every = 0
    config.optim.lr = STILL_RATE
    config.parallel.num_devices = 1
    return config


def maze_config(name: str, variant: str, sizes: Sizes) -> ConfigDict:
    """The same of a maze, with few puzzles: how many there are does not matter for the speed."""
    config = get_config(name, variant)
    config.data.train_size = sizes.puzzles
    config.data.val_size = config.data.test_size = min(sizes.puzzles, 8)
    config.data.batch_size = min(config.data.batch_size, sizes.puzzles)
    if sizes.maze_moves and variant == "runbook":
        config.data.min_path_moves = sizes.maze_moves
    return config


def random_grids(rows: int, side: int, seed: int = 0) -> Batch:
    """Grids of random tokens, in every row of another mixture with one or two frequent ones."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(MAZE_TOKENS - 1, 0.1), rows)  # [B, V - 1]
    drawn = rng.random((rows, side * side, 1)) > np.cumsum(share, axis=1)[:, None, :-1]
    tokens = (1 + drawn.sum(axis=2)).astype(np.int32)
    present = jnp.ones(tokens.shape, bool)
    targets = rng.integers(1, MAZE_TOKENS, tokens.shape).astype(np.int32)
    return Batch(
        inputs=jnp.asarray(tokens),
        input_mask=present,
        targets=jnp.asarray(targets),
        target_mask=present,
        decoder_inputs=jnp.zeros((rows, 0), jnp.int32),
        difficulty=jnp.ones(rows, jnp.int32),
    )


class Training:
    """What `halting_jax.train.train` repeats, cut into calls; without validation.

    Attributes:
      counter: traces of the step.
      config, source, built, settings: as the trainer makes them.
      steps: optimiser steps of one interval.
      cadence: steps between two checkpoints.
      mesh: devices of the run.
    """

    def __init__(self, config: ConfigDict, directory: Path) -> None:
        """Builds everything; compiles at the first call.

        Args:
          config: of the run.
          directory: where logs and checkpoints go; generated mazes stand in its parent.
        """
        finalize(config)
        directory.mkdir(parents=True)
        self.config = config
        self.counter = TraceCounter()
        self.source, self.built = make_source(config, directory)
        per_epoch = self.source.steps_per_epoch
        total = config.train.max_steps or config.train.max_epochs * per_epoch
        self.settings = optim_settings(config, total, per_epoch)
        self.steps, self.cadence = config.train.log_every, config.eval.every
        self.mesh = dist.make_mesh(config.parallel.num_devices)
        self._run = trainer_steps(self.built, self.settings, self.source, self.counter, self.mesh)
        self._rows = row_numbers(config.data.batch_size, self.mesh)
        self._state, _ = fresh_state(config, self.built, self.source, self.settings, self.mesh)
        self._closing = contextlib.ExitStack()
        self._writer = self._closing.enter_context(
            MetricWriter(directory, tensorboard=config.logging.tensorboard)
        )
        self._checkpoints = self._closing.enter_context(
            Checkpointer(
                directory / "checkpoints",
                keep=config.checkpoint.keep,
                best="max",
                settings=structure(config, self.source.facts),
            )
        )
        self._timer = StepTimer()
        self._step = self._saved = 0

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def interval(self) -> str:
        """The steps up to the next line of the log, and that line."""
        config, count = self.config, self.steps
        batch_size = config.data.batch_size
        sent = padded(self.source.send(self._step, count, batch_size), config.train.log_every)
        sent = dist.shard_batch(self.mesh, sent)
        with self._timer.part("train"):
            self._state, sums = self._run(self._state, self._rows, sent, count)
            sums = jax.device_get(sums)
        self._step += count
        row = training_row(config, self.built, sums)
        timing = self._timer.finish({"examples": count * batch_size, "steps": count})
        row["examples_per_s"] = timing["speed/examples_per_second"]
        self._writer.write(self._step, row | timing | peak_memory())
        return progress_text(config, row, timing)

    def save(self) -> None:
        """One checkpoint."""
        # A step that stands there already is not written again.
        self._saved += 1
        self._checkpoints.save(self._saved, self._state, {"step": self._step}, metric=0.0)

    def fixed_batch(self) -> Batch:
        """Some batch of the run."""
        rows = jnp.arange(self.config.data.batch_size, dtype=jnp.int32)
        sent = jax.tree.map(lambda x: jnp.asarray(x[:, 0]), self.source.send(0, 1, len(rows)))
        drawn: Batch = jax.jit(self.source.draw)(jax.random.key(1), rows, sent)
        return drawn

    def weights(self) -> Any:
        """A copy of the weights; the state itself is given away at every call."""
        return jax.tree.map(jnp.copy, self._state.params)


def trainer_steps(
    built: Built, settings: OptimSettings, source: Source, counter: TraceCounter, mesh: Any
) -> Callable[..., Any]:
    """The trainer's compiled steps with their traces counted; see `learner.compile_steps`."""
    step = make_step(built.task, built.model, built.objective, settings)
    return compile_steps(counter.wrap(step), source.draw, mesh)


def row_numbers(count: int, mesh: Any) -> jax.Array:
    """int32 [B], as the trainer numbers its rows."""
    rows: jax.Array = dist.shard_batch(mesh, jnp.arange(count, dtype=jnp.int32))
    return rows
