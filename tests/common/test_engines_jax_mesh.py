"""The JAX engine with a model split over two forced devices, in a subprocess."""

import os
import subprocess
import sys

import pytest

TWO_DEVICES = """
import dataclasses
import jax
from common.engines.jax_engine import JaxEngine
from common.lm import sharding
from tests.common import engine_cases as cases
from tests.common.lm_models import random_model
from tests.common.test_engines_jax import CFG, MIXED_PLAN, PROMPTS

assert len(jax.devices()) == 2
mesh = sharding.make_model_mesh()
model = random_model(dataclasses.replace(CFG, vocab_size=40))
split = model._replace(params=sharding.shard_params(model.params, model.cfg, mesh))
engine = JaxEngine(split, cases.token_bytes(40), mesh=mesh, sample_slots=2)
tools = cases.random_tools(model, [1, 2, 1])
stream, _ = cases.play(engine, model, cases.settings(), tools, PROMPTS, MIXED_PLAN)
key = stream._slots.rows.cache.keys[0]
assert key.addressable_shards[0].data.shape[1] == model.cfg.num_kv_heads // 2, key.sharding
"""


@pytest.mark.slow
def test_two_devices_give_what_one_gives():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", TWO_DEVICES], env=environment, check=True)
