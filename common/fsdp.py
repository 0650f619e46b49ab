"""Parameters and optimizer state split over the `data` axis, for per-shard functions.

Each array is cut along its largest axis that the number of devices divides (the first of equal
ones); small arrays and those without such an axis stay whole. Moments have the shapes of their
parameters and so are cut alike. Inside a per-shard function the parameters are gathered where a
pass needs them, gradients are added and cut in one collective (reduce-scatter), and the optimizer
moves each device's own share: what stays between steps takes 1/N of the memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.dist import DATA_AXIS
from common.spmd import sum_over_devices

MIN_SIZE = 1024  # elements; cutting less than this saves nothing and costs a collective
_WHOLE = -1


def shard_axis(shape: tuple[int, ...], num_devices: int) -> int:
    """The axis along which an array of this shape is cut, -1 for none."""
    fitting = [axis for axis, size in enumerate(shape) if size % num_devices == 0 and size]
    if num_devices == 1 or not fitting or np.prod(shape) < MIN_SIZE:
        return _WHOLE
    return max(fitting, key=lambda axis: (shape[axis], -axis))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parameters of a model lie on a mesh.

    Attributes:
        num_devices: over which arrays are cut; 1 = every device holds everything.
        axes: tree of the parameters' structure with `shard_axis` of each; () when not cut.
    """

    num_devices: int = 1
    axes: Any = ()

    @classmethod
    def of(cls, params: Any, mesh: Mesh, fsdp: bool) -> "Layout":
        """The layout of some parameters (arrays or their shapes).

        Args:
            fsdp: False keeps a whole copy on every device.
        """
        count = mesh.shape[DATA_AXIS]
        if not fsdp or count == 1:
            return cls()
        return cls(count, jax.tree.map(lambda x: shard_axis(np.shape(x), count), params))

    def specs(self, tree: Any) -> Any:
        """Partition specs of any arrays (parameters, moments, averages) under this layout."""

        def spec(leaf: Any) -> PartitionSpec:
            shape = np.shape(leaf)
            axis = shard_axis(shape, self.num_devices)
            return PartitionSpec() if axis < 0 else PartitionSpec(*[None] * axis, DATA_AXIS)

        return jax.tree.map(spec, tree)

    def shardings(self, mesh: Mesh, tree: Any) -> Any:
        """The same as shardings on a mesh."""
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            self.specs(tree),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def whole(self, params: Any) -> Any:
        """Inside a per-shard function: the whole parameters, from each device's share."""
        if self.num_devices == 1:
            return params
        return jax.tree.map(
            lambda x, axis: (
                x if axis < 0 else jax.lax.all_gather(x, DATA_AXIS, axis=axis, tiled=True)
            ),
            params,
            self.axes,
        )

    def reduce(self, grads: Any) -> Any:
        """Inside a per-shard function: the sum of all devices' gradients, this device's share."""
        if self.num_devices == 1:
            return sum_over_devices(grads)
        return jax.tree.map(
            lambda g, axis: (
                sum_over_devices(g)
                if axis < 0
                else jax.lax.psum_scatter(g, DATA_AXIS, scatter_dimension=axis, tiled=True)
            ),
            grads,
            self.axes,
        )

    def total(self, values: Any) -> jax.Array:
        """Inside a per-shard function: a sum over the elements of the whole arrays.

        Args:
            values: tree of the parameters' structure, a scalar per array: this share's sum.
        """
        if self.num_devices == 1:
            return jnp.sum(jnp.stack(jax.tree.leaves(values)))
        pairs = list(zip(jax.tree.leaves(values), jax.tree.leaves(self.axes), strict=True))
        zero = jnp.zeros((), pairs[0][0].dtype)
        own = sum((value for value, axis in pairs if axis < 0), zero)
        cut = sum((value for value, axis in pairs if axis >= 0), zero)
        return own + sum_over_devices(cut)

    def norm(self, tree: Any) -> jax.Array:
        """Inside a per-shard function: the global norm sqrt(sum x^2) of the whole arrays."""
        if self.num_devices == 1:
            return optax.global_norm(tree)
        return jnp.sqrt(self.total(jax.tree.map(lambda x: jnp.sum(jnp.square(x)), tree)))
