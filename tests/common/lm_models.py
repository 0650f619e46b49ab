"""Random models of a few thousand weights, one for each switch of the decoder."""

import dataclasses

import jax

from common.lm.config import DecoderConfig, Llama3Scaling
from common.lm.decoder import init_params
from common.lm.weights import Model

BASE = DecoderConfig(
    model_type="llama",
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_positions=128,
)
CONFIGS = {
    "llama": BASE,
    "llama3": dataclasses.replace(
        BASE,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16),
        rope_theta=50.0,
        tie_embeddings=True,
    ),
    "qwen2": dataclasses.replace(BASE, model_type="qwen2", qkv_bias=True, head_dim=4),
    "qwen3": dataclasses.replace(BASE, model_type="qwen3", qk_norm=True, tie_embeddings=True),
}


def random_model(name: str, seed: int = 0) -> Model:
    """A model whose every parameter differs from its initial value and matters."""
    cfg = CONFIGS[name]
    params = init_params(jax.random.key(seed), cfg, stddev=0.3)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return Model(jax.tree.unflatten(tree, noisy), cfg, (2,))
