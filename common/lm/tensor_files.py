"""Safetensors files as a mapping that reads a tensor when it is asked for.

A model of several billion weights is then placed on the devices tensor by tensor, and never stands
in host memory as a whole.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, require
from common.torch_bridge import find_weights, read_tensors


class StoredTensor:
    """A tensor in a file: its shape now, its values when NumPy asks for them.

    Attributes:
        shape: As stored.
    """

    def __init__(self, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
        """Keeps how to read the values."""
        self.shape = tuple(shape)
        self._read = read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, read anew on every call, in the file's dtype unless another is asked for."""
        value = self._read()
        return value if dtype is None else value.astype(dtype)


Stored = Mapping[str, Any]  # name -> StoredTensor or array


def open_tensors(path: str | Path) -> Stored:
    """Opens the weights of a Hugging Face model directory (or one weight file).

    Args:
        path: Directory with `model.safetensors`, with shards and `model.safetensors.index.json`,
            or with PyTorch pickles; or one such file. Pickles are read at once.

    Returns:
        Tensors by their full names.

    Raises:
        UserError: Nothing to read, a damaged file, a shard that is missing, or a tensor that is
            in two shards or in none.
    """
    try:
        source = find_weights(path)
    except UserError as error:
        raise UserError(f"{error}; copy the weights there, or name another model") from error
    if source.name.endswith(".safetensors.index.json"):
        return _open_shards(source)
    if source.suffix == ".safetensors":
        return dict(_open_file(source))
    return read_tensors(source, strip=())


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    """Every shard's tensors, checked against the index in both directions."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{index}' is not a shard index: {error}") from error
    tensors: dict[str, StoredTensor] = {}
    origin: dict[str, str] = {}
    for shard in shards:
        path = index.parent / shard
        require(Path(shard).name == shard, f"'{index}' points outside its directory: '{shard}'")
        require(path.is_file(), f"shard '{path}' listed in '{index.name}' does not exist")
        for name, tensor in _open_file(path):
            require(
                name not in origin,
                f"tensor '{name}' is in two shards of '{index}': {origin.get(name)} and {shard}",
            )
            tensors[name], origin[name] = tensor, shard
    for name, shard in weight_map.items():
        require(
            origin.get(name) == shard,
            f"tensor '{name}' is not in its shard '{index.parent / shard}'",
        )
    return tensors


def _open_file(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Names and shapes of one file's tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="np")
        names = list(handle.keys())
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read '{path}': {reason}; copy the file again") from error
    for name in names:
        shape = tuple(handle.get_slice(name).get_shape())
        yield name, StoredTensor(shape, lambda name=name: handle.get_tensor(name))  # type: ignore[misc]
