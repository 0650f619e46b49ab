"""The static description of an E2D2 network and the shapes and initial values of its parameters."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from common.lm.config import Llama3Scaling

SCORE_MODES = ("blockwise", "single_block", "left_to_right")


@dataclasses.dataclass(frozen=True)
class E2D2Config:
    """Static description of an E2D2 network; hashable, so it can be a static jit argument.

    Attributes:
      kv_layers: "shared KV" only: the encoder layer whose keys and values decoder layer i reads.
      block_size: S, tokens per block.
      length: longest sequence of training, in tokens.
      qk_norm: queries and keys are normalised per head (Qwen3).
      qkv_bias: their projections and the values' have biases (Qwen2).
      rope_scaling: slowed rotary frequencies (Llama 3.1), or None.
      tie_head: logits use the embedding table.
      tie_encoder_decoder: the decoder is the top `num_decoder_layers` of the encoder itself.
      prompt_attention: how a prompt is encoded at generation: "bidirectional" | "block_causal".
      dtype: activation dtype, "float32" | "bfloat16"; parameters stay float32.
    """

    vocab_size: int
    mask_id: int
    hidden_size: int
    intermediate_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    length: int
    pad_id: int = 0
    bos_id: int = 0
    eos_id: int = 0
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    rope_scaling: Llama3Scaling | None = None
    tie_head: bool = True
    share_kv: bool = False
    tie_encoder_decoder: bool = False
    kv_layers: tuple[int, ...] = ()
    encoder_causal: bool = False
    keep_clean_bos: bool = True
    train_on_context: bool = False
    noise: str = "linear"
    score_mode: str = "blockwise"
    prompt_attention: str = "bidirectional"
    dtype: str = "float32"
    attn_impl: str = "auto"
    remat: bool = False

    @property
    def activation_dtype(self) -> Any:
        """The jnp dtype of activations."""
        return jnp.dtype(self.dtype)


def _stack_spec(cfg: E2D2Config, n: int) -> dict[str, Any]:
    """Nested {name: shape} of n stacked layers."""
    d, k = cfg.hidden_size, cfg.head_dim
    attn: dict[str, Any] = {"o": {"kernel": (n, cfg.num_heads, k, d)}}
    for name in ("q", "k", "v"):
        heads = cfg.num_heads if name == "q" else cfg.num_kv_heads
        attn[name] = {"kernel": (n, d, heads, k)}
        if cfg.qkv_bias:
            attn[name]["bias"] = (n, heads, k)
        if cfg.qk_norm and name != "v":
            attn[f"{name}_norm"] = {"scale": (n, k)}
    return {
        "norm_attn": {"scale": (n, d)},
        "attn": attn,
        "norm_mlp": {"scale": (n, d)},
        "mlp": {
            "gate": {"kernel": (n, d, cfg.intermediate_size)},
            "up": {"kernel": (n, d, cfg.intermediate_size)},
            "down": {"kernel": (n, cfg.intermediate_size, d)},
        },
    }


def parameter_shapes(cfg: E2D2Config) -> dict[str, Any]:
    """Nested {name: shape} of every parameter, in float32."""
    d = cfg.hidden_size
    spec: dict[str, Any] = {
        "embed": {"embedding": (cfg.vocab_size, d)},
        "encoder": {
            "layers": _stack_spec(cfg, cfg.num_encoder_layers),
            "norm_final": {"scale": (d,)},
        },
    }
    if not cfg.tie_encoder_decoder:
        spec["decoder"] = {
            "layers": _stack_spec(cfg, cfg.num_decoder_layers),
            "norm_final": {"scale": (d,)},
        }
    if not cfg.tie_head:
        spec["head"] = {"kernel": (d, cfg.vocab_size)}
    return spec


def initializer(num_layers: int, path: str, shape: tuple[int, ...]) -> nn.initializers.Initializer:
    """Normal(0.02) for tables and projections, ones for norms.

    Projections that write to the residual stream are scaled by 1/sqrt(2 n), so that the stream's
    variance does not grow with depth.
    """
    del shape
    *_, parent, name = path.split("/")
    if name == "scale":
        return nn.initializers.ones
    if name == "bias":
        return nn.initializers.zeros
    if parent in ("o", "down"):
        return nn.initializers.normal(0.02 / (2 * num_layers) ** 0.5)
    return nn.initializers.normal(0.02)
