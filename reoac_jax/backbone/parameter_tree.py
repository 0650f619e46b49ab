"""A nested tree of parameters as a Linen module."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

Initializers = Callable[[str, tuple[int, ...]], nn.initializers.Initializer]
"""(path "a/b/c" and shape of a parameter) -> how it begins."""


class ParameterTree(nn.Module):
    """Declares the nested parameter tree of `spec` under its own name and returns it.

    The maths lives in pure functions that take slices of this tree: tied stacks, shared keys and
    values and decoding caches need a layer's weights outside of any module call.

    Attributes:
      spec: nested {name: shape}.
      prefix: path of the tree.
      initializer: of its parameters, all float32.
    """

    spec: Mapping[str, Any]
    prefix: str
    initializer: Initializers

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for name, entry in self.spec.items():
            path = f"{self.prefix}/{name}"
            if isinstance(entry, Mapping):
                tree[name] = ParameterTree(entry, path, self.initializer, name=name)()
            else:
                start = self.initializer(path, tuple(entry))
                tree[name] = self.param(name, start, tuple(entry), jnp.float32)
        return tree


def declare(spec: Mapping[str, Any], initializer: Initializers) -> dict[str, Any]:
    """The trees of a network's `parameter_shapes`; to be called within its compact method."""
    return {
        name: ParameterTree(entry, name, initializer, name=name)() for name, entry in spec.items()
    }
