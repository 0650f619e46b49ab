"""PyTorch checkpoints as NumPy arrays, and declarative tables of parameter names.

`read_tensors` and `write_safetensors` move tensors between files and NumPy; nothing here runs
code from a checkpoint, and safetensors files need no PyTorch. A table of `Rule`s says which
tensor feeds which Flax parameter; `import_state` and `export_state` apply it in both directions
and refuse anything the table does not explain.
"""

import fnmatch
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError

Tensors = dict[str, np.ndarray]
Shape = tuple[int, ...]

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


# ------------------------------------------------------------------------------------- layouts
class Layout(NamedTuple):
    """How one tensor is stored on the two sides.

    Attributes:
        to_flax: (tensor, shape of the Flax parameter) -> parameter.
        from_flax: parameter -> tensor, the exact inverse.
        torch_shape: shape of the Flax parameter -> shape of the tensor.
    """

    to_flax: Callable[[np.ndarray, Shape], np.ndarray]
    from_flax: Callable[[np.ndarray], np.ndarray]
    torch_shape: Callable[[Shape], Shape]


SAME = Layout(lambda tensor, shape: tensor, lambda param: param, lambda shape: shape)
"""Norm scales, biases, embeddings: stored alike on both sides."""


FLATTENED = Layout(
    lambda tensor, shape: tensor.reshape(shape),
    lambda param: param.reshape(-1),
    lambda shape: (math.prod(shape),),
)
"""A bias over heads: torch [H * K] against a Flax [H, K]."""


def linear(input_axes: int = 1) -> Layout:
    """Layout of a linear map: torch [out, in] against a Flax kernel [*in, *out].

    Args:
        input_axes: How many leading axes of the Flax kernel are inputs; the others are outputs.

    Returns:
        The layout; heads are the slow axis of the flattened side, as in torch.
    """

    def to_flax(tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.T.reshape(shape)

    def from_flax(param: np.ndarray) -> np.ndarray:
        return param.reshape(math.prod(param.shape[:input_axes]), -1).T

    def torch_shape(shape: Shape) -> Shape:
        return (math.prod(shape[input_axes:]), math.prod(shape[:input_axes]))

    return Layout(to_flax, from_flax, torch_shape)


class Rule(NamedTuple):
    """One line of a name table.

    Attributes:
        torch_name: Tensor name; `{i}` stands for the layer index, which becomes axis 0 of the
            Flax parameter.
        path: Flax parameter as `a/b/c`.
        layout: How the values are stored on the two sides.
    """

    torch_name: str
    path: str
    layout: Layout = SAME

    @property
    def stacked(self) -> bool:
        """Whether the Flax parameter carries a leading layer axis."""
        return "{i}" in self.torch_name


class _Slot(NamedTuple):
    """The place one tensor goes to: a parameter and, when it is stacked, a layer of it."""

    rule: Rule
    layer: int | None
    shape: Shape  # of this part of the Flax parameter


# ------------------------------------------------------------------------- import and export
def import_state(
    tensors: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    expected_shapes: Mapping[str, Shape],
    allow: Sequence[str] = (),
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """Builds a Flax parameter tree from named tensors.

    Args:
        tensors: Tensors under the names of the PyTorch module. Anything with a `shape` that NumPy
            can convert will do; it is converted once and not held.
        rules: The name table.
        expected_shapes: Shape of every Flax parameter by path `a/b/c`; stacked parameters carry
            the number of layers on axis 0.
        allow: Shell-style patterns of tensor names that may be present and are ignored.
        place: (path, parameter in the file's dtype) -> what to put into the tree, for instance an
            array on a device; None = float32 copies. Called for one parameter after the other.

    Returns:
        Nested dictionary of arrays with exactly the expected paths and shapes.

    Raises:
        UserError: A tensor is unknown, missing, mis-shaped or given twice; the message names it.
    """
    slots = _slots(rules, expected_shapes)
    for name, tensor in tensors.items():
        if name not in slots:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow):
                continue
            raise UserError(f"unknown tensor '{name}' {tuple(tensor.shape)}: no parameter takes it")
        slot = slots[name]
        wanted = slot.rule.layout.torch_shape(slot.shape)
        if tuple(tensor.shape) != tuple(wanted):
            raise UserError(
                f"tensor '{name}' has shape {tuple(tensor.shape)}, but parameter "
                f"'{slot.rule.path}' needs {tuple(wanted)}"
            )
    parts: dict[str, list[str]] = {path: [] for path in expected_shapes}
    for name, slot in slots.items():
        if name not in tensors:
            raise UserError(f"missing tensor '{name}' for parameter '{slot.rule.path}'")
        parts[slot.rule.path].append(name)
    flat: dict[str, Any] = {}
    for path, names in parts.items():
        values = (
            slots[name].rule.layout.to_flax(np.asarray(tensors[name]), slots[name].shape)
            for name in names
        )
        stacked = any(slots[name].layer is not None for name in names) or not names
        if stacked:
            value = np.empty(expected_shapes[path], np.float32)
            for layer, part in enumerate(values):
                value[layer] = part
        else:
            value = next(values)
        flat[path] = np.array(value, np.float32) if place is None else place(path, value)
    return unflatten(flat)


def export_state(params: Mapping[str, Any], rules: Sequence[Rule]) -> Tensors:
    """Names the parameters of a Flax tree as the PyTorch module does; inverse of `import_state`.

    Args:
        params: Nested dictionary of arrays.
        rules: The same name table.

    Returns:
        Contiguous arrays by tensor name.

    Raises:
        UserError: A parameter has no rule or a rule has no parameter.
    """
    flat = {path: np.asarray(value) for path, value in flatten(params).items()}
    slots = _slots(rules, {path: value.shape for path, value in flat.items()})
    tensors: Tensors = {}
    for name, slot in slots.items():
        value = flat[slot.rule.path]
        part = value if slot.layer is None else value[slot.layer]
        tensors[name] = np.ascontiguousarray(slot.rule.layout.from_flax(part))
    return tensors


def _slots(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> dict[str, _Slot]:
    """Expands the table into one entry per tensor and checks that it covers every parameter."""
    slots: dict[str, _Slot] = {}
    covered: dict[str, str] = {}
    for rule in rules:
        if rule.path not in shapes:
            raise UserError(f"parameter '{rule.path}' of tensor '{rule.torch_name}' does not exist")
        if rule.path in covered:
            raise UserError(
                f"parameter '{rule.path}' would be set twice, by tensors "
                f"'{covered[rule.path]}' and '{rule.torch_name}'"
            )
        covered[rule.path] = rule.torch_name
        shape = tuple(shapes[rule.path])
        layers: Iterable[int | None] = range(shape[0]) if rule.stacked else (None,)
        for layer in layers:
            name = rule.torch_name if layer is None else rule.torch_name.format(i=layer)
            if name in slots:
                raise UserError(
                    f"tensor '{name}' would be used twice, by parameters "
                    f"'{slots[name].rule.path}' and '{rule.path}'"
                )
            slots[name] = _Slot(rule, layer, shape if layer is None else shape[1:])
    for path in shapes:
        if path not in covered:
            raise UserError(f"parameter '{path}' has no tensor name")
    return slots


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionary -> dictionary by path `a/b/c`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


# ------------------------------------------------------------------------------ reading files
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


# ------------------------------------------------------------------------------ writing files
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
