"""Adapters on backbones: targets per family, updates that touch the adapter alone, loading."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import torch_bridge
from common.errors import UserError
from common.lm import lora
from reoac_jax.backbone import dit, e2d2
from reoac_jax.backbone.base import e2d2_backbone
from reoac_jax.backbone.dit_backbone import dit_backbone
from reoac_jax.backbone.store import load_backbone
from reoac_jax.defaults import finalize, get_default_config
from reoac_jax.lora import lora_finetuning, make_settings, network_names
from reoac_jax.models import load_models
from tests.reoac_jax.test_dit_backbone import gen_ids_of, lively, tiny_dit
from tests.reoac_jax.toy_setting import GEN, toy_canvas


def adapting(**changes):
    """The defaults with changed keys of config.lora."""
    config = get_default_config()
    config.lora.update(changes)
    return config


@pytest.fixture(scope="module", params=["embedded", "mdlm", "sedd"])
def case(request):
    """(network, backbone with adapters, parameters)."""
    if request.param == "embedded":
        network = load_backbone("embedded").config
        base, make = e2d2.init_params(jax.random.key(0), network), e2d2_backbone
    else:
        network = tiny_dit(request.param)
        base, make = lively(dit.init_params(jax.random.key(0), network)), dit_backbone
    settings = make_settings(adapting(mlp=True), network)
    adapter = lively(lora.init_adapter(jax.random.key(1), settings), scale=0.05)
    backbone = dataclasses.replace(make(network), finetuning=lora_finetuning(settings))
    return network, backbone, settings, {"base": base, "lora": adapter}


def test_default_targets(case):
    network, _, _, _ = case
    names = {t.path.split("/", 1)[1] for t in make_settings(adapting(), network).targets}
    if isinstance(network, dit.DiTConfig):
        assert names == {"attn_qkv/kernel", "attn_out/kernel"}
    else:
        assert names == {f"layers/attn/{n}/kernel" for n in "qkvo"}
    wider = {t.path.split("/", 1)[1] for t in make_settings(adapting(mlp=True), network).targets}
    assert len(wider) == len(names) + (2 if isinstance(network, dit.DiTConfig) else 3)
    with pytest.raises(UserError, match="'w_proj'.*choose of"):
        make_settings(adapting(target_modules=("w_proj",)), network)


def test_merged_equals_attached_behind_the_contract(case):
    network, backbone, _, params = case
    if not isinstance(network, dit.DiTConfig):
        return  # its vocabulary is another than the toy canvases'; the algebra is the same
    canvas, ids, t = toy_canvas([0, 3]), gen_ids_of([0, 3]), jnp.asarray([0.3, 0.8])

    @jax.jit
    def logits(p):
        scores = backbone.score(p, backbone.begin(p, canvas), canvas, ids, t)
        return backbone.logits(p, scores.hidden)

    tuning = backbone.finetuning
    attached = logits(tuning.forward(params, tuning.trainable(params), None))
    merged, base = logits(tuning.inference(params)), logits(params["base"])
    np.testing.assert_allclose(merged, attached, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(merged - base)[..., :-1].max()) > 1e-3


def test_only_the_adapter_changes(case):
    network, backbone, _, params = case
    if not isinstance(network, dit.DiTConfig):
        return
    canvas, ids, t = toy_canvas([0, 3]), gen_ids_of([0, 3]), jnp.asarray([0.3, 0.8])
    tuning = backbone.finetuning

    @jax.jit
    def grads(adapter):
        def loss(adapter):
            p = tuning.forward(params, adapter, jax.random.key(0))
            head, head_params = backbone.training_head(p)
            assert head_params == {}  # the head is frozen and takes no gradient
            hidden = backbone.score(p, backbone.begin(p, canvas), canvas, ids, t).hidden
            return jnp.mean(jax.nn.logsumexp(head(head_params, hidden), axis=-1))

        return jax.grad(loss)(adapter)

    found = torch_bridge.flatten(grads(tuning.trainable(params)))
    assert all(float(jnp.abs(g).max()) > 0 for g in found.values())
    after = tuning.replace(params, jax.tree.map(jnp.zeros_like, params["lora"]))
    assert after["base"] is params["base"]
    assert tuning.frozen(after) is params["base"]


def test_names_are_those_of_the_pytorch_modules(case, tmp_path):
    network, _, settings, params = case
    lora.save_peft(tmp_path, params["lora"], settings)
    tensors = torch_bridge.read_tensors(tmp_path / lora.PEFT_WEIGHTS, strip=())
    module = {
        "e2d2": "backbone.encoder.model.layers.0.self_attn.q_proj",
        "subs": "backbone.blocks.1.mlp.2",
        "sedd": "blocks.1.attn_qkv",
    }[getattr(network, "parameterization", "e2d2")]
    assert f"base_model.model.{module}.lora_A.weight" in tensors
    again, stored = lora.load_peft(tmp_path, *network_names(network))
    assert stored.targets == settings.targets
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params["lora"]))


def config_with(**changes):
    config = get_default_config()
    config.finetune_mode = "lora"
    config.backbone.name, config.backbone.model_name_or_path = "mdlm", "scratch"
    config.model.hidden_size, config.model.num_blocks, config.model.num_heads = 16, 2, 2
    config.rollout.gen_len = GEN
    config.lora.update(changes)
    return config


def test_loading_with_an_adapter(tmp_path):
    models = load_models(config_with())
    assert models.params.keys() == {"base", "lora"} and models.lora.rank == 8
    adapter = lively(models.params["lora"])
    lora.save_peft(tmp_path, adapter, models.lora)
    again = load_models(config_with(adapter=str(tmp_path)))
    jax.tree.map(np.testing.assert_array_equal, again.params["lora"], jax.device_get(adapter))
    jax.tree.map(np.testing.assert_array_equal, again.params["base"], models.params["base"])
    with pytest.raises(UserError, match=r"lora\.r=4.*r=8"):
        load_models(config_with(adapter=str(tmp_path), r=4))


def test_config_checks():
    config = config_with(r=0)
    with pytest.raises(UserError, match=r"lora\.r=0"):
        finalize(config)
    config = config_with(dropout=1.0)
    with pytest.raises(UserError, match=r"lora\.dropout"):
        finalize(config)
    config = config_with()
    config.backbone.name = "simple"
    with pytest.raises(UserError, match="simple has no projections"):
        load_models(config)
