"""Tensor parallelism on four forced devices in a subprocess, and what does not divide."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import jax
import pytest

from common.errors import UserError
from common.lm import sharding
from common.lm.decoder import params_by_path
from tests.common.lm_models import CONFIGS, random_model

FOUR_DEVICES = """
import dataclasses, tempfile
import jax, jax.numpy as jnp, numpy as np
from common.lm import decoder, sharding
from common.lm.cache import empty_cache
from common.lm.weights import load_model, save_model
from tests.common.lm_models import CONFIGS, random_model

assert len(jax.devices()) == 4
mesh = sharding.make_model_mesh()
cfg = dataclasses.replace(CONFIGS["qwen2"], num_kv_heads=4, vocab_size=40)
model = random_model(cfg)
ids = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 7)), jnp.int32)
sizes, slots = jnp.asarray([3, 7], jnp.int32), jnp.asarray([1, 0], jnp.int32)


@jax.jit
def run(params, cache):
    read = decoder.prefill(params, cfg, cache, ids, sizes, slots)
    logits, cache = decoder.decode_step(
        params, cfg, read.cache, jnp.asarray([4, 5], jnp.int32), jnp.ones((2,), bool)
    )
    return read.logits, logits, cache


want = run(model.params, empty_cache(cfg, 2, 10))
split = sharding.shard_params(model.params, cfg, mesh)
got = run(split, sharding.shard_cache(empty_cache(cfg, 2, 10), mesh))
for a, b in zip(got[:2], want[:2]):
    np.testing.assert_allclose(a, b, atol=2e-5)
query = split["layers"][0]["attn"]["q"]["kernel"]
assert query.addressable_shards[0].data.shape == (16, 1, 4)
assert split["embed"]["embedding"].addressable_shards[0].data.shape == (10, 16)
key = got[2].keys[1]
assert key.addressable_shards[0].data.shape == (2, 1, 4, 10), key.sharding
np.testing.assert_allclose(key, want[2].keys[1], atol=2e-5)

with tempfile.TemporaryDirectory() as place:
    save_model(place, model)
    loaded = load_model(place, mesh=mesh).params
same = jax.tree.map(lambda a, b: a.sharding == b.sharding and bool((a == b).all()), loaded, split)
assert all(jax.tree.leaves(same))
"""


@pytest.mark.slow
def test_four_devices_compute_what_one_does():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FOUR_DEVICES)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_sharding_of_its_shape(name):
    model, mesh = random_model(name), sharding.make_model_mesh(1)
    split = params_by_path(sharding.shard_params(model.params, model.cfg, mesh))
    rules = params_by_path(sharding.param_shardings(model.cfg, mesh))
    for path, value in split.items():
        assert value.sharding == rules[path]
        assert len(rules[path].spec) in (0, value.ndim), path


def test_what_does_not_divide_is_refused():
    with pytest.raises(UserError, match="devices asked"):
        sharding.make_model_mesh(len(jax.devices()) + 1)

    @dataclasses.dataclass
    class Mesh:
        shape: dict

    cfg = CONFIGS["llama"]
    sharding.check_divides(cfg, Mesh({"model": 2}))
    with pytest.raises(UserError, match="num_kv_heads 2"):
        sharding.check_divides(cfg, Mesh({"model": 4}))
    with pytest.raises(UserError, match="num_heads 4"):
        sharding.check_divides(cfg, Mesh({"model": 3}))
    with pytest.raises(UserError, match="no axis"):
        sharding.check_divides(cfg, Mesh({"data": 2}))
