"""Meshes and placement, on one device here and on four forced ones in a subprocess."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import dist
from common.errors import UserError

FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from common import dist
from common.checkpoint import Checkpointer
from common.errors import UserError
import sys, tempfile

dist.initialize()
assert dist.is_main() and len(jax.devices()) == 4
mesh = dist.make_mesh()
assert mesh.shape == {"data": 4}
assert dist.make_mesh(2).shape == {"data": 2}

x = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
w = np.arange(9, dtype=np.float32).reshape(3, 3)
batch = dist.shard_batch(mesh, {"x": x})
params = dist.replicate(mesh, {"w": w, "key": jax.random.key(1)})
assert len(batch["x"].addressable_shards) == 4
assert batch["x"].addressable_shards[0].data.shape == (2, 3)
assert params["w"].sharding.is_fully_replicated and params["key"].sharding.is_fully_replicated

@jax.jit
def gram(params, batch):
    y = batch["x"] @ params["w"]
    return y @ y.T, y.sum()  # a product over the sharded axis

product, total = gram(params, batch)
np.testing.assert_allclose(dist.gather(product), (x @ w) @ (x @ w).T)
np.testing.assert_allclose(dist.gather(total), (x @ w).sum())
np.testing.assert_array_equal(dist.gather(batch)["x"], x)

try:
    dist.shard_batch(mesh, {"inner": {"tokens": x[:6]}})
except UserError as error:
    assert "inner/tokens" in str(error) and "6" in str(error) and "4 devices" in str(error), error
else:
    raise AssertionError("6 rows were split over 4 devices")

# A checkpoint comes back with today's shardings, also those of another number of devices.
with Checkpointer(tempfile.mkdtemp()) as checkpointer:
    checkpointer.save(1, {"params": params, "x": batch["x"]}, {})
    for n in (4, 2, 1):
        smaller = dist.make_mesh(n)
        target = {
            "params": dist.replicate(smaller, {"w": w, "key": jax.random.key(0)}),
            "x": dist.shard_batch(smaller, jnp.zeros_like(x)),
        }
        state, _ = checkpointer.restore(target)
        assert state["x"].sharding == target["x"].sharding
        assert state["params"]["key"].sharding.is_fully_replicated
        np.testing.assert_array_equal(dist.gather(state["x"]), x)
        np.testing.assert_array_equal(dist.gather(state["params"]["w"]), w)
print("fine")
"""


def test_four_devices() -> None:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FOUR_DEVICES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("fine")


def test_alone_it_is_harmless() -> None:
    dist.initialize()
    dist.initialize()
    assert dist.is_main()
    mesh = dist.make_mesh(1)
    tree = {"x": np.ones((3, 2), np.float32), "key": jax.random.key(3)}
    placed = dist.replicate(mesh, tree)
    back = dist.gather(placed)
    np.testing.assert_array_equal(back["x"], tree["x"])
    np.testing.assert_array_equal(back["key"], jax.random.key_data(tree["key"]))
    np.testing.assert_array_equal(dist.gather(dist.shard_batch(mesh, jnp.ones((3, 2)))), 1.0)


def test_too_many_devices() -> None:
    with pytest.raises(UserError, match="1000 devices wanted"):
        dist.make_mesh(1000)


def test_a_scalar_cannot_be_split() -> None:
    with pytest.raises(UserError, match="temperature: leading axis missing"):
        dist.shard_batch(dist.make_mesh(1), {"temperature": jnp.float32(1)})


def test_a_partial_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="SLURM_JOB_ID and SLURM_PROCID and .* is not set"):
        dist.initialize()


def test_one_process_holds_every_row() -> None:
    mesh = dist.make_mesh(1)
    assert dist.own_rows(mesh, 6) == slice(0, 6)
    x = np.arange(6.0).reshape(3, 2)
    batch = dist.from_own_rows(mesh, {"x": x}, 3)
    np.testing.assert_array_equal(dist.local_rows(batch)["x"], x)
    np.testing.assert_array_equal(dist.gather_rows(x), x)


def test_agreement_of_one_process() -> None:
    assert dist.on_main(lambda: (1, 2)) == (1, 2)
    assert dist.any_process(True) and not dist.any_process(False)
    dist.barrier("alone", timeout_s=0.1)


@pytest.mark.parametrize(
    ("flags", "given", "kept"),
    [
        ("--xla_force_host_platform_device_count=64", None, 256),
        ("--xla_force_host_platform_device_count=64", "3", 3),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ],
)
def test_forced_devices_find_threads(
    flags: str, given: str | None, kept: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist.os, "cpu_count", lambda: 2)
    monkeypatch.setenv("XLA_FLAGS", flags)
    # Set first in either case, so that what the function sets is undone.
    monkeypatch.setenv("NPROC", given or "")
    if given is None:
        monkeypatch.delenv("NPROC")
    dist._room_for_forced_devices()
    assert os.environ.get("NPROC") == (None if kept is None else str(kept))
