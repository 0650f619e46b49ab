"""Tensor parallelism: which axis of each parameter and cache array is split over `model`.

Query, key and value projections are split by heads, so attention needs no communication; the two
products that leave the split axis (attention output, SwiGLU down) end in one sum over the devices,
which the compiler inserts. The vocabulary is split where it divides evenly.
"""

import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.errors import require
from common.lm.cache import Cache
from common.lm.config import DecoderConfig
from common.lm.decoder import build_params, param_shapes, params_by_path
from common.lm.layers import Params

MODEL_AXIS = "model"

_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attn/[qkv]/kernel", (None, MODEL_AXIS, None)),
    (r"attn/[qkv]/bias", (MODEL_AXIS, None)),
    (r"attn/o/kernel", (MODEL_AXIS, None, None)),
    (r"mlp/(gate|up)/kernel", (None, MODEL_AXIS)),
    (r"mlp/down/kernel", (MODEL_AXIS, None)),
    (r"embed/embedding", (MODEL_AXIS, None)),
    (r"head/kernel", (None, MODEL_AXIS)),
    (r".*/scale", ()),
)


def make_model_mesh(num_devices: int | None = None) -> Mesh:
    """One mesh axis `model` over the first `num_devices` devices, None = all.

    Raises:
        UserError: There are not so many devices.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    require(
        0 < count <= len(devices),
        f"{count} devices asked for tensor parallelism, {len(devices)} present",
    )
    return jax.make_mesh(
        (count,),
        (MODEL_AXIS,),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=devices[:count],
    )


def check_divides(cfg: DecoderConfig, mesh: Mesh) -> None:
    """Raises UserError where heads or the SwiGLU width do not divide by the `model` axis."""
    require(MODEL_AXIS in mesh.shape, f"the mesh {dict(mesh.shape)} has no axis '{MODEL_AXIS}'")
    count = mesh.shape[MODEL_AXIS]
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        size = getattr(cfg, name)
        require(
            size % count == 0,
            f"{name} {size} does not divide by {count} devices: choose another number of devices",
        )


def param_sharding(cfg: DecoderConfig, mesh: Mesh, path: str) -> NamedSharding:
    """Sharding of the parameter at `path` (as in `decoder.param_shapes`)."""
    axes: tuple[str | None, ...] = next(
        axes for pattern, axes in _AXES if re.fullmatch(rf"(layers/\d+/)?{pattern}", path)
    )
    if "embed" in path or "head" in path:
        axes = axes if cfg.vocab_size % mesh.shape[MODEL_AXIS] == 0 else ()
    return NamedSharding(mesh, PartitionSpec(*axes))


def shard_params(params: Params, cfg: DecoderConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """Parameters split over the mesh.

    Raises:
        UserError: The model's heads or widths do not divide by the number of devices.
    """
    check_divides(cfg, mesh)
    flat = params_by_path(params)
    return build_params(
        {path: jax.device_put(flat[path], param_sharding(cfg, mesh, path)) for path in flat}
    )


def param_shardings(cfg: DecoderConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Tree of shardings like the parameter tree, for jit's in_shardings and out_shardings."""
    check_divides(cfg, mesh)
    return build_params({path: param_sharding(cfg, mesh, path) for path in param_shapes(cfg)})


def shard_cache(cache: Cache, mesh: Mesh) -> Cache:
    """The cache split by key/value heads; lengths are on every device."""
    by_heads = NamedSharding(mesh, PartitionSpec(None, MODEL_AXIS, None, None))
    return Cache(
        keys=tuple(jax.device_put(x, by_heads) for x in cache.keys),
        values=tuple(jax.device_put(x, by_heads) for x in cache.values),
        lengths=jax.device_put(cache.lengths, NamedSharding(mesh, PartitionSpec())),
    )
