"""What a group of processes is made to do in `test_dist_group`; the same functions run alone too.

    python -m tests.common.group_work DIRECTORY TASK...

A process takes its number and the coordinator from the environment, and the main one writes
DIRECTORY/TASK.npz.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from common import dist, flags
from common.checkpoint import Checkpointer
from common.errors import Interrupted, UserError
from common.fsdp import Layout
from common.spmd import ROWS, WHOLE, all_rows, spmd, sum_over_devices

ROWS_OF_REOAC = [0, 0, 1, 1, 2, 2, 5, 5]
Arrays = dict[str, Any]


def reoac(mesh: Mesh, fsdp: bool) -> Arrays:
    """Two updates of REOAC (plus) from episodes that were made up; clipping is on."""
    from reoac_jax.engine import compile_update
    from reoac_jax.learner import init_state, state_specs
    from reoac_jax.settings import feature_size
    from tests.reoac_jax import toy_setting as toy

    backbone = toy.toy_backbone(hidden_size=64)
    rollout = toy.toy_settings(max_steps=3)
    settings = toy.learner_settings(
        max_steps=3, epochs=1, minibatch=24, backbone_rows=8, backbone_batch=2,
        optim={"grad_clip": 0.05},
    )  # fmt: skip
    size = feature_size(rollout, backbone.hidden_size, "plus")

    def make() -> Any:
        params = backbone.init(jax.random.key(0))
        return init_state(jax.random.key(1), settings, params, size, 8, 8)

    shapes = jax.eval_shape(make)
    layout = Layout.of(shapes.backbone, mesh, fsdp)
    specs = state_specs(shapes, layout)
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
    state = jax.jit(make, out_shardings=places)()
    update = compile_update(backbone, settings, rollout, mesh, "jit", layout, shapes)
    episodes = toy.made_up_episodes(ROWS_OF_REOAC, 3, size)
    reward = np.asarray([1.0, 0, 1, 0.5, 0, 0, 0.2, 1], np.float32)
    rows = (episodes, reward, toy.made_up_targets(ROWS_OF_REOAC))
    mine = dist.own_rows(mesh, len(reward))
    rows = dist.from_own_rows(mesh, jax.tree.map(lambda x: x[mine], rows), len(reward))
    for number in range(2):
        state, metrics = update(state, *rows, jax.random.key(number))
    if fsdp and mesh.devices.size > 1:
        cut = [x for x in jax.tree.leaves(state.backbone_opt) if not x.is_fully_replicated]
        assert cut, "no moment is cut"
        part = cut[0].addressable_shards[0].data
        assert part.size * mesh.devices.size == cut[0].size
    return {"state": _named(state), "metrics": _named(metrics)}


def halting(mesh: Mesh, fsdp: bool) -> Arrays:
    """Four steps of the parity task in two calls; clipping is on."""
    state, run, row_ids = _halting(mesh, fsdp)
    for _ in range(2):
        state, sums = run(state, row_ids, (), 2)
    values = {"means": sums.means, "norm": sums.grad_norm, "histogram": sums.ponder.histogram}
    return {"state": _named(state), "metrics": _named(values)}


def _halting(mesh: Mesh, fsdp: bool) -> tuple[Any, Any, Any]:
    from halting_jax.defaults import finalize
    from halting_jax.learner import compile_steps, make_step
    from halting_jax.train import fresh_state, make_source, optim_settings

    config = flags.load_config("configs/halting_parity.py:tiny")
    with config.unlocked():
        config.parallel.fsdp = fsdp
        config.model.hidden_size = 32
        config.optim.clip_norm = 0.05
    finalize(config)
    source, built = make_source(config, Path())
    settings = optim_settings(config, 20, 0)
    state, layout = fresh_state(config, built, source, settings, mesh)
    step = make_step(built.task, built.model, built.objective, settings, layout)
    shapes = jax.eval_shape(lambda: state)
    run = compile_steps(step, source.draw, mesh, "jit", layout, shapes)
    return state, run, dist.shard_batch(mesh, np.arange(16, dtype=np.int32))


def _tree(mesh: Mesh) -> tuple[Any, Any]:
    """Arrays of every kind that a checkpoint may hold, and the same without values."""
    host = {
        "cut": np.arange(64 * 32, dtype=np.float32).reshape(64, 32),
        "rows": np.arange(8 * 3, dtype=np.int32).reshape(8, 3),
        "whole": np.float32(0.5),
        "key": jax.random.key(7),
    }
    layout = Layout.of({"cut": host["cut"]}, mesh, True)
    places = {
        "cut": layout.shardings(mesh, host["cut"]),
        "rows": dist.batch_sharded(mesh),
        "whole": dist.replicated(mesh),
        "key": dist.replicated(mesh),
    }
    state = dist.place(host, places) | {
        "on the host": np.arange(5),
        "empty": np.zeros((0, 2), np.float32),
    }
    blank = jax.tree.map(lambda x: x if x.ndim == 0 else np.zeros_like(x), host)
    blank["key"] = jax.random.key(0)
    return state, dist.place(blank, places) | {
        "on the host": np.zeros(5, np.int64),
        "empty": np.zeros((0, 2), np.float32),
    }


def save(mesh: Mesh, directory: Path) -> None:
    """Every process saves its parts; older steps leave, and a refused restore names its reason."""
    state, _ = _tree(mesh)
    with Checkpointer(directory / "checkpoints", keep=1, settings={"n": 1}, best="max") as steps:
        steps.save(1, state, {"position": 1}, metric=0.0)
        steps.save(2, state, {"position": 2}, metric=1.0)
        assert steps.all_steps() == [2] and steps.best_step() == 2


def restore(mesh: Mesh, directory: Path) -> Arrays:
    """The saved step, under today's shardings."""
    _, blank = _tree(mesh)
    root = directory / "checkpoints"
    with Checkpointer(root, settings={"n": 1}, read_only=True) as steps:
        state, host = steps.restore(blank)
    for name in ("cut", "rows", "key"):
        assert state[name].sharding.is_equivalent_to(blank[name].sharding, blank[name].ndim), name
    with Checkpointer(root, settings={"n": 2}, read_only=True) as steps:
        try:
            steps.restore(blank)
        except UserError as error:
            assert "n: saved 1, now 2" in str(error)
        else:
            raise AssertionError("other settings were accepted")
    return {"state": _named(state) | {"position": np.asarray(host["position"])}, "metrics": {}}


def primitives(mesh: Mesh) -> Arrays:
    """Placing, collectives in both modes, agreement, and the errors that all must see."""
    count, number = jax.process_count(), jax.process_index()
    x = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    mine = dist.own_rows(mesh, 8)
    assert mine.stop - mine.start == 8 // count and mine.start == number * (8 // count)
    np.testing.assert_array_equal(dist.gather_rows(x[mine]), x)
    batch = dist.from_own_rows(mesh, x[mine], 8)
    np.testing.assert_array_equal(dist.local_rows(batch), x[mine])
    np.testing.assert_array_equal(dist.gather(batch), x)

    def work(scale: jax.Array, rows: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        noise = jax.random.uniform(key, ())
        return rows * scale, {"sum": sum_over_devices(rows.sum()) + noise, "all": all_rows(rows)}

    results = []
    for mode in ("jit", "pmap"):
        call = spmd(work, mesh, (WHOLE, ROWS, WHOLE), (ROWS, WHOLE), mode=mode)
        for rows in (batch, x):  # a global array, and what every host holds
            results.append(dist.gather(call(np.float32(2), rows, jax.random.key(1))))
    for out, totals in results:
        np.testing.assert_allclose(out, 2 * x)
        np.testing.assert_allclose(totals["all"], x)
        np.testing.assert_allclose(totals["sum"], results[0][1]["sum"])

    assert dist.on_main(lambda: [number, "main"]) == [0, "main"]
    assert dist.any_process(number == count - 1) and not dist.any_process(False)

    def refuse() -> None:
        raise UserError("only the main process saw this")

    for kind, fails in ((UserError, refuse), (Interrupted, _interrupt)):
        try:
            dist.on_main(fails)
        except kind as error:
            assert "only the main process" in str(error)
        else:
            raise AssertionError("the error did not reach this process")
    dist.barrier("together")
    if number == count - 1 > 0:  # one waits where the others never come
        try:
            dist.barrier("alone", timeout_s=0.3)
        except Interrupted as error:
            assert f"process {number} of {count}" in str(error) and "'alone'" in str(error)
        else:
            raise AssertionError("the barrier let one process through")
    return {"state": {"processes": np.asarray(count)}, "metrics": {}}


def _interrupt() -> None:
    raise Interrupted("only the main process was stopped")


def _named(tree: Any) -> Arrays:
    leaves = jax.tree_util.tree_leaves_with_path(dist.gather(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def work(task: str, directory: Path) -> Arrays | None:
    """One task by its name: `reoac`, `halting`, `reoac_fsdp`, ..., `save`, `restore`."""
    mesh = dist.make_mesh()
    name, _, option = task.partition("_")
    if name in ("reoac", "halting"):
        return {"reoac": reoac, "halting": halting}[name](mesh, option == "fsdp")
    if name == "save":
        save(mesh, directory)
        return None
    return restore(mesh, directory) if name == "restore" else primitives(mesh)


def main() -> None:
    """Joins the group, works, and writes from the main process alone."""
    directory = Path(sys.argv[1])
    dist.initialize()
    for task in sys.argv[2:]:
        result = work(task, directory)
        if result is not None and dist.is_main():
            flat = {f"{part}/{k}": v for part, values in result.items() for k, v in values.items()}
            np.savez(directory / f"{task}.npz", **flat)


if __name__ == "__main__":
    main()
