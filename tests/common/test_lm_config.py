"""config.json in both spellings, and what is refused."""

import json

import numpy as np
import pytest

from common.errors import UserError
from common.lm import layers
from common.lm.config import (
    DecoderConfig,
    Llama3Scaling,
    from_hf,
    read_config,
    read_stop_ids,
    to_hf,
)
from tests.common.lm_models import CONFIGS

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_sizes_and_defaults():
    cfg = from_hf(LLAMA)
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.rms_eps) == (16, 2, 1e-5)
    assert (cfg.rope_theta, cfg.rope_scaling, cfg.tie_embeddings) == (10000.0, None, False)
    without_groups = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert from_hf(without_groups).num_kv_heads == 4
    assert from_hf({**LLAMA, "model_type": "qwen3"}).head_dim == 128
    assert from_hf({**LLAMA, "model_type": "qwen3"}).qk_norm
    assert from_hf({**LLAMA, "model_type": "qwen2"}).qkv_bias
    assert hash(cfg) == hash(from_hf(LLAMA))


def test_both_spellings_of_the_rotary_frequencies():
    old = from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}})
    new = from_hf(
        {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}
    )
    assert old == new
    assert old.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert old.rope_theta == 5e5


@pytest.mark.torch
def test_llama3_frequencies_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    cfg = from_hf(scaled)
    want, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**scaled), "cpu")
    rope = layers.rope_angles(
        np.ones((1, 1), np.int32), cfg.head_dim, cfg.rope_theta, cfg.rope_divisors
    )
    np.testing.assert_allclose(rope.sin[0, 0], np.sin(want.numpy()), rtol=1e-5)
    assert len(set(np.round(cfg.rope_divisors, 6))) > 2  # slowed, kept and interpolated ones


@pytest.mark.parametrize("name", CONFIGS)
def test_written_configs_are_read_again(name, tmp_path):
    cfg = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg, (5, 7))))
    assert read_config(tmp_path) == cfg
    assert read_stop_ids(tmp_path) == (5, 7)


def test_stop_ids_come_from_the_generation_config_first(tmp_path):
    assert read_stop_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert read_stop_ids(tmp_path) == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 3]}')
    assert read_stop_ids(tmp_path) == (4, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(UserError, match="eos_token_id"):
        read_stop_ids(tmp_path)


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "key/value heads"),
        ({"head_dim": 15}, "head_dim"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(change, mentions):
    with pytest.raises(UserError, match=mentions):
        from_hf({**LLAMA, **change})


def test_unknown_dtypes_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="float8"):
        from_hf(LLAMA, dtype="float8")
    with pytest.raises(UserError, match="config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_config(tmp_path)
    assert isinstance(from_hf(LLAMA, "bfloat16"), DecoderConfig)
