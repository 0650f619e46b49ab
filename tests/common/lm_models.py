"""Random models of a few thousand weights, one for each switch of the decoder."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from common.lm.config import DecoderConfig, Llama3Scaling
from common.lm.decoder import build_params, param_shapes
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


def random_model(name: str | DecoderConfig, seed: int = 0) -> Model:
    """A model whose every parameter differs from its initial value; made without compiling."""
    cfg = CONFIGS[name] if isinstance(name, str) else name
    rng = np.random.default_rng(seed)
    flat = {
        path: jnp.asarray(path.endswith("/scale") + 0.3 * rng.normal(size=shape), jnp.float32)
        for path, shape in param_shapes(cfg).items()
    }
    return Model(build_params(flat), cfg, (2,))
