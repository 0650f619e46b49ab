"""The training step: freezing, averaging, anomalies, and independence of the device count."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import flags
from common.dist import make_mesh
from halting_jax.build import build
from halting_jax.learner import (
    OptimSettings,
    TrainState,
    compile_steps,
    gradient_health,
    init_state,
    make_step,
    named_leaves,
)
from halting_jax.source import Source, generated_source
from halting_jax.train import optim_settings

TINY = "configs/halting_parity.py:tiny"
# Every kind of model; the data of the grids are random tokens, so that no maze has to be built.
AGREE = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from common import flags
from common.dist import make_mesh, shard_batch
from halting_jax.build import build
from halting_jax.evaluate import Evaluator
from halting_jax.learner import compile_steps, init_state, make_step
from halting_jax.source import generated_source
from halting_jax.train import optim_settings, place
from halting_jax.types import Batch

def grid(key, row_ids, split):
    def row(i):
        tokens = jax.random.randint(jax.random.fold_in(key, i), (2, 16), 1, 6)
        return tokens[0], tokens[1]
    x, y = jax.vmap(row)(row_ids)
    true = jnp.ones(x.shape, bool)
    return Batch(x, true, y, true, jnp.zeros((len(x), 0), jnp.int32), jnp.ones(len(x), jnp.int32))

for spec in sys.argv[1:]:
    config = flags.load_config(spec)
    built = build(config, 16, 6)
    task = built.task
    if task.sample is None:
        built = dataclasses.replace(built, task=dataclasses.replace(task, sample=grid))
    source = generated_source(built.task, 16, 8, 0)
    settings = optim_settings(config, 20, 1)
    step = make_step(built.task, built.model, built.objective, settings)
    rows = jnp.arange(8, dtype=jnp.int32)
    results = {}
    for devices, mode in ((1, "jit"), (4, "jit"), (4, "pmap")):
        mesh = make_mesh(devices)
        first = source.draw(jax.random.key(0), rows, ())
        carry = (lambda: built.init_carry(first)) if built.init_carry else (lambda: ())
        state = place(mesh, jax.jit(lambda: init_state(built.model, settings, 0, carry))())
        run = compile_steps(step, source.draw, mesh, mode)
        for _ in range(2):
            state, sums = jax.block_until_ready(run(state, shard_batch(mesh, rows), (), 2))
        evaluator = Evaluator(built.task, built.model, mesh, batch_size=16, tau=0.0, mode=mode)
        graded = evaluator.run(state.params, source.evaluation["val"])
        rows_of = {"correct": graded.correct, "steps": graded.steps}
        results[devices, mode] = (*jax.device_get((state.params, state.ema, sums)), rows_of)
    for other in ((4, "jit"), (4, "pmap")):
        def same(a, b):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=f"{spec} {other}")
        # Devices leave their loops on their own: inner steps really computed differ.
        left, right = (
            (p, e, s.means, s.grad_norm, s.ponder.histogram, s.ponder.cost, rows_of)
            for p, e, s, rows_of in (results[1, "jit"], results[other])
        )
        jax.tree.map(same, left, right)
print("agree")
"""


def _setting(**changes: Any) -> tuple[Any, OptimSettings, Source]:
    config = flags.load_config(TINY)
    with config.unlocked():
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            target = config
            for part in section.split("__"):
                target = target[part]
            target[name] = value
    built = build(config)
    return built, optim_settings(config, 20, 1), generated_source(built.task, 8, 8, 0)


def _start(built: Any, settings: OptimSettings) -> TrainState:
    # Compiled as a whole: run op by op it takes seconds.
    state: TrainState = jax.jit(lambda: init_state(built.model, settings, 0))()
    return state


def _runner(built: Any, settings: OptimSettings, source: Source) -> Callable[..., list[Any]]:
    """One compiled program as a function of how many steps each of several calls takes; it returns
    weights, average and sums after each."""
    step = make_step(built.task, built.model, built.objective, settings)
    run = compile_steps(step, source.draw, make_mesh(1))

    def calls(*counts: int) -> list[Any]:
        state = _start(built, settings)
        rows, seen = jnp.arange(16, dtype=jnp.int32), []
        for count in counts:
            state, sums = run(state, rows, (), count)
            seen.append(jax.device_get((state.params, state.ema, sums)))
        return seen

    return calls


def test_frozen_halting_unit_neither_learns_nor_decays() -> None:
    built, settings, source = _setting(act__halt_warmup_steps=3, optim__weight_decay=0.1)
    first, later = _runner(built, settings, source)(3, 2)
    start = jax.device_get(_start(built, settings).params)
    names = named_leaves(start)

    def moved(after: Any) -> dict[str, bool]:
        changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), start, after)
        pairs = zip(jax.tree.leaves(names), jax.tree.leaves(changed), strict=True)
        return dict(pairs)

    frozen, thawed = moved(first[0]), moved(later[0])
    halting = {name for name in frozen if "halting" in name}
    assert halting and not any(frozen[name] for name in halting)
    assert all(changed for name, changed in frozen.items() if name not in halting)
    assert all(thawed.values())


def test_average_follows_the_weights_from_their_start() -> None:
    built, settings, source = _setting(optim__ema__enabled=True, optim__ema__decay=0.75)
    states = _runner(built, settings, source)(1, 1, 1)
    average = jax.device_get(_start(built, settings).params)
    for params, ema, _ in states:
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, params)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6), average, ema)


def test_any_number_of_steps_is_one_program_and_the_same_run() -> None:
    run = _runner(*_setting())
    cut, whole = run(1, 3, 2)[-1], run(6)[-1]
    jax.tree.map(np.testing.assert_array_equal, cut[0], whole[0])


def test_logged_rate_and_penalty_are_those_of_the_last_step() -> None:
    changes = {"optim__lr": 0.01, "optim__warmup_steps": 10, "optim__schedule": "cosine"}
    changes |= {"act__time_penalty": 0.1, "act__time_penalty_warmup_steps": 10}
    built, settings, source = _setting(**changes, act__time_penalty_start=0.0)
    for (_, _, sums), last in zip(_runner(built, settings, source)(3, 2), (2, 4), strict=True):
        np.testing.assert_allclose(sums.rate, 0.01 * last / 10, rtol=1e-5)
        np.testing.assert_allclose(sums.tau, 0.1 * last / 10, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("steps", [1, 3])
def test_nonfinite_gradients_are_counted(bad: float, steps: int) -> None:
    """Also when only the first of several steps has them: they reach the last one."""
    built, settings, source = _setting()

    def draw(key: jax.Array, row_ids: jax.Array, sent: Any) -> Any:
        batch = source.draw(key, row_ids, ())
        return batch.replace(inputs=batch.inputs.at[0, 0].set(jnp.where(sent[0], bad, 1.0)))

    step = make_step(built.task, built.model, built.objective, settings)
    run = compile_steps(step, draw, make_mesh(1))
    sent = jnp.zeros((16, steps), bool).at[:, 0].set(True)
    _, sums = run(_start(built, settings), jnp.arange(16, dtype=jnp.int32), sent, steps)
    assert int(sums.nan_count) + int(sums.inf_count) > 0
    assert not np.isfinite(float(sums.grad_norm))
    _, sums = run(_start(built, settings), jnp.arange(16, dtype=jnp.int32), ~sent[:, :1], 1)
    assert int(sums.nan_count) + int(sums.inf_count) == 0 and float(sums.grad_norm) > 0


@pytest.mark.parametrize("measured", [True, False])
def test_health_of_a_gradient(measured: bool) -> None:
    rng = np.random.default_rng(0)
    sound = {"a": rng.normal(size=(5, 7)).astype(np.float32), "b": np.full(3, 2.0, np.float32)}
    broken = {"a": sound["a"].copy(), "b": sound["b"].copy()}
    broken["a"][0, :3], broken["a"][1, 2], broken["b"][1] = np.nan, np.inf, -np.inf
    health = jax.jit(gradient_health)
    norm, nan, inf = health(sound, measured)
    expected = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in sound.values()))
    np.testing.assert_allclose(norm, expected if measured else 0.0, rtol=1e-6)
    assert (int(nan), int(inf)) == (0, 0)
    norm, nan, inf = health(broken, measured)
    assert np.isfinite(norm) != measured
    assert (int(nan), int(inf)) == ((3, 2) if measured else (0, 0))


def _agree(*specs: str) -> None:
    options = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": options}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(AGREE), *specs],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "agree" in done.stdout, done.stderr[-3000:]


def test_one_and_four_devices_agree() -> None:
    _agree(TINY)


@pytest.mark.slow
def test_one_and_four_devices_agree_for_every_model() -> None:
    _agree(
        "configs/halting_addition.py:tiny",
        "configs/halting_maze_act.py:tiny",
        "configs/halting_maze_ut.py:tiny",
        "configs/halting_maze_ut.py:tiny_trm",
        "configs/halting_copy.py:tiny",
    )
