"""Models through files: round trips, transformers as the judge, and strictness."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.lm import decoder, weights
from common.lm.weights import hf_rules, load_model, locate_model, save_model
from common.torch_bridge import read_tensors, write_safetensors
from tests.common.lm_models import CONFIGS, random_model


def same(a, b) -> bool:
    """Whether two parameter trees are equal, bit by bit."""
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    return all(jax.tree.leaves(equal))


def saved(tmp_path, name="qwen2", **options):
    """A model, and the directory it was written to."""
    model = random_model(name)
    save_model(tmp_path / "model", model, **options)
    return model, tmp_path / "model"


def rewrite(directory, change):
    """Lets `change` edit the tensors of a single-file model."""
    tensors = dict(read_tensors(directory, strip=()))
    change(tensors)
    write_safetensors(directory / "model.safetensors", tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_comes_back(name, tmp_path):
    model, directory = saved(tmp_path, name)
    again = load_model(directory)
    assert again.cfg == model.cfg and again.stop_ids == model.stop_ids
    assert same(again.params, model.params)


def test_shards_come_back_and_half_precision_is_kept(tmp_path):
    model, directory = saved(tmp_path, dtype="bfloat16", max_shard_bytes=2000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == 2 * sum(x.size for x in jax.tree.leaves(model.params))
    again = load_model(directory, dtype="bfloat16")
    assert again.cfg.dtype == "bfloat16"
    assert same(again.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_logits(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model, directory = saved(tmp_path, name)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(0, 37, (2, 60))
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)).logits.numpy()

    @jax.jit
    def read(params):
        hidden = decoder.forward(params, model.cfg, jnp.asarray(ids, jnp.int32)).hidden
        return decoder.head_logits(params, model.cfg, hidden)

    np.testing.assert_allclose(read(model.params), want, rtol=1e-3, atol=1e-3)
    reference.save_pretrained(tmp_path / "theirs")  # and back from their own file
    again = load_model(tmp_path / "theirs")
    assert again.cfg == model.cfg
    assert same(again.params, model.params)


def test_a_repeated_tied_head_is_checked_and_dropped(tmp_path):
    model, directory = saved(tmp_path, "qwen3")

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

    rewrite(directory, repeat)
    assert same(load_model(directory).params, model.params)
    rewrite(directory, lambda tensors: tensors["lm_head.weight"].__iadd__(1))
    with pytest.raises(UserError, match="lm_head.weight.*differs"):
        load_model(directory)


KEY = "model.layers.1.self_attn.k_proj.weight"  # not square


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (lambda t: t.pop(KEY), f"missing tensor '{KEY}'"),
        (lambda t: t.update(extra=np.ones(2, np.float32)), "unknown tensor 'extra'"),
        (lambda t: t.update({KEY: t[KEY][:-1]}), f"'{KEY}' has shape"),
        (lambda t: t.update({KEY: t[KEY].T.copy()}), f"'{KEY}' has shape"),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": np.ones(16, np.float32)}),
            "unknown tensor 'model.layers.2",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, mentions, tmp_path):
    _, directory = saved(tmp_path)
    rewrite(directory, change)
    with pytest.raises(UserError, match=mentions):
        load_model(directory)


def test_damaged_shards_are_named(tmp_path):
    _, directory = saved(tmp_path, max_shard_bytes=4000)
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    names = [name for name, shard in index["weight_map"].items() if shard == shards[0]]
    second = dict(read_tensors(directory / shards[1], strip=()))
    write_safetensors(directory / shards[1], {**second, names[0]: np.ones(1, np.float32)})
    with pytest.raises(UserError, match=f"'{names[0]}' is in two shards"):
        load_model(directory)
    write_safetensors(directory / shards[1], second)
    index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], names[0]: shards[1]}}))
    with pytest.raises(UserError, match=f"'{names[0]}' is not in its shard"):
        load_model(directory)
    index_file.write_text(json.dumps(index))
    (directory / shards[1]).write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot read"):
        load_model(directory)
    (directory / shards[1]).unlink()
    with pytest.raises(UserError, match=f"{shards[1]}.*does not exist"):
        load_model(directory)


def test_the_name_table_is_checked_for_doubles():
    cfg = CONFIGS["qwen2"]
    tensors = {"model.norm.weight": np.ones(16, np.float32)}
    with pytest.raises(UserError, match="set twice"):
        weights.place_tensors(tensors, [*hf_rules(cfg), hf_rules(cfg)[0]], cfg, None)


def test_places_without_a_model(tmp_path):
    with pytest.raises(UserError, match="no model at"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="several GGUF files"):
        load_model(tmp_path)
    model, directory = saved(tmp_path)
    with pytest.raises(UserError, match="already holds weights"):
        save_model(directory, model)
    assert locate_model(str(directory)) == directory
    with pytest.raises(UserError, match="not a path"):
        locate_model("./absent")
    with pytest.raises(UserError, match="cannot download model 'no-one/nothing'"):
        locate_model("no-one/nothing")
