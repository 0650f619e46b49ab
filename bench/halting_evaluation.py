"""Evaluation with halting beside one in which every row takes the mean number of steps."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bench import Row, Timings, TraceCounter, Turns, compare
from bench.halting_scenes import MAZE_TOKENS, Sizes, get_config, random_grids
from common import dist
from halting_jax.build import Built, build
from halting_jax.evaluate import Evaluator
from halting_jax.learner import named_leaves
from halting_jax.source import EvalSet, only
from halting_jax.types import Batch, Model, Params

BAR = 1.3
SEARCH = 14  # halvings of the search for a bias
SEARCH_RANGE = 30.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One model that is evaluated.

    Attributes:
      title: in the table; built: task and model; examples: the set, on the device.
      batch_size: rows per call.
      scales: of the halting kernel, tried until rows differ enough.
      amplified: factor of the embeddings of tokens; the signals of the Universal Transformer, the
        same in every row, would otherwise stop all rows at the same hop.
      judged: whether the bar applies; the others are for information.
    """

    title: str
    built: Built
    examples: Batch
    batch_size: int
    scales: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0)
    amplified: float = 1.0
    judged: bool = True


def cases(sizes: Sizes) -> list[Case]:
    """ACT-RNN on grids and on bits, the Universal Transformer halting per example and per
    position, and trm."""
    act = get_config("maze_act", "cpu")
    act.model.hidden_size, act.act.time_limit = sizes.eval_hidden, sizes.eval_limit
    grids = random_grids(sizes.eval_examples, sizes.eval_side)
    found = [Case("ACT-RNN", _grid(act, sizes.eval_side), grids, sizes.eval_batch)]

    toy = get_config("parity", sizes.compile_variant)
    toy.act.time_limit = sizes.eval_limit
    parity = build(toy)
    assert parity.task.sample is not None
    ids = jnp.arange(4 * sizes.eval_batch, dtype=jnp.int32)
    bits = parity.task.sample(jax.random.key(0), ids, "id")
    found.append(Case("toy parity", parity, bits, 4 * sizes.eval_batch, judged=False))

    side, batch_size = sizes.eval_grid_side, sizes.eval_grid_batch
    grids = random_grids(2 * batch_size, side)
    # Examples differ by little in the mean of their positions: a large scale would stop them at the
    # first hop or at none.
    example = {"amplified": 30.0, "scales": (0.01, 0.03, 0.1, 0.3)}
    for level, spread in (("example", example), ("token", {"amplified": 10.0})):
        config = get_config("maze_ut", "perfect10")
        config.ut.act, config.ut.act_level = True, level
        config.ut.max_hops = sizes.eval_limit
        config.model.hidden_size = sizes.eval_grid_hidden
        for name in ("key_depth", "value_depth", "filter_size"):
            config.ut[name] = sizes.eval_grid_hidden
        found.append(Case(f"UT per {level}", _grid(config, side), grids, batch_size, **spread))
    config = get_config("maze_ut", "trm10")
    config.model.hidden_size = sizes.eval_grid_hidden
    config.trm.layers, config.trm.inner_cycles, config.trm.cycles = sizes.eval_trm
    config.trm.supervision_steps = sizes.eval_limit
    # trm compares with zero: its scale does not matter.
    found.append(Case("trm", _grid(config, side), grids, batch_size, scales=(1.0,)))
    return found


def _grid(config: ConfigDict, side: int) -> Built:
    return build(config, side * side, MAZE_TOKENS)


def evaluation_rows(sizes: Sizes, turns: Turns) -> list[Row]:
    """Early exit on and off, over the cost of the mean step."""
    return [row for case in cases(sizes) for row in _measure(case, sizes, turns)]


def steps_of_rows(model: Model, params: Params, examples: Batch) -> jax.Array:
    """[B]: inner steps until the last call of a row has ended.

    A row of the Universal Transformer runs until its last position has halted, because halted
    positions go on feeding the attention of the others.
    """
    ponder = model.apply(params, examples).ponder
    return jnp.max(jnp.where(ponder.mask, ponder.steps, 0.0), axis=1)


def spread_halting(case: Case, wanted: float) -> Params:
    """Weights with a random halting kernel, and the bias at which rows take `wanted` steps.

    Its scale is the first at which some rows run to the limit and a fifth takes at most half of
    the mean, or else the last.
    """
    model = case.built.model
    params = jax.jit(model.init)(jax.random.key(0))
    names = named_leaves(params)
    sample = jax.tree.map(lambda x: x[: min(32, x.shape[0])], case.examples)

    def changed(scale: float | jax.Array, bias: float | jax.Array) -> Params:
        def change(name: str, leaf: jax.Array) -> jax.Array:
            if not re.search(model.halting_path, name):
                return leaf * case.amplified if name == "embedding/table" else leaf
            if name.endswith("bias"):
                return jnp.full_like(leaf, bias)
            return scale * jax.random.normal(jax.random.key(1), leaf.shape)

        return jax.tree.map(change, names, params)

    steps = jax.jit(lambda scale, bias: steps_of_rows(model, changed(scale, bias), sample))
    bias = 0.0
    for scale in case.scales:
        low, high = -SEARCH_RANGE * scale, SEARCH_RANGE * scale
        for _ in range(SEARCH):
            bias = (low + high) / 2
            low, high = (bias, high) if jnp.mean(steps(scale, bias)) > wanted else (low, bias)
        taken = steps(scale, bias)
        if jnp.max(taken) == model.max_steps and jnp.mean(taken <= wanted / 2) >= 0.2:
            break
    return changed(scale, bias)


def _measure(case: Case, sizes: Sizes, turns: Turns) -> list[Row]:
    counter = TraceCounter()
    params = spread_halting(case, sizes.eval_mean)
    taken = jax.jit(lambda p, b: steps_of_rows(case.built.model, p, b))(params, case.examples)
    mean, most = float(jnp.mean(taken)), int(jnp.max(taken))
    below = max(math.floor(mean), 1)
    things = {
        "early": _evaluator(case, counter, early_exit=True),
        "whole": _evaluator(case, counter, early_exit=False),
        "below": _evaluator(case, counter, fixed_steps=below),
        "above": _evaluator(case, counter, fixed_steps=below + 1),
    }
    calls = {name: functools.partial(one, params) for name, one in things.items()}
    timings = turns(calls, counter=counter)
    share = mean - below
    pairs = zip(timings.seconds["below"], timings.seconds["above"], strict=True)
    floor = [(1 - share) * b + share * a for b, a in pairs]
    timings = Timings({**timings.seconds, "floor": floor}, timings.compile_seconds, timings.traces)
    title = f"evaluation {case.title}, steps mean {mean:.1f} most {most}"
    bar = BAR if case.judged else None
    return [
        compare(f"{title}, early exit", timings, "early", "floor", bar),
        compare(f"{title}, whole batches", timings, "whole", "floor"),
    ]


def _evaluator(case: Case, counter: TraceCounter, **options: Any) -> Any:
    """The evaluation that users run, as a function of the weights."""
    built, size = case.built, len(case.examples.difficulty)
    model = dataclasses.replace(built.model, apply=counter.wrap(built.model.apply))
    if model.advance is not None:
        model = dataclasses.replace(model, advance=counter.wrap(model.advance))
    evaluator = Evaluator(
        built.task, model, dist.make_mesh(1), batch_size=case.batch_size, tau=0.0, **options
    )

    def batch(rows: jax.Array) -> Batch:
        taken = jax.tree.map(lambda x: x[jnp.clip(rows, 0, size - 1)], case.examples)
        return only(taken, rows < size)

    examples = EvalSet("val", size, batch)

    def run(params: Params) -> None:
        evaluator.run(params, examples)

    return run
