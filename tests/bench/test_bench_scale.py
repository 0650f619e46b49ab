"""The plan on paper: what must hold whatever the constants are."""

import math

import pytest

from bench.scale import PER_NODE, network, plan, shapes_of, table
from common.flags import load_config
from reoac_jax.backbone.e2d2 import parameter_shapes


def test_memory_traffic_and_time_scale_as_they_should() -> None:
    config = load_config("configs/gsm8k.py:e2d2_gsm8k")
    plans = [plan(config, n, rows=8) for n in (1, PER_NODE, 64, 1024)]
    count = sum(math.prod(s) for s in shapes_of(parameter_shapes(network())))
    assert plans[0].stored == 12 * count and plans[0].traffic == 0
    for one, more in zip(plans, plans[1:], strict=False):
        assert more.stored == pytest.approx(one.stored * one.devices / more.devices, rel=0.05)
        assert more.traffic > one.traffic and more.tokens_per_s > one.tokens_per_s
        # Weak scaling: a device rolls out as many rows as before.
        assert more.rollout_s == one.rollout_s and more.activations == one.activations
    assert plans[-1].traffic < 3 * 2 * 4 * count
    assert table(plans).count("\n") == len(plans) + 1
