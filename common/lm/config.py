"""What a decoder-only language model of the Llama/Qwen family looks like, from its config.json.

Llama, Qwen2/2.5 and Qwen3 are one block with switches: biases on the query, key and value
projections (Qwen2), norms on queries and keys (Qwen3), slowed-down rotary frequencies (Llama 3.1
and later), tied embeddings. Whatever these switches cannot express is refused by name.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from common.errors import UserError, require
from common.json_files import read_json_object

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Supported `model_type`s and the architecture each is saved as."""

DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT_THETA = 10000.0
_CURE = "restore the file, or name another model"
# Keys that change the arithmetic in a way this decoder lacks, with the values that leave it alone.
_INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "is_decoder": (True, False),
    "add_cross_attention": (False,),
}


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies of Llama 3.1: long wavelengths are slowed by `factor`.

    Attributes:
        factor: Divisor of the frequencies whose wavelength exceeds original / low_freq_factor.
        low_freq_factor: Wavelengths above original / low_freq_factor are slowed fully.
        high_freq_factor: Wavelengths below original / high_freq_factor stay; between the two
            bounds the frequency is interpolated.
        original_max_positions: Context length the model was first trained with.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def divisors(self, head_dim: int, theta: float) -> tuple[float, ...]:
        """By how much each of the K/2 frequencies is divided."""
        result = []
        for j in range(0, head_dim, 2):
            wavelength = 2 * math.pi * theta ** (j / head_dim)
            turns = self.original_max_positions / wavelength  # over the original context
            smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            smooth = min(max(smooth, 0.0), 1.0)
            result.append(1.0 / ((1.0 - smooth) / self.factor + smooth))
        return tuple(result)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one decoder; static and hashable, so jit caches on it.

    Attributes:
        model_type: "llama" | "qwen2" | "qwen3"; only names the family in files.
        vocab_size: V, rows of the embedding; may exceed the tokenizer's size.
        hidden_size: D.
        intermediate_size: I, width of the SwiGLU.
        num_layers: Number of blocks.
        num_heads: H, query heads.
        num_kv_heads: H_kv, key/value heads; divides H.
        head_dim: K; H * K need not be D.
        rms_eps: Epsilon of every RMS norm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Slowed-down frequencies, or None.
        qkv_bias: Query, key and value projections carry a bias.
        qk_norm: Queries and keys are RMS-normalised per head.
        tie_embeddings: Logits use the embedding table.
        max_positions: Longest sequence the model was made for.
        dtype: Activations, cache and loaded weights: "float32" | "bfloat16" | "float16".
            Norms, softmax, rotary angles and logits are float32 in any case.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float = 1e-6
    rope_theta: float = _DEFAULT_THETA
    rope_scaling: Llama3Scaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    max_positions: int = 2048
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises UserError where the sizes do not fit together."""
        require(self.model_type in FAMILIES, _unknown_family(self.model_type))
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value > 0,
                f"model config: {name} is {value!r}, not a positive integer",
            )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model config: {self.num_heads} query heads do not divide evenly among "
            f"{self.num_kv_heads} key/value heads",
        )
        require(self.head_dim % 2 == 0, f"model config: head_dim {self.head_dim} is odd")
        require(
            self.dtype in DTYPES,
            f"model dtype '{self.dtype}' is none of {', '.join(DTYPES)}",
        )

    @property
    def activation_dtype(self) -> Any:
        """The dtype of activations and cache."""
        return jnp.dtype(self.dtype)

    @functools.cached_property
    def rope_divisors(self) -> tuple[float, ...] | None:
        """Divisors of the rotary frequencies, or None."""
        if self.rope_scaling is None:
            return None
        return self.rope_scaling.divisors(self.head_dim, self.rope_theta)


def from_hf(config: Mapping[str, Any], dtype: str = "float32") -> DecoderConfig:
    """Reads the contents of a config.json, as written by transformers 4 or 5.

    Args:
        config: The parsed file.
        dtype: Activation and weight dtype; the file's own is not taken over.

    Returns:
        The decoder's config.

    Raises:
        UserError: A field is missing, or says something this decoder does not compute.
    """
    family = config.get("model_type")
    require(family in FAMILIES, _unknown_family(family))
    for key, inert in _INERT_VALUES.items():
        value = config.get(key)
        if value is not None and value not in inert:
            raise UserError(f"config.json: {key}={value!r} is not supported by the JAX decoder")
    sliding = [kind for kind in config.get("layer_types") or () if kind != "full_attention"]
    require(not sliding, f"config.json: layer_types contains {sliding[:1]}: only full_attention")
    heads = _integer(config, "num_attention_heads")
    width = _integer(config, "hidden_size")
    theta, scaling = read_rope(config)
    return DecoderConfig(
        model_type=str(family),
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=width,
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_integer(config, "num_key_value_heads", heads),
        # Qwen3's head size is a parameter of its own and 128 where the file leaves it out.
        head_dim=_integer(config, "head_dim", 128 if family == "qwen3" else width // heads),
        rms_eps=float(config.get("rms_norm_eps") or 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=_integer(config, "max_position_embeddings", 2048),
        dtype=dtype,
    )


def to_hf(cfg: DecoderConfig, stop_ids: tuple[int, ...] = ()) -> dict[str, Any]:
    """Contents of a config.json that transformers 4 and 5 load.

    Args:
        cfg: The decoder.
        stop_ids: Written as `eos_token_id`.

    Returns:
        Plain values. The frequencies stand in it twice, as the two generations spell them.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if cfg.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": cfg.rope_scaling.factor,
            "low_freq_factor": cfg.rope_scaling.low_freq_factor,
            "high_freq_factor": cfg.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": cfg.rope_scaling.original_max_positions,
        }
    result: dict[str, Any] = {
        "architectures": [FAMILIES[cfg.model_type]],
        "model_type": cfg.model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.rms_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if cfg.rope_scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": cfg.rope_theta},
        "tie_word_embeddings": cfg.tie_embeddings,
        "use_cache": True,
        "dtype": cfg.dtype,
    }
    if cfg.model_type != "qwen2":
        result["attention_bias"] = False
    if cfg.model_type == "llama":
        result["mlp_bias"] = False
    else:
        result["use_sliding_window"] = False
    if stop_ids:
        result["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
    return result


def read_config(directory: str | Path, dtype: str = "float32") -> DecoderConfig:
    """Reads `config.json` of a model directory.

    Raises:
        UserError: It is absent, no JSON, or not supported.
    """
    path = Path(directory) / "config.json"
    content = read_json_object(path, _CURE)
    try:
        return from_hf(content, dtype)
    except UserError as error:
        raise UserError(f"{path}: {error}; {_CURE}") from error


def read_stop_ids(directory: str | Path) -> tuple[int, ...]:
    """End-of-sequence ids of a model directory: generation_config.json's, else config.json's.

    Raises:
        UserError: A file is damaged or its entry is not made of token ids.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        if not path.exists():
            continue
        found = read_json_object(path, _CURE).get("eos_token_id")
        if found is None:
            continue
        ids = tuple(found) if isinstance(found, list) else (found,)
        require(
            all(isinstance(i, int) and i >= 0 for i in ids),
            f"{path}: eos_token_id {found!r:.80} is neither a token id nor a list of them; {_CURE}",
        )
        return ids
    return ()


def read_rope(config: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling: `rope_parameters` (transformers 5), or `rope_theta` + `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    require(isinstance(rope, Mapping), f"config.json: rope parameters {rope!r} are no object")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"config.json: rope_type '{kind}' is not supported: only default, llama3")
    try:
        scaling = Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise UserError(f"config.json: llama3 rope parameters lack {error}") from error
    return theta, scaling


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    require(value is not None, f"config.json lacks '{key}'")
    require(
        isinstance(value, int) and not isinstance(value, bool),
        f"config.json: {key}={value!r} is no integer",
    )
    assert isinstance(value, int)
    return value


def _unknown_family(family: Any) -> str:
    return f"model_type {family!r} is not supported by the JAX decoder: only {', '.join(FAMILIES)}"
