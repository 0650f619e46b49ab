"""Declarative tables between the parameter names of PyTorch modules and of Flax trees.

A table of `Rule`s says which tensor feeds which Flax parameter; `import_state` and `export_state`
apply it in both directions and refuse anything the table does not explain. Tensors come from and
go to files by `common.torch_files`, whose functions are offered here as well.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.torch_files import WRAPPER_PREFIXES as WRAPPER_PREFIXES
from common.torch_files import Checkpoint as Checkpoint
from common.torch_files import Tensors as Tensors
from common.torch_files import find_weights as find_weights
from common.torch_files import read_checkpoint as read_checkpoint
from common.torch_files import read_tensors as read_tensors
from common.torch_files import strip_prefixes as strip_prefixes
from common.torch_files import write_safetensors as write_safetensors

Shape = tuple[int, ...]


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
