"""Low-rank adapters: algebra, gradients, dropout, scanned layers, PEFT files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import torch_bridge
from common.errors import UserError
from common.lm import layers, lora
from common.torch_bridge import Rule, linear

WIDTH, HEADS, SIZE, LAYERS = 6, 2, 3, 3
RULES = [
    Rule("net.{i}.attn.q_proj.weight", "layers/q/kernel", linear()),
    Rule("net.{i}.attn.o_proj.weight", "layers/o/kernel", linear(2)),
    Rule("net.{i}.norm.weight", "layers/norm/scale"),
    Rule("out.weight", "out/kernel", linear()),
]
SHAPES = {
    "layers/q/kernel": (LAYERS, WIDTH, HEADS, SIZE),
    "layers/o/kernel": (LAYERS, HEADS, SIZE, WIDTH),
    "layers/norm/scale": (LAYERS, WIDTH),
    "out/kernel": (WIDTH, 4),
}


def settings(modules=("q_proj", "o_proj", "out"), dropout=0.0):
    return lora.LoraSettings(2, 6.0, dropout, lora.select_targets(RULES, SHAPES, modules))


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    flat = {p: jax.random.normal(k, s) for (p, s), k in zip(SHAPES.items(), keys, strict=True)}
    return torch_bridge.unflatten(flat)


def noisy(adapter, seed=5):
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@jax.jit
def network(params, x):
    """Scanned layers with a kernel of several outputs and one of several inputs, then a head."""

    def step(x, layer):
        heads = layers.dense(x * layer["norm"]["scale"], layer["q"]["kernel"])
        return x + jnp.tanh(layers.merge_heads(heads, layer["o"]["kernel"])), None

    x, _ = jax.lax.scan(step, x, params["layers"])
    return layers.dense(x, params["out"]["kernel"])


X = jax.random.normal(jax.random.key(9), (2, 5, WIDTH))


def test_a_fresh_adapter_changes_nothing(params):
    s = settings()
    adapter = lora.init_adapter(jax.random.key(1), s)
    assert {p: x.shape for p, x in torch_bridge.flatten(adapter).items()} == {
        "layers/q/kernel/a": (LAYERS, WIDTH, 2),
        "layers/q/kernel/b": (LAYERS, 2, HEADS * SIZE),
        "layers/o/kernel/a": (LAYERS, HEADS * SIZE, 2),
        "layers/o/kernel/b": (LAYERS, 2, WIDTH),
        "out/kernel/a": (WIDTH, 2),
        "out/kernel/b": (2, 4),
    }
    a = np.asarray(adapter["layers"]["q"]["kernel"]["a"])
    assert np.abs(a).max() <= WIDTH**-0.5 and np.abs(a).max() > 0.7 * WIDTH**-0.5
    attached = network(lora.attach(params, adapter, s), X)
    np.testing.assert_allclose(network(params, X), attached, rtol=1e-4, atol=1e-4)


def test_merged_equals_attached_and_unmerging_restores(params):
    s = settings()
    adapter = noisy(lora.init_adapter(jax.random.key(1), s))
    attached = network(lora.attach(params, adapter, s), X)
    merged = lora.merge(params, adapter, s.scale)
    assert float(jnp.abs(attached - network(params, X)).max()) > 0.1
    np.testing.assert_allclose(network(merged, X), attached, rtol=1e-4, atol=1e-5)
    # The definition, for one layer.
    pair = adapter["layers"]["q"]["kernel"]
    wanted = params["layers"]["q"]["kernel"][1] + (3.0 * pair["a"][1] @ pair["b"][1]).reshape(
        WIDTH, HEADS, SIZE
    )
    np.testing.assert_allclose(merged["layers"]["q"]["kernel"][1], wanted, rtol=1e-4, atol=1e-5)
    back = lora.unmerge(merged, adapter, s.scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), back, dict(params))


def test_only_the_adapter_takes_gradients(params):
    s = settings(modules=("q_proj",))
    adapter = lora.init_adapter(jax.random.key(1), s)

    def loss(params, adapter):
        return jnp.sum(jnp.sin(network(lora.attach(params, adapter, s), X)))

    base, own = jax.grad(loss, argnums=(0, 1))(params, adapter)
    assert all(float(jnp.abs(g).max()) == 0.0 for g in jax.tree.leaves(base))
    pair = own["layers"]["q"]["kernel"]
    # With B = 0 the gradient of A is 0 and that of B is not.
    assert float(jnp.abs(pair["a"]).max()) == 0.0
    assert float(jnp.abs(pair["b"]).min(axis=(1, 2)).min()) > 0.0
    moved = noisy(adapter)
    grads = jax.grad(loss, argnums=1)(params, moved)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    # And it is the gradient through the merged kernel.
    through = jax.grad(lambda a: jnp.sum(jnp.sin(network(lora.merge(params, a, s.scale), X))))(
        moved
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), grads, through
    )


def test_dropout_reaches_the_adapter_alone(params):
    s = settings(dropout=0.5)
    adapter = lora.init_adapter(jax.random.key(1), s)
    fresh = network(lora.attach(params, adapter, s, jax.random.key(2)), X)
    np.testing.assert_allclose(fresh, network(params, X), rtol=1e-4, atol=1e-4)
    adapter = noisy(adapter)
    one, two, none = (
        network(lora.attach(params, adapter, s, k), X)
        for k in (jax.random.key(2), jax.random.key(3), None)
    )
    assert float(jnp.abs(one - two).max()) > 1e-3 and float(jnp.abs(one - none).max()) > 1e-3
    np.testing.assert_allclose(
        none, network(lora.merge(params, adapter, s.scale), X), rtol=1e-4, atol=1e-4
    )


def test_peft_round_trip(params, tmp_path):
    s = settings()
    adapter = noisy(lora.init_adapter(jax.random.key(1), s))
    lora.save_peft(tmp_path, adapter, s, "some/base")
    tensors = torch_bridge.read_tensors(tmp_path / lora.PEFT_WEIGHTS, strip=())
    name = "base_model.model.net.2.attn.o_proj.lora_{}.weight"
    assert tensors[name.format("A")].shape == (2, HEADS * SIZE)
    assert tensors[name.format("B")].shape == (WIDTH, 2)
    assert "base_model.model.out.lora_A.weight" in tensors and len(tensors) == 2 * (2 * LAYERS + 1)
    config = json.loads((tmp_path / lora.PEFT_CONFIG).read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 6.0 and config["peft_type"] == "LORA"
    again, stored = lora.load_peft(tmp_path, RULES, SHAPES)
    assert stored == s
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(adapter))
    # What PEFT computes: W + (alpha / r) B A in its [out, in] layout.
    merged = torch_bridge.export_state(lora.merge(params, adapter, s.scale), RULES)
    plain = torch_bridge.export_state(params, RULES)
    delta = 3.0 * tensors[name.format("B")] @ tensors[name.format("A")]
    wanted = plain["net.2.attn.o_proj.weight"] + delta
    np.testing.assert_allclose(merged["net.2.attn.o_proj.weight"], wanted, rtol=1e-4, atol=1e-4)


def rewritten(directory, config=None, tensors=None):
    """The saved adapter with changed config keys or tensors."""
    s = settings()
    lora.save_peft(directory, noisy(lora.init_adapter(jax.random.key(1), s)), s)
    content = json.loads((directory / lora.PEFT_CONFIG).read_text()) | (config or {})
    (directory / lora.PEFT_CONFIG).write_text(json.dumps(content))
    if tensors is not None:
        stored = torch_bridge.read_tensors(directory / lora.PEFT_WEIGHTS, strip=())
        torch_bridge.write_safetensors(directory / lora.PEFT_WEIGHTS, tensors(stored))
    return directory


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"use_dora": True}, None, "use_dora"),
        ({"bias": "all"}, None, "biases"),
        ({"r": 3}, None, "shape"),
        ({"r": 0}, None, "r = 0"),
        ({"target_modules": ["v_proj"]}, None, "'v_proj'.*o_proj"),
        ({"target_modules": ["q_proj"]}, None, "unknown tensor"),
        ({"target_modules": ".*k_proj"}, None, "k_proj"),
        (None, lambda t: {n: v for n, v in t.items() if "net.1.attn.q" not in n}, "net.1.attn.q"),
    ],
)
def test_broken_adapters_are_refused(tmp_path, config, tensors, message):
    with pytest.raises(UserError, match=message):
        lora.load_peft(rewritten(tmp_path, config, tensors), RULES, SHAPES)


def test_rank_stabilised_scale(tmp_path):
    _, stored = lora.load_peft(rewritten(tmp_path, {"use_rslora": True}), RULES, SHAPES)
    assert stored.scale == pytest.approx(6.0 / 2**0.5)


def test_no_adapter_there(tmp_path):
    with pytest.raises(UserError, match="adapter_config.json"):
        lora.load_peft(tmp_path, RULES, SHAPES)
