"""Devices of one host: the mesh, placing arrays on it, bringing them back."""

import os
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common.errors import UserError

DATA_AXIS = "data"

Tree = TypeVar("Tree")


def initialize() -> None:
    """Starts the device runtime; call once, before any other use of devices.

    Raises:
        UserError: if a launcher started several processes of the same command. They would not
            know of each other and would all write the same run.
    """
    for variable in ("SLURM_STEP_NUM_TASKS", "JAX_NUM_PROCESSES"):
        count = os.environ.get(variable, "1")
        if count not in ("", "0", "1"):
            raise UserError(
                f"{variable}={count}: this version runs as one process that uses all devices of "
                "its host; start it with a single task"
            )
    try:
        jax.devices()
    except RuntimeError as error:
        raise UserError(f"no device: {error}; set JAX_PLATFORMS=cpu to run without one") from error


def is_main() -> bool:
    """Tells whether this process writes logs, samples and checkpoints."""
    return jax.process_index() == 0


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Makes a mesh with the single axis `data`.

    Args:
        num_devices: how many devices to use, None or 0 for all.

    Raises:
        UserError: if there are fewer.
    """
    devices = jax.devices()
    count = num_devices or len(devices)
    if not 1 <= count <= len(devices):
        raise UserError(f"{count} devices wanted, {len(devices)} found ({devices[0].platform})")
    # The default axis type is Explicit, which refuses products over sharded dimensions.
    return jax.make_mesh(
        (count,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding under which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Puts a whole copy of every array (typed RNG keys too) on every device."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(mesh: Mesh, tree: Tree) -> Tree:
    """Splits the leading axis of every array over the devices.

    Args:
        mesh: a mesh of `make_mesh`.
        tree: arrays [B, ...], B a multiple of the number of devices.

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
    return jax.device_put(tree, batch_sharded(mesh))


def gather(tree: Any) -> Any:
    """Brings every array to the host, whole, as numpy; RNG keys come as their raw integers."""

    def to_host(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(jax.device_get(leaf))

    return jax.tree.map(to_host, tree)
