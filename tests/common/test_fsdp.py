"""Which axis is cut; the layout of one device cuts nothing. Groups of processes test the rest."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from common.dist import make_mesh
from common.fsdp import MIN_SIZE, Layout, shard_axis


@pytest.mark.parametrize(
    "shape, devices, axis",
    [
        ((64, 128), 4, 1),  # the largest
        ((128, 128), 4, 0),  # of equal ones the first
        ((130, 128), 4, 1),  # only where it comes out even
        ((30, 50), 4, -1),
        ((28, 2048, 6144), 1024, 2),
        ((8, 8), 4, -1),  # too small
        ((MIN_SIZE,), 4, 0),
        ((), 4, -1),
        ((0, 64), 4, -1),
        ((64, 128), 1, -1),
    ],
)
def test_the_axis(shape: tuple[int, ...], devices: int, axis: int) -> None:
    assert shard_axis(shape, devices) == axis


def test_moments_are_cut_like_their_parameters() -> None:
    layout = Layout(4, {"w": 1, "b": -1})
    tree = {"mu": {"w": np.zeros((64, 128)), "b": np.zeros(3)}, "count": np.int32(0)}
    specs = layout.specs(tree)
    assert specs == {"mu": {"w": P(None, "data"), "b": P()}, "count": P()}


def test_one_device_holds_everything() -> None:
    params = {"w": jnp.ones((64, 128))}
    for fsdp in (False, True):
        layout = Layout.of(params, make_mesh(1), fsdp)
        assert layout == Layout() and layout.whole(params) is params
        assert layout.specs(params) == {"w": P()}
        assert float(layout.norm(params)) == pytest.approx((64 * 128) ** 0.5)
