"""Training loops of the halting models beside the bare step, and beside eager PyTorch."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from bench import Row, Timings, Turns, compare, rates
from bench.halting_scenes import Sizes, Training, get_config, maze_config
from common import dist
from halting_jax.build import time_penalty_target
from halting_jax.learner import make_optimizer
from halting_jax.objective import classification, ponder_ratio
from halting_jax.types import Batch, Params

TOY_BAR, MAZE_BAR = 1.3, 1.08
TOY_TORCH_BAR, MAZE_TORCH_BAR = 3.0, 0.8
BARS = {"parity": TOY_BAR, "addition": TOY_BAR}  # the other toys are for information


def bare_steps(training: Training, averaged: bool = False) -> Callable[[], Any]:
    """Loss, gradient and optimiser on one batch, an interval's steps in one compiled loop.

    Args:
      training: whose model, optimiser and number of steps.
      averaged: also keep the running average of the weights.
    """
    built, settings = training.built, training.settings
    task, model = built.task, built.model
    optimizer = make_optimizer(settings)
    tau, reduce = time_penalty_target(training.config), training.config.act.ponder_reduce
    rate = training.config.optim.lr

    def loss(params: Params, batch: Batch) -> jax.Array:
        outputs = model.apply(params, batch)
        answers = classification(task, outputs.logits, batch)
        return answers.value + tau * ponder_ratio(outputs.ponder, reduce).value

    def run(state: Any, batch: Batch, count: jax.Array) -> Any:
        def step(_: jax.Array, state: Any) -> Any:
            params, average, opt_state = state
            # Without the barrier the compiler would lift what depends on the batch alone out of
            # the loop: every step has to encode its inputs.
            own, params = jax.lax.optimization_barrier((batch, params))
            grads = jax.grad(loss)(params, own)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
            if averaged:
                decay = settings.ema_decay
                average = optax.incremental_update(params, average, 1.0 - decay)
            return params, average, opt_state

        return jax.lax.fori_loop(0, count, step, state)

    compiled = jax.jit(training.counter.wrap(run), donate_argnums=0)
    batch, count = training.fixed_batch(), jnp.int32(training.steps)
    params = training.weights()
    average = training.weights() if averaged else ()
    # All on the mesh, where a call leaves them: elsewhere the second call would be traced again.
    state = dist.replicate(training.mesh, (params, average, optimizer.init(params)))

    def call() -> Any:
        nonlocal state
        state = compiled(state, batch, count)
        return state

    return call


def loop_row(name: str, timings: Timings, floor: str, training: Training, bar: float | None) -> Row:
    """Loop with its share of a checkpoint over the bare steps."""
    share = training.steps / training.cadence
    seconds = timings.seconds
    work = [w + share * s for w, s in zip(seconds["loop"], seconds["save"], strict=True)]
    whole = dataclasses.replace(timings, seconds={"work": work, "floor": seconds[floor]})
    return compare(name, whole, "work", "floor", bar)


def loop_rows(sizes: Sizes, turns: Turns) -> list[Row]:
    """Loops as users run them beside the bare step on a fixed batch."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for task in sizes.toys:
            config = get_config(task, sizes.variant)
            with Training(config, Path(place) / task) as training:
                floor = bare_steps(training)
                things = {"loop": training.interval, "save": training.save, "floor": floor}
                timings = turns(things, counter=training.counter)
                rows.append(loop_row(f"loop {task}", timings, "floor", training, BARS.get(task)))
        config = maze_config("maze_act", sizes.maze, sizes)
        side, hidden = config.data.side, config.model.hidden_size
        title = f"loop maze {side}x{side}, H={hidden}, batch {config.data.batch_size}"
        with Training(config, Path(place) / "maze") as training:
            things = {
                "loop": training.interval,
                "save": training.save,
                "floor": bare_steps(training),
                "averaged": bare_steps(training, averaged=True),
            }
            timings = turns(things, counter=training.counter)
            rows.append(loop_row(title, timings, "floor", training, MAZE_BAR))
            title += ", floor with average"
            rows.append(loop_row(title, timings, "averaged", training, None))
    return rows


def torch_rows(sizes: Sizes, turns: Turns) -> list[Row]:
    """Optimiser steps per second of the loops beside those of plain eager PyTorch."""
    cases: list[tuple[str, str, ConfigDict, float | None]] = []
    for task in sizes.toys:
        config = get_config(task, sizes.variant)
        cases.append((f"torch {task}", task, config, TOY_TORCH_BAR))
    act = maze_config("maze_act", sizes.maze, sizes)
    ut = maze_config("maze_ut", sizes.maze_ut, sizes)
    ut.train.log_every = sizes.maze_ut_steps
    for name, config in (("maze ACT-RNN", act), ("maze UT", ut)):
        side, hidden = config.data.side, config.model.hidden_size
        title = f"torch {name} {side}x{side}, H={hidden}, batch {config.data.batch_size}"
        cases.append((title, "maze", config, MAZE_TORCH_BAR))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for number, (title, task, config, bar) in enumerate(cases):
            steps = sizes.torch_maze_steps if task == "maze" else sizes.torch_steps
            with Training(config, Path(place) / str(number)) as training:
                things = {"ours": training.interval, "theirs": torch_call(training, place, steps)}
                timings = turns(things, counter=training.counter)
                base, ours = ("theirs", steps), ("ours", training.steps)
                rows.append(rates(title, timings, base, ours, bar))
    return rows


def torch_call(training: Training, place: str, steps: int) -> Callable[[], None]:
    """So many steps of the PyTorch loop of the same config."""
    from bench import plain_torch_halting

    config = training.config
    mazes = None
    if config.task.name == "maze":
        from halting_jax.datasets.maze_files import load_maze

        mazes = load_maze(training.source.facts["source"], "train")
    loop = plain_torch_halting.PlainTraining(config, training.built.task.shape, mazes)
    return lambda: loop.run(steps)
