"""Per-shard functions under both modes, on one device here and on four forced ones in a subprocess.

The second half runs the compiled calls of the whole method, so that a difference between one and
four devices, or between the modes, shows where it would hurt.
"""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.dist import make_mesh
from common.errors import UserError
from common.spmd import MODES, ROWS, WHOLE, all_rows, own_slice, spmd, sum_over_devices

PRIMITIVES = """
import flax.struct
import jax, jax.numpy as jnp, numpy as np
from typing import Any
from common.dist import make_mesh
from common.spmd import ROWS, WHOLE, all_rows, own_slice, spmd, sum_over_devices

@flax.struct.dataclass
class Batch:
    x: jax.Array
    flag: jax.Array
    nothing: Any = None

def work(scale, batch, key):
    whole = all_rows(batch)
    noise = jax.random.normal(key, whole.x.shape)
    mine = own_slice(whole.x + noise)
    total = sum_over_devices({"sum": mine.sum(), "rows": jnp.float32(batch.x.shape[0])})
    order = jnp.arange(whole.x.shape[0]) * whole.flag
    return Batch(mine * scale["w"], batch.flag), total | {"order": order}

x = np.arange(24, dtype=np.float32).reshape(8, 3)
batch = Batch(x, np.arange(8) % 2 == 0)
results = {}
for devices in (1, 2, 4):
    for mode in ("jit", "pmap"):
        call = spmd(work, make_mesh(devices), (WHOLE, ROWS, WHOLE), (ROWS, WHOLE), mode=mode)
        for _ in range(2):
            out, total = call({"w": jnp.float32(2.0)}, batch, jax.random.key(3))
        results[devices, mode] = jax.device_get((out, total))
        assert results[devices, mode][0].nothing is None
first = results[1, "jit"]
assert first[0].x.shape == (8, 3) and first[1]["rows"] == 8 and first[1]["order"].shape == (8,)
for name, other in results.items():
    def same(a, b):
        np.testing.assert_allclose(a, b, 1e-5, err_msg=str(name))
    jax.tree.map(same, first, other)

# A single result, and typed keys split over the devices.
keys = jax.random.split(jax.random.key(0), 8)
draw = lambda keys: jax.vmap(jax.random.uniform)(keys)
double = lambda x: sum_over_devices(x) * 2
for mode in ("jit", "pmap"):
    # Whole arguments only.
    assert float(spmd(double, make_mesh(4), (WHOLE,), WHOLE, mode=mode)(jnp.float32(3.0))) == 24.0
    found = spmd(draw, make_mesh(4), (ROWS,), ROWS, mode=mode)(keys)
    np.testing.assert_allclose(found, draw(keys), 1e-6)
"""

METHOD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from common.dist import make_mesh, replicate, shard_batch
from reoac_jax.engine import compile_rollout, compile_update
from reoac_jax.learner import init_state
from reoac_jax.settings import feature_size
from tests.reoac_jax import toy_setting as toy

algo = sys.argv[1]
backbone, tables = toy.tiny_e2d2() if algo == "plus" else toy.toy_backbone(), toy.toy_tables()
params = jax.jit(backbone.init)(jax.random.key(0))
# Rows that end at different steps, so that devices leave their loops at different times.
rollout_settings = toy.toy_settings(
    max_steps=4, selection_mode="sample", sample_strategy="sample",
    num_sigma_steps=4,
)
rows, horizon = [0, 0, 1, 1, 2, 2, 5, 5], 4
settings = toy.learner_settings(
    algo=algo, max_steps=horizon, backbone_rows=15, backbone_batch=3, minibatch=16,
)
size = feature_size(rollout_settings, backbone.hidden_size, algo)
canvas = toy.toy_canvas(rows).replace(row_id=jnp.arange(8, dtype=jnp.uint32))
agent = toy.toy_agent(rollout_settings, backbone, algo)
buffer = toy.made_up_buffer(6, horizon, size)
reward = jnp.asarray([1.0, 0, 1, 0.5, 0, 0, 0.2, 1])

def one_run(devices, mode):
    mesh = make_mesh(devices)
    rollout = compile_rollout(backbone, rollout_settings, tables, algo, mesh, mode)
    update = compile_update(backbone, settings, rollout_settings, mesh, mode)
    state = init_state(jax.random.key(1), settings, params, size, 8, 8)
    state = replicate(mesh, jax.tree.map(jnp.copy, state))
    episodes = rollout(replicate(mesh, params), agent, shard_batch(mesh, canvas), jax.random.key(2))
    for number in range(2):
        if algo == "plus":
            targets = toy.made_up_targets(rows)
            state, metrics = update(state, episodes, reward, targets, jax.random.key(number))
        else:
            state, metrics = update(state, buffer, jnp.int32(5))
    return jax.device_get((episodes, state, metrics))

runs = {name: one_run(*name) for name in ((1, "jit"), (4, "jit"), (4, "pmap"))}
episodes, state, metrics = runs[1, "jit"]
assert episodes.steps.active.any() and episodes.relation is None
if algo == "plus":
    print("steps of the rows:", episodes.num_steps)
    assert len(set(episodes.num_steps.tolist())) > 1
    assert metrics["backbone/sft"] > 0 and metrics["backbone/pg"] != 0
else:
    assert metrics["backbone/loss"] != 0
for name, (other, other_state, other_metrics) in runs.items():
    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str(name))
    jax.tree.map(same, episodes, other)
    for part in ("actor", "critic", "target_critic", "stats", "iteration"):
        jax.tree.map(same, getattr(state, part), getattr(other_state, part))
    jax.tree.map(same, metrics, other_metrics)
    # Moments rather than weights: Adam's first steps turn a gradient of 1e-12 into a full step.
    jax.tree.map(same, state.backbone_opt, other_state.backbone_opt)
"""

CACHED = """
import jax, numpy as np
from common.dist import make_mesh, shard_batch
from reoac_jax.engine import compile_rollout
from reoac_jax.scratch import make_backbone
from tests.reoac_jax import test_e2d2_blocks as cases
from tests.reoac_jax import toy_setting as toy

backbone = make_backbone(cases.SHARED, block_cache=True)
params, tables = cases.lively(backbone), toy.toy_tables()
settings = toy.toy_settings(max_steps=8, gen_len=cases.GEN, branching=True, branch_k=2)
agent = toy.toy_agent(settings, backbone, "plus")
canvas = jax.device_get(cases.canvas_of([1, 5, 8, 3, 4, 2, 7, 6]))
runs = {}
for devices, mode in ((1, "jit"), (4, "jit"), (4, "pmap")):
    mesh = make_mesh(devices)
    rollout = compile_rollout(backbone, settings, tables, "plus", mesh, mode)
    episodes = rollout(params, agent, shard_batch(mesh, canvas), jax.random.key(0))
    runs[devices, mode] = jax.device_get((episodes.final_ids, episodes.cost, episodes.num_forwards))
first = runs[1, "jit"]
assert len(set(first[2].tolist())) > 1
for name, other in runs.items():
    for a, b in zip(first, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(name))
"""


def run_on_four(program: str, *arguments: str) -> None:
    # Compiling takes nearly all of the time, and speed of the result does not matter here.
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    flags = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), flags]))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_devices_and_modes_agree_on_primitives() -> None:
    run_on_four(PRIMITIVES)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("algo", ["plus", "paper"])
def test_devices_and_modes_agree_on_the_method(algo: str) -> None:
    run_on_four(METHOD, algo)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_devices_and_modes_agree_on_cached_blocks() -> None:
    run_on_four(CACHED)


@pytest.mark.parametrize("mode", MODES)
def test_one_device_compiles_once(mode: str) -> None:
    traces = []

    def work(scale: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        traces.append(1)
        whole = all_rows(x)
        return own_slice(whole) * scale, sum_over_devices(x.sum())

    call = spmd(work, make_mesh(1), (WHOLE, ROWS), (ROWS, WHOLE), mode=mode)
    for factor in (1.0, 3.0):
        x = jnp.arange(4.0) * factor
        out, total = call(jnp.float32(2.0), x)
        np.testing.assert_allclose(out, 2 * x)
        assert float(total) == float(x.sum())
    assert len(traces) == 1


def test_donated_arguments_are_reused() -> None:
    call = spmd(lambda x: x + 1, make_mesh(1), (WHOLE,), WHOLE, donate=(0,))
    state = jax.device_put(jnp.arange(4.0), jax.sharding.NamedSharding(make_mesh(1), jax.P()))
    assert call(state).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert state.is_deleted()


def test_unknown_mode() -> None:
    with pytest.raises(UserError, match=r"parallel\.mode='both'.*jit, pmap"):
        spmd(lambda x: x, make_mesh(1), (ROWS,), ROWS, mode="both")
