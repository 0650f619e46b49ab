"""GGUF files: config from the metadata, tensors dequantised to float32 as they are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, require
from common.lm.config import DecoderConfig, Llama3Scaling
from common.lm.tensor_files import StoredTensor
from common.torch_bridge import FLATTENED, Layout, Rule, linear

# Block tensors: GGUF name, path, layout of a Rule.
_NORMS = (("attn_norm", "norm_attn"), ("ffn_norm", "norm_mlp"))
_MLP = (("ffn_gate", "gate"), ("ffn_up", "up"), ("ffn_down", "down"))
_ROPE_FACTORS = "rope_freqs.weight"
# What Llama 3.1 and later were released with; a GGUF stores only the resulting divisors.
_LLAMA3_RELEASED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 8192}


def interleaved_heads() -> Layout:
    """Query or key projection [H * K, D] whose rows pair the two halves of a head.

    GGUF stores Llama's rotated pairs side by side: row (h, j, half) where torch has (h, half, j).
    """
    plain = linear()

    def to_flax(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        heads, size = shape[1:]
        pairs = tensor.reshape(heads, size // 2, 2, -1).swapaxes(1, 2)
        return plain.to_flax(pairs.reshape(tensor.shape), shape)

    def from_flax(param: np.ndarray) -> np.ndarray:
        heads, size = param.shape[1:]
        rows = plain.from_flax(param)
        return rows.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(rows.shape)

    return Layout(to_flax, from_flax, plain.torch_shape)


def gguf_rules(cfg: DecoderConfig) -> list[Rule]:
    """Name table of GGUF models of the supported families."""
    rotated = interleaved_heads() if cfg.model_type == "llama" else linear()
    rules = [
        Rule("token_embd.weight", "embed/embedding"),
        Rule("output_norm.weight", "norm_final/scale"),
    ]
    for i in range(cfg.num_layers):
        source, target = f"blk.{i}", f"layers/{i}"
        rules += [Rule(f"{source}.{g}.weight", f"{target}/{p}/scale") for g, p in _NORMS]
        rules += [
            Rule(f"{source}.attn_q.weight", f"{target}/attn/q/kernel", rotated),
            Rule(f"{source}.attn_k.weight", f"{target}/attn/k/kernel", rotated),
            Rule(f"{source}.attn_v.weight", f"{target}/attn/v/kernel", linear()),
            Rule(f"{source}.attn_output.weight", f"{target}/attn/o/kernel", linear(2)),
        ]
        rules += [
            Rule(f"{source}.{g}.weight", f"{target}/mlp/{p}/kernel", linear()) for g, p in _MLP
        ]
        if cfg.qkv_bias:
            rules += [
                Rule(f"{source}.attn_{p}.bias", f"{target}/attn/{p}/bias", FLATTENED)
                for p in ("q", "k", "v")
            ]
        if cfg.qk_norm:
            rules += [
                Rule(f"{source}.attn_{p}_norm.weight", f"{target}/attn/{p}_norm/scale")
                for p in ("q", "k")
            ]
    if not cfg.tie_embeddings:
        rules.append(Rule("output.weight", "head/kernel", linear()))
    return rules


def open_gguf(
    path: str | Path, dtype: str = "float32"
) -> tuple[DecoderConfig, tuple[int, ...], dict[str, StoredTensor], list[Rule]]:
    """Opens a GGUF file.

    Args:
        path: The file.
        dtype: Activation and weight dtype of the config.

    Returns:
        The config, the end-of-sequence ids, the tensors by GGUF name, and their name table.

    Raises:
        UserError: The `gguf` package is absent, the file is damaged, or its model unsupported.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"reading '{path}' needs the package gguf: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"cannot read '{path}': {str(error).splitlines()[0]}") from error
    stored: dict[str, StoredTensor] = {}
    for tensor in reader.tensors:
        require(tensor.name not in stored, f"tensor '{tensor.name}' is twice in '{path}'")
        shape = tuple(int(n) for n in reversed(tensor.shape))

        def read(tensor: Any = tensor, shape: tuple[int, ...] = shape) -> np.ndarray:
            return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)

        stored[tensor.name] = StoredTensor(shape, read)
    factors = stored.pop(_ROPE_FACTORS, None)
    cfg = read_metadata(fields, stored, None if factors is None else np.asarray(factors), dtype)
    stop = fields.get("tokenizer.ggml.eos_token_id")
    return cfg, () if stop is None else (int(stop),), stored, gguf_rules(cfg)


def read_metadata(
    fields: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    rope_factors: np.ndarray | None,
    dtype: str = "float32",
) -> DecoderConfig:
    """Decoder config from GGUF metadata.

    Args:
        fields: Metadata by key.
        tensors: By GGUF name; shapes tell the vocabulary, and whether the head is free.
        rope_factors: [K/2] divisors of the rotary frequencies, or None.
        dtype: Activation and weight dtype.

    Returns:
        The config.

    Raises:
        UserError: A key is missing or says something the decoder does not compute.
    """
    family = fields.get("general.architecture")
    require(
        family in ("llama", "qwen2", "qwen3"),
        f"GGUF architecture {family!r} is not supported by the JAX decoder",
    )

    def value(key: str, default: Any = None) -> Any:
        found = fields.get(f"{family}.{key}", default)
        require(found is not None, f"the GGUF file lacks the key '{family}.{key}'")
        return found

    require(not value("expert_count", 0), "GGUF: mixtures of experts are not supported")
    scaling_type = fields.get(f"{family}.rope.scaling.type", "none")
    require(scaling_type in ("none", None), f"GGUF: rope scaling '{scaling_type}' is unsupported")
    require("token_embd.weight" in tensors, "missing tensor 'token_embd.weight' in the GGUF file")
    heads, width = int(value("attention.head_count")), int(value("embedding_length"))
    head_dim = int(value("attention.key_length", width // heads))
    rotated = int(value("rope.dimension_count", head_dim))
    require(rotated == head_dim, f"GGUF: only {rotated} of {head_dim} head dimensions are rotated")
    theta = float(value("rope.freq_base", 10000.0))
    return DecoderConfig(
        model_type=str(family),
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=int(value("feed_forward_length")),
        num_layers=int(value("block_count")),
        num_heads=heads,
        num_kv_heads=int(value("attention.head_count_kv", heads)),
        head_dim=head_dim,
        # Stored in single precision: 1e-5 comes back as 9.99999974e-06.
        rms_eps=float(f"{value('attention.layer_norm_rms_epsilon'):.7g}"),
        rope_theta=float(f"{theta:.7g}"),
        rope_scaling=_read_scaling(rope_factors, head_dim, theta),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings="output.weight" not in tensors,
        max_positions=int(value("context_length")),
        dtype=dtype,
    )


def _read_scaling(factors: np.ndarray | None, head_dim: int, theta: float) -> Llama3Scaling | None:
    """The released llama3 scaling whose divisors these are.

    Raises:
        UserError: There is none.
    """
    if factors is None or np.all(factors == 1.0):
        return None
    scaling = Llama3Scaling(factor=float(factors.max()), **_LLAMA3_RELEASED)  # type: ignore[arg-type]
    require(
        factors.shape == (head_dim // 2,)
        and np.allclose(scaling.divisors(head_dim, theta), factors, rtol=1e-4),
        f"tensor '{_ROPE_FACTORS}' is not the rotary scaling of a Llama 3 model: unsupported",
    )
    return scaling
