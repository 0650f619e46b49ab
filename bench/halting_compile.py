"""Compile time of a training step over the limit of inner steps."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bench import Row, TraceCounter, Turns
from bench.halting_scenes import MAZE_TOKENS, STILL_RATE, Sizes, get_config, random_grids
from common import dist
from common.spmd import ROWS, WHOLE, spmd
from halting_jax.build import build
from halting_jax.learner import OptimSettings, init_state, make_step

BAR = 1.3
MOST_ROUNDS = 3  # every round compiles everything anew

_numbers = itertools.count(1)


@contextlib.contextmanager
def no_stored_programs() -> Iterator[None]:
    """Switches the persistent compilation cache off."""
    name = "jax_enable_compilation_cache"
    before = jax.config.values[name]
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, before)


def compile_call(config: ConfigDict, side: int, counter: TraceCounter) -> Callable[[], None]:
    """Traces, lowers and compiles the trainer's step of a config, from the start in every call."""
    grid = side > 0
    built = build(config, side * side, MAZE_TOKENS) if grid else build(config)
    rows = config.data.batch_size
    if grid:
        batch = random_grids(rows, side)
    else:
        assert built.task.sample is not None
        ids = jnp.arange(rows, dtype=jnp.int32)
        batch = built.task.sample(jax.random.key(0), ids, "train")
    mesh = dist.make_mesh(1)

    def run() -> None:
        # Another constant every time: no cache of whatever kind can know this program.
        rate = STILL_RATE * (1 + next(_numbers))
        settings = OptimSettings(
            rate=lambda step: jnp.float32(rate), tau=lambda step: jnp.float32(1e-3)
        )
        step = counter.wrap(make_step(built.task, built.model, built.objective, settings))
        state = jax.eval_shape(lambda: init_state(built.model, settings, 0))
        compiled: Any = spmd(step, mesh, (WHOLE, ROWS), (WHOLE, WHOLE))
        compiled.lower(state, batch).compile()

    return run


def compile_rows(sizes: Sizes, turns: Turns) -> list[Row]:
    """The longest over the shortest compilation, for the ACT-RNN and the Universal Transformer."""
    toy = {}
    for limit in sizes.compile_limits:
        config = get_config("parity", sizes.compile_variant)
        config.act.time_limit = limit
        toy[f"M={limit}"] = config, 0
    maze = {}
    for hops in sizes.compile_hops:
        config = get_config("maze_ut", "tiny" if sizes.compile_variant == "tiny" else "act6")
        config.ut.max_hops = hops
        maze[f"hops={hops}"] = config, config.data.side
    return [
        _row(f"compile {name}", configs, turns.at_most(MOST_ROUNDS))
        for name, configs in (("ACT-RNN", toy), ("UT", maze))
    ]


def _row(title: str, configs: dict[str, tuple[ConfigDict, int]], turns: Turns) -> Row:
    counter = TraceCounter()
    things = {name: compile_call(*given, counter) for name, given in configs.items()}
    with no_stored_programs():
        timings = turns(things, counter=counter)
    rounds = list(zip(*timings.seconds.values(), strict=True))
    ratios = sorted(max(one) / min(one) for one in rounds)
    medians = [timings.median(name) for name in things]
    return Row(
        f"{title} {', '.join(things)} (largest / smallest)",
        max(medians),
        min(medians),
        ratios[len(ratios) // 2],
        BAR,
        compile_seconds=timings.compile_seconds,
        # Every call is meant to trace; none is counted as too many.
        traces=(sum(timings.traces), 0),
    )
