"""One function per device: the same per-shard code under `jit` over a mesh or under `pmap`.

A per-shard function sees its rows of every sharded argument, a whole copy of every replicated one,
and the axis name `DATA_AXIS` for collectives. Both modes run the same code, so they agree.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.dist import DATA_AXIS, from_own_rows, local_rows, own_rows, place
from common.errors import UserError

ROWS = "rows"  # split over the devices along the leading axis
WHOLE = "whole"  # one copy per device
MODES = ("jit", "pmap")


def spmd(
    fn: Callable[..., Any],
    mesh: Mesh,
    in_specs: tuple[Any, ...],
    out_specs: tuple[Any, ...] | str,
    *,
    mode: str = "jit",
    donate: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Compile a per-shard function for all devices of a mesh.

    Args:
      fn: takes one positional argument per in_spec; uses `DATA_AXIS` in its collectives.
      mesh: from `common.dist.make_mesh`.
      in_specs, out_specs: ROWS or WHOLE for each argument and result (pytrees share one spec), or
        a tree of partition specs (mode "jit"; see `common.fsdp`). WHOLE results must be equal on
        all devices (the code has reduced them).
      mode: "jit" (shard_map under jit) or "pmap".
      donate: arguments whose buffers may be reused.

    Returns:
      a function of the global arrays. In pmap mode arguments are split here, so both modes take
      and return the same global shapes.

    Raises:
      UserError: unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"config key parallel.mode={mode!r} is none of {', '.join(MODES)}")
    if mode == "jit":
        mapped = jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=tuple(_partition(s) for s in in_specs),
            out_specs=_partition(out_specs)
            if isinstance(out_specs, str)
            else tuple(_partition(s) for s in out_specs),
            check_vma=False,
        )
        compiled = jax.jit(mapped, donate_argnums=donate)
        if jax.process_count() == 1:
            return compiled
        specs = tuple(_partition(s) for s in in_specs)
        return lambda *args: compiled(
            *(_global(mesh, a, s) for a, s in zip(args, specs, strict=True))
        )
    if any(not isinstance(spec, str) for spec in in_specs):
        raise UserError("arrays split over the devices (parallel.fsdp) need parallel.mode=jit")
    # The devices of this process: under pmap every process brings its own rows.
    count = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
    first = sum(d.process_index < jax.process_index() for d in mesh.devices.flat)
    # Only replicated results are returned unsplit; donated buffers are a jit-mode optimisation.
    # pmap wants an argument that is split even where all of ours are whole: the device numbers.
    in_axes = (0, *(0 if s == ROWS else None for s in in_specs))
    numbers = np.arange(first, first + count)
    results = (out_specs,) if isinstance(out_specs, str) else out_specs
    parallel = jax.pmap(
        lambda _, *args: _as_tuple(fn(*args), out_specs),
        axis_name=DATA_AXIS,
        in_axes=in_axes,
        devices=list(mesh.devices.flat),
    )

    def call(*args: Any) -> Any:
        own = [_own(a, s, mesh) for a, s in zip(args, in_specs, strict=True)]
        split = [_split(a, count) if s == ROWS else a for a, s in zip(own, in_specs, strict=True)]
        outs = parallel(numbers, *split)
        joined = tuple(
            _shared(_join(out) if s == ROWS else jax.tree.map(lambda x: x[0], out), s, mesh)
            for out, s in zip(outs, results, strict=True)
        )
        return joined[0] if isinstance(out_specs, str) else joined

    return call


def _as_tuple(value: Any, out_specs: tuple[str, ...] | str) -> tuple[Any, ...]:
    return (value,) if isinstance(out_specs, str) else tuple(value)


def _partition(spec: Any) -> Any:
    if not isinstance(spec, str):
        return spec
    return PartitionSpec(DATA_AXIS) if spec == ROWS else PartitionSpec()


def _global(mesh: Mesh, tree: Any, spec: Any) -> Any:
    """Several processes: what each of them holds whole on its host becomes one global array."""
    if not isinstance(spec, PartitionSpec):
        return tree
    sharding = NamedSharding(mesh, spec)

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        return place(leaf, sharding)

    return jax.tree.map(whole, tree)


def _own(tree: Any, spec: str, mesh: Mesh) -> Any:
    """Several processes under pmap: the part of global arrays that lies here, on the host."""
    if jax.process_count() == 1:
        return tree

    def part(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return local_rows(leaf) if spec == ROWS else leaf.addressable_data(0)
        return leaf[own_rows(mesh, leaf.shape[0])] if spec == ROWS else leaf

    return jax.tree.map(part, tree)


def _shared(tree: Any, spec: str, mesh: Mesh) -> Any:
    """Undoes `_own`."""
    if jax.process_count() == 1:
        return tree
    if spec == WHOLE:
        return place(tree, NamedSharding(mesh, PartitionSpec()))
    count, share = mesh.devices.size, len(jax.local_devices())
    return jax.tree.map(lambda x: from_own_rows(mesh, x, x.shape[0] * count // share), tree)


def _split(tree: Any, count: int) -> Any:
    def split(x: Any) -> Any:
        shape = (count, x.shape[0] // count, *x.shape[1:])
        # An empty array loses its sharding when it is reshaped, and pmap then refuses it.
        return x.reshape(shape) if x.size else np.zeros(shape, x.dtype)

    return jax.tree.map(split, tree)


def _join(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def all_rows(tree: Any) -> Any:
    """Inside a per-shard function: every device's rows, in order, on every device."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, DATA_AXIS, tiled=True), tree)


def own_slice(x: jax.Array) -> jax.Array:
    """Inside a per-shard function: this device's share of a whole array's leading axis."""
    count = jax.lax.axis_size(DATA_AXIS)
    share = x.shape[0] // count
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(DATA_AXIS) * share, share)


def sum_over_devices(tree: Any) -> Any:
    """Inside a per-shard function: the sum of every device's value.

    On one device it is the value itself: a collective would copy it.
    """
    return tree if jax.lax.axis_size(DATA_AXIS) == 1 else jax.lax.psum(tree, DATA_AXIS)
