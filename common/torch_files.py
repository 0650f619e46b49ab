"""Weights in files and as NumPy arrays: PyTorch checkpoints in, safetensors in and out.

Nothing here runs code from a checkpoint, and safetensors files need no PyTorch.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError

Tensors = dict[str, np.ndarray]

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "state.model.", "model.")
"""Prefixes that training wrappers put in front of every name; stripped by default."""

_EMA_MARKER = "ema_model.named_parameters_dict."
_SHADOW_PREFIX = "ema.shadow_params."
_CONTAINERS = ("state_dict.", "state.model.")
_PREFERRED_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


# ------------------------------------------------------------------------------------- reading
def find_weights(path: str | os.PathLike[str]) -> Path:
    """The weight file (or shard index) a path stands for.

    Args:
        path: A file, or a directory in hub layout or with one checkpoint file.

    Returns:
        Path of the file.

    Raises:
        UserError: Nothing or more than one candidate was found.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"no weights at '{path}': neither a file nor a directory")
    for name in _PREFERRED_FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", *_PICKLE_SUFFIXES))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"no weights in '{path}': expected one of {', '.join(_PREFERRED_FILES)}")
    names = ", ".join(p.name for p in found)
    raise UserError(f"several weight files in '{path}' ({names}): name one of them")


def read_tensors(path: str | os.PathLike[str], strip: Sequence[str] = WRAPPER_PREFIXES) -> Tensors:
    """Reads the weights of a PyTorch checkpoint.

    Exponential moving averages stored by name are preferred over the raw weights.

    Args:
        path: Directory or file: safetensors, sharded safetensors or pickles with an index, or a
            pickle (`.bin`, `.ckpt`, `.pt`, `.pth`, read without executing code).
        strip: Prefixes removed from the front of every name, repeatedly.

    Returns:
        Arrays by name; every floating dtype becomes float32, other dtypes stay.

    Raises:
        UserError: The file is unreadable, truncated or not a checkpoint, or two names become one.
    """
    return read_checkpoint(path, strip).tensors


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        tensors: The model's own weights by name.
        averages: An exponential moving average stored without names, in the order of the model's
            parameters (`ema.shadow_params` of Lightning and score-based training loops), or None.
    """

    tensors: Tensors
    averages: list[np.ndarray] | None


def read_checkpoint(
    path: str | os.PathLike[str], strip: Sequence[str] = WRAPPER_PREFIXES
) -> Checkpoint:
    """`read_tensors`, and the unnamed averages that a training checkpoint may hold beside them."""
    source = find_weights(path)
    averages = None
    if source.name.endswith(".index.json"):
        raw = _read_sharded(source)
    elif source.suffix == ".safetensors":
        raw = _read_safetensors(source)
    else:
        raw, averages = _read_pickle(source)
    tensors: Tensors = {}
    for name, value in raw.items():
        short = strip_prefixes(name, strip)
        if short in tensors:
            raise UserError(f"tensor '{short}' occurs twice in '{source}' under different prefixes")
        tensors[short] = value
    return Checkpoint(tensors, averages)


def strip_prefixes(name: str, prefixes: Sequence[str]) -> str:
    """Removes any of the prefixes from the front of a name until none is left."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in prefixes:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    return name


def _read_sharded(index_file: Path) -> Tensors:
    """Reads every shard that an index file lists."""
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{index_file}' is not a shard index: {error}") from error
    tensors: Tensors = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise UserError(f"'{index_file}' points outside its directory: '{shard}'")
        shard_file = index_file.parent / shard
        if not shard_file.is_file():
            raise UserError(f"shard '{shard_file}' listed in '{index_file.name}' does not exist")
        tensors.update(_read_file(shard_file))
    for name, shard in weight_map.items():
        if name not in tensors:
            raise UserError(f"tensor '{name}' is not in its shard '{index_file.parent / shard}'")
    return tensors


def _read_file(path: Path) -> Tensors:
    """Reads one weight file."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)[0]


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return {name: _as_float32(value) for name, value in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read '{path}': {_first_line(error)}") from error


def _read_pickle(path: Path) -> tuple[Tensors, list[np.ndarray] | None]:
    """Named weights and unnamed averages of a pickle."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading '{path}' needs PyTorch: install torch, or convert it") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged or unsafe files
        raise UserError(f"cannot read '{path}': {_first_line(error)}") from error
    everything = _collect(loaded, torch.Tensor)
    averaged = {
        int(index): value
        for name, value in everything.items()
        if (index := name.removeprefix(_SHADOW_PREFIX)) != name and index.isdigit()
    }
    found = _select_weights(everything)
    if not found:
        raise UserError(f"'{path}' holds no tensors")
    tensors = {name: _from_torch(value, torch) for name, value in found.items()}
    averages = [_from_torch(averaged[i], torch) for i in sorted(averaged)]
    return tensors, averages or None


def _collect(node: Any, kind: type, prefix: str = "") -> dict[str, Any]:
    """Names every tensor inside nested dictionaries and lists by its dotted path."""
    if isinstance(node, kind):
        return {prefix[:-1]: node}
    if isinstance(node, Mapping):
        items: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return {}
    found: dict[str, Any] = {}
    for key, value in items:
        found.update(_collect(value, kind, f"{prefix}{key}."))
    return found


def _select_weights(found: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps the model weights of a training checkpoint: named averages, else the model's own."""
    averaged = {
        name.partition(_EMA_MARKER)[2]: value
        for name, value in found.items()
        if _EMA_MARKER in name
    }
    if averaged:
        return averaged
    for container in _CONTAINERS:
        inner = {n[len(container) :]: v for n, v in found.items() if n.startswith(container)}
        if inner:
            return inner
    # A flat `{"model": {...}, "ema": {...}}` checkpoint: the rest is optimiser state.
    if any(n.startswith("model.") for n in found) and any(
        n.startswith(("ema.", "optimizer.", "optimizer_states.")) for n in found
    ):
        return {n: v for n, v in found.items() if n.startswith("model.")}
    return dict(found)


def _from_torch(tensor: Any, torch: Any) -> np.ndarray:
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
    return tensor.detach().cpu().numpy()


def _as_float32(value: np.ndarray) -> np.ndarray:
    # ml_dtypes floats (bfloat16 and the 8-bit ones) are not np.floating, only kind "V" or "f".
    if value.dtype.kind in "biu":
        return value
    return value.astype(np.float32)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# ------------------------------------------------------------------------------------- writing
def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors to a safetensors file that appears only when complete.

    Args:
        path: Target file; replaced if it exists.
        tensors: Arrays by name, written in their own dtype.
        metadata: Extra header strings; `format: pt` is always there, as PyTorch readers ask for it.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(arrays, partial, metadata={"format": "pt", **(metadata or {})})
        partial.chmod(0o644)  # the library creates files that only their owner may read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
