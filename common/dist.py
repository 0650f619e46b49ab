"""Devices of one or many hosts: starting, the mesh, placing arrays on it, bringing them back."""

import contextlib
import os
import re
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common import processes, startup
from common.errors import UserError
from common.processes import any_process, barrier, is_main, on_main

__all__ = [
    "DATA_AXIS",
    "any_process",
    "barrier",
    "batch_sharded",
    "from_own_rows",
    "gather",
    "initialize",
    "gather_rows",
    "is_main",
    "local_rows",
    "make_mesh",
    "on_main",
    "own_rows",
    "place",
    "replicate",
    "replicated",
    "shard_batch",
]

DATA_AXIS = "data"
START_TIMEOUT_S = 300  # for all processes to arrive

Tree = TypeVar("Tree")


def _room_for_forced_devices() -> None:
    """One XLA thread for each forced host device and for its loops.

    The pool is as large as the machine has cores. Devices that wait for each other in a collective
    each hold a thread; with more devices than cores the last one may never get its own, and XLA
    ends the process after 40 s. NPROC is read when the first device is asked for.
    """
    forced = re.search(
        r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    if forced and int(forced.group(1)) > 1:
        os.environ.setdefault("NPROC", str(4 * max(int(forced.group(1)), os.cpu_count() or 1)))


_room_for_forced_devices()


def initialize(how: startup.Start | None = None) -> None:
    """Starts the device runtime; call once, before any other use of devices.

    Joins the other processes of the command where the environment names some (see
    `common.startup` for the decision table), and is harmless alone.

    Args:
        how: the decision where it was made already; None = by the table.

    Raises:
        UserError: the environment is incomplete, another process did not come, or no device.
    """
    how = startup.decide() if how is None else how
    if how.num_processes > 1 and not _joined():
        options: dict[str, Any] = {}
        if how.local_devices is not None:
            options["local_device_ids"] = list(how.local_devices)
        try:
            jax.distributed.initialize(
                how.coordinator,
                how.num_processes,
                how.process_id,
                initialization_timeout=START_TIMEOUT_S,
                **options,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(
                f"process {how.process_id} of {how.num_processes} could not join the coordinator "
                f"{how.coordinator} ({reason}); check that all processes started and that the "
                "address can be reached"
            ) from error
    processes.started(how)
    try:
        jax.devices()
    except RuntimeError as error:
        raise UserError(f"no device: {error}; set JAX_PLATFORMS=cpu to run without one") from error


def _joined() -> bool:
    with contextlib.suppress(AttributeError):
        return bool(jax.distributed.is_initialized())
    return False


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Makes a mesh with the single axis `data` over the devices of all processes.

    The devices of a process are neighbours, so each process holds one range of every batch.

    Args:
        num_devices: how many devices to use, None or 0 for all; of several processes always all.

    Raises:
        UserError: if there are fewer, or a part of several processes' devices is wanted.
    """
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    count = num_devices or len(devices)
    if not 1 <= count <= len(devices):
        raise UserError(f"{count} devices wanted, {len(devices)} found ({devices[0].platform})")
    if jax.process_count() > 1 and count != len(devices):
        raise UserError(
            f"parallel.num_devices={count}, but {jax.process_count()} processes share "
            f"{len(devices)} devices; set it to 0 and start fewer processes instead"
        )
    # Not jax.make_mesh: its axes are Explicit, which refuses products over sharded dimensions.
    return Mesh(np.array(devices[:count]), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding under which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def place(tree: Tree, shardings: Any) -> Tree:
    """Puts arrays where a tree of shardings (or one for all) says; typed RNG keys too.

    Args:
        tree: arrays that every process holds whole (NumPy, or on one device), or global ones.
        shardings: a sharding, or a tree of them of the same structure.

    Returns:
        Global arrays; each process copies only what its own devices hold.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_place_leaf, tree, shardings)


def _place_leaf(leaf: Any, sharding: Any) -> Any:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data, spec = jax.random.key_data(leaf), sharding.spec
        raw = _place_leaf(data, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
        kind = str(jax.random.key_impl(leaf))
        wrap = jax.jit(lambda x: jax.random.wrap_key_data(x, impl=kind), out_shardings=sharding)
        return wrap(raw)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Puts a whole copy of every array (typed RNG keys too) on every device."""
    return place(tree, replicated(mesh))


def shard_batch(mesh: Mesh, tree: Tree) -> Tree:
    """Splits the leading axis of every array over the devices.

    Args:
        mesh: a mesh of `make_mesh`.
        tree: arrays [B, ...], B a multiple of the number of devices; whole on every process.

    Raises:
        UserError: if B is not a multiple; names the array.
    """
    count = mesh.shape[DATA_AXIS]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shape = np.shape(leaf)
        if not shape or shape[0] % count:
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "the batch"
            size = f"of {shape[0]}" if shape else "missing: it"
            raise UserError(
                f"{name}: leading axis {size} cannot be split over {count} devices; choose a "
                "batch size that is a multiple of it"
            )
    return place(tree, batch_sharded(mesh))


def own_rows(mesh: Mesh, num_rows: int) -> slice:
    """Which rows of a batch of `num_rows` lie on this process's devices; all of them alone.

    Args:
        mesh: a mesh of `make_mesh`.
        num_rows: B, a multiple of the number of devices.

    Raises:
        UserError: if B is not a multiple.
    """
    count = mesh.shape[DATA_AXIS]
    if num_rows % count:
        raise UserError(
            f"a batch of {num_rows} rows cannot be split over {count} devices; choose a batch "
            "size that is a multiple of it"
        )
    share = num_rows // count
    mine = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]
    return slice(mine[0] * share, (mine[-1] + 1) * share)


def from_own_rows(mesh: Mesh, tree: Tree, num_rows: int) -> Tree:
    """Makes batches of `num_rows` rows from the rows that each process holds.

    Args:
        mesh: a mesh of `make_mesh`.
        tree: arrays of the rows `own_rows(mesh, num_rows)`, on the host.
        num_rows: B, rows of the whole batch.
    """
    sharding = batch_sharded(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def join(leaf: Any) -> Any:
        local = np.asarray(leaf)
        shape = (num_rows, *local.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return jax.tree.map(join, tree)


def local_rows(tree: Any) -> Any:
    """The rows of batch-sharded arrays that lie on this process's devices, as NumPy, in order."""

    def rows(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        parts = {s.index[0].start or 0: s.data for s in leaf.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(rows, tree)


def gather(tree: Any) -> Any:
    """Brings every array to every host, whole, as numpy; RNG keys come as their raw integers.

    A collective call: every process makes it.
    """

    def to_host(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
                whole = replicated(leaf.sharding.mesh)
                leaf = jax.jit(lambda x: x, out_shardings=whole)(leaf)
        return np.asarray(jax.device_get(leaf))

    return jax.tree.map(to_host, tree)


def gather_rows(local: np.ndarray) -> np.ndarray:
    """Joins the rows that each process worked out on its host, in the order of the processes.

    Args:
        local: [b, ...] of this process, the same b on all of them.

    Returns:
        [B, ...], the same on every process.
    """
    if jax.process_count() == 1:
        return local
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(local, tiled=True))
