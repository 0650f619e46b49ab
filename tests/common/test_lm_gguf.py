"""GGUF files written here by the package's own writer, in its layout of Llama's heads."""

import dataclasses

import numpy as np
import pytest

from common.errors import UserError
from common.lm.config import Llama3Scaling
from common.lm.decoder import params_by_path
from common.lm.gguf import gguf_rules, interleaved_heads, open_gguf
from common.lm.weights import load_model
from common.torch_bridge import export_state, unflatten
from tests.common.lm_models import CONFIGS, random_model

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")


def write(path, model, change=None, factors=None, packed=()):
    """Writes a model as llama.cpp's converter lays it out."""
    cfg = model.cfg
    tensors = export_state(unflatten(params_by_path(model.params)), gguf_rules(cfg))
    if factors is not None:
        tensors["rope_freqs.weight"] = np.asarray(factors, np.float32)
    if change is not None:
        change(tensors)
    writer = gguf.GGUFWriter(str(path), cfg.model_type)
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(cfg.max_positions)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.rms_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_eos_token_id(model.stop_ids[0])
    for name, value in tensors.items():
        if name in packed:
            coarse = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value, coarse), raw_dtype=coarse)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama3"])
def test_models_come_back(name, tmp_path):
    model = random_model(name)
    write(tmp_path / "model.gguf", model)
    for place in (tmp_path, tmp_path / "model.gguf"):
        again = load_model(place)
        assert again.cfg == model.cfg and again.stop_ids == model.stop_ids
        flat = params_by_path(again.params)
        for path, value in params_by_path(model.params).items():
            np.testing.assert_array_equal(flat[path], value, err_msg=path)


def test_llamas_rotated_pairs_lie_side_by_side():
    """Row (head, half, j) of torch is row (head, j, half) of the file."""
    heads, size, width = 2, 4, 3
    rows = [f"{h}{half}{j}" for h in range(heads) for j in range(2) for half in range(2)]
    stored = np.repeat(np.asarray([int(r) for r in rows], np.float32)[:, None], width, axis=1)
    kernel = interleaved_heads().to_flax(stored, (width, heads, size))
    assert kernel[0].tolist() == [[0, 1, 10, 11], [100, 101, 110, 111]]
    np.testing.assert_array_equal(interleaved_heads().from_flax(kernel), stored)


def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path):
    model = random_model("llama3")
    released = Llama3Scaling(32.0, 1.0, 4.0, 8192)
    cfg = dataclasses.replace(model.cfg, rope_scaling=released, rope_theta=5e5)
    model = model._replace(cfg=cfg)
    write(tmp_path / "model.gguf", model, factors=cfg.rope_divisors)
    assert load_model(tmp_path).cfg == cfg
    write(tmp_path / "model.gguf", model, factors=[1.0, 2.0, 32.0])
    with pytest.raises(UserError, match="rope_freqs.weight"):
        load_model(tmp_path)


def test_quantised_tensors_are_dequantised(tmp_path):
    model = random_model(dataclasses.replace(CONFIGS["qwen2"], hidden_size=32))
    write(tmp_path / "model.gguf", model, packed=("token_embd.weight", "blk.1.ffn_up.weight"))
    again = params_by_path(load_model(tmp_path).params)
    for path, value in params_by_path(model.params).items():
        coarse = path in ("embed/embedding", "layers/1/mlp/up/kernel")
        np.testing.assert_allclose(again[path], value, atol=0.02 if coarse else 0, err_msg=path)
        assert coarse == bool((again[path] != value).any())


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), "missing tensor 'blk.1.ffn_up.weight'"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), "unknown tensor 'extra'"),
        (lambda t: t.update({"blk.0.attn_q.bias": np.ones(3, np.float32)}), "attn_q.bias"),
        (lambda t: t.pop("token_embd.weight"), "token_embd.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, mentions, tmp_path):
    write(tmp_path / "model.gguf", random_model("qwen2"), change=change)
    with pytest.raises(UserError, match=mentions):
        load_model(tmp_path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match="cannot read"):
        open_gguf(path)
    writer = gguf.GGUFWriter(str(path), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="mamba"):
        open_gguf(path)
