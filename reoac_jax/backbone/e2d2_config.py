"""The hub's `config.json` of E2D2 models as `E2D2Config`, with the source of every value.

Sizes come from tensor shapes and must agree with the files; what no tensor shows (rotary base,
epsilon, block size, ids, schedule, layer pairing) comes from `config.json`, then from the config
of the base model it names.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.lm.config import read_rope
from reoac_jax.backbone.e2d2_parameters import SCORE_MODES, E2D2Config
from reoac_jax.backbone.hub_files import Json, read_json

ENCODER, DECODER = "backbone.encoder.", "backbone.decoder."
EMBEDDING = ENCODER + "model.embed_tokens.weight"
HEAD = DECODER + "lm_head.weight"

_QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
BASE_CONFIGS: dict[str, Json] = {
    "Qwen3-0.6B": {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "Qwen3-1.7B": {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
}
"""Base models of the released networks; their configs are not among the released files."""

_FAMILIES = ("llama", "qwen2", "qwen3")  # whose layers the network can have
SCHEDULE_CLASSES = {
    "LinearNoise": "linear",
    "CosineNoise": "cosine",
    "LogarithmicNoise": "logarithmic",
    "ExponentialNoise": "exponential",
}
# The only released model that was trained without prompts uses the GPT-2 tokenizer.
_UNCONDITIONAL_TOKENIZERS = ("gpt2",)


# ----------------------------------------------------------------------------- reading the files
def find_base_config(config: Json, directory: Path, override: Path | None) -> tuple[Json, str]:
    """The config of the base model and where it was found.

    Args:
        config: Content of `config.json`.
        directory: Directory of the model, where a `base_config.json` may lie.
        override: File that wins over everything.

    Returns:
        The base config and the name of its source.

    Raises:
        UserError: The base model is unknown or uses a feature this network lacks.
    """
    beside = directory / "base_config.json"
    name = str(config.get("backbone_config", {}).get("pretrained_model_name_or_path") or "")
    short = name.rsplit("/", 1)[-1].removesuffix("-Base")
    if override is not None:
        base, source = read_json(override), str(override)
    elif beside.is_file():
        base, source = read_json(beside), beside.name
    elif short in BASE_CONFIGS:
        base, source = BASE_CONFIGS[short], f"built-in table, {short}"
    else:
        raise UserError(
            f"base model '{name}' of '{directory / 'config.json'}' is unknown: "
            "give its config with --base-config FILE or as base_config.json beside config.json"
        )
    family = base.get("model_type", "qwen3")
    if family not in _FAMILIES:
        raise UserError(f"{source}: model_type '{family}' is none of {', '.join(_FAMILIES)}")
    if base.get("rope_parameters"):  # newer spelling of the same settings
        rope = base["rope_parameters"]
        base = {**base, "rope_theta": rope.get("rope_theta", base.get("rope_theta"))}
    read_rope(base)  # refuses what the network lacks
    unsupported = {
        "attention_bias": bool(base.get("attention_bias")),
        "use_sliding_window": bool(base.get("use_sliding_window")),
        "hidden_act": base.get("hidden_act", "silu") != "silu",
    }
    for key, present in unsupported.items():
        if present:
            raise UserError(f"{source}: '{key}' = {base.get(key)!r} is not supported")
    return base, source


# ------------------------------------------------------------------------------ E2D2Config
class _Values:
    """Looks values up in several files and remembers where each was found."""

    def __init__(self, config: Json, base: Json, base_source: str):
        self.layers: list[tuple[str, Mapping[str, Any]]] = [
            ("config.json backbone_config", config.get("backbone_config", {})),
            ("config.json", config),
            ("config.json tokenization_config", config.get("tokenization_config", {})),
            (base_source, base),
        ]
        self.found: Json = {}
        self.provenance: dict[str, str] = {}

    def get(self, field: str, key: str, default: Any = None, where: str = "") -> Any:
        """First value of `key` that is not null, recorded as `field`."""
        for source, layer in self.layers:
            if where in source and layer.get(key) is not None:
                return self.put(field, layer[key], source)
        if default is None:
            raise UserError(f"'{key}' stands neither in config.json nor in the base config")
        return self.put(field, default, "default")

    def put(self, field: str, value: Any, source: str) -> Any:
        """Records a value and its source."""
        self.found[field], self.provenance[field] = value, source
        return value

    def measured(self, field: str, value: int, tensor: str, *keys: str) -> int:
        """Records a size read from a tensor after checking it against every file that states it."""
        for key in keys:
            # The first file that states a key wins over the others, so only that one must agree.
            for source, layer in self.layers:
                stated = layer.get(key)
                if stated is None or (isinstance(stated, int) and stated < 0):  # -1 = all layers
                    continue
                if stated != value:
                    raise UserError(
                        f"{source} says {key} = {stated}, but tensor '{tensor}' shows {value}"
                    )
                break
        return self.put(field, value, f"tensor {tensor}")


def declared_ties(config: Json, base: Json) -> tuple[bool | None, bool | None]:
    """What the files say about (tied encoder/decoder, tied head); None = nothing."""
    backbone = config.get("backbone_config", {})
    head = backbone.get("tie_word_embeddings", base.get("tie_word_embeddings"))
    return backbone.get("tie_encoder_decoder_weights"), head


def derive_config(
    tensors: Mapping[str, np.ndarray],
    config: Json,
    base: Json,
    base_source: str,
    *,
    tie_stacks: bool,
    tie_head: bool,
) -> tuple[E2D2Config, dict[str, str]]:
    """Builds the static description of a network from its tensors and files.

    Args:
        tensors: Tensors under the original names, aliases already removed.
        config: Content of `config.json`.
        base: Config of the base model.
        base_source: Where `base` was found.
        tie_stacks: The decoder is the top of the encoder.
        tie_head: The head is the embedding.

    Returns:
        The config and the source of every field.

    Raises:
        UserError: A value is missing, unsupported or contradicts a tensor.
    """
    values = _Values(config, base, base_source)
    _measure(values, tensors, tie_stacks)
    values.put("tie_head", tie_head, "tensor values")
    values.put("tie_encoder_decoder", tie_stacks, "tensor values")
    _check_scope(config)

    target = str(values.layers[0][1].get("_target_", "")).rsplit(".", 1)[-1]
    if target not in ("LLMasEncoderDecoder", "LLMasEncoderDecoderShareKV"):
        raise UserError(f"config.json backbone_config._target_ '{target}' is not an E2D2 network")
    share_kv = target.endswith("ShareKV")
    values.put("share_kv", share_kv, "config.json backbone_config")
    values.put("noise", _schedule_name(config), "config.json noise_config")

    values.get("mask_id", "mask_token_id")
    eos = values.get("eos_id", "eos_token_id", 0)
    values.get("bos_id", "bos_token_id", eos)
    values.get("pad_id", "pad_token_id", eos)
    values.get("block_size", "block_size")
    values.get("length", "max_length" if config.get("length") is None else "length")
    values.get("keep_clean_bos", "keep_clean_bos", True)
    values.get("train_on_context", "train_on_context", False)
    values.get("encoder_causal", "use_encoder_causal_mask", False)
    values.get("rope_theta", "rope_theta")
    values.get("rms_eps", "rms_norm_eps")
    values.put("rope_scaling", read_rope(base)[1], base_source)
    values.get("score_mode", "score_mode", "blockwise")
    if values.found["score_mode"] not in SCORE_MODES:
        raise UserError(f"config.json: score_mode must be one of {', '.join(SCORE_MODES)}")
    tokenizer = str(config.get("tokenizer_name") or "").rsplit("/", 1)[-1]
    unconditional = tokenizer in _UNCONDITIONAL_TOKENIZERS
    values.get(
        "prompt_attention",
        "prompt_attention",
        "block_causal" if unconditional else "bidirectional",
    )
    values.put("kv_layers", *_kv_layers(values, base) if share_kv else ((), "unused"))
    for field in ("rope_theta", "rms_eps"):
        values.found[field] = float(values.found[field])
    for field in ("mask_id", "eos_id", "bos_id", "pad_id", "block_size", "length"):
        if not isinstance(values.found[field], int):
            raise UserError(f"config.json: {field} must be an integer: {values.found[field]!r}")
    if not 0 <= values.found["mask_id"] < values.found["vocab_size"]:
        raise UserError(
            f"{values.provenance['mask_id']} says mask_token_id = {values.found['mask_id']}, but "
            f"tensor '{EMBEDDING}' has {values.found['vocab_size']} rows"
        )
    return E2D2Config(**values.found), values.provenance


def _measure(values: _Values, tensors: Mapping[str, np.ndarray], tie_stacks: bool) -> None:
    """Reads every size that a tensor shape shows."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"missing tensor '{name}'")
        if tensors[name].ndim != rank:
            raise UserError(f"tensor '{name}' has shape {tensors[name].shape}, not {rank} axes")
        return tensors[name].shape

    layer = ENCODER + "model.layers.0."
    q_norm, q_proj = layer + "self_attn.q_norm.weight", layer + "self_attn.q_proj.weight"
    k_proj, gate = layer + "self_attn.k_proj.weight", layer + "mlp.gate_proj.weight"
    vocab_size, hidden_size = shape(EMBEDDING, 2)
    values.measured("hidden_size", hidden_size, EMBEDDING, "hidden_size")
    family = values.layers[-1][1].get("model_type", "qwen3")
    values.put("qk_norm", family == "qwen3", values.layers[-1][0])
    values.put("qkv_bias", family == "qwen2", values.layers[-1][0])
    if values.found["qk_norm"]:
        head_dim = shape(q_norm, 1)[0]
        values.measured("head_dim", head_dim, q_norm, "head_dim")
    else:
        heads = values.get("num_heads", "num_attention_heads")
        head_dim = values.get("head_dim", "head_dim", shape(q_proj, 2)[0] // heads)
    for field, name, key in (
        ("num_heads", q_proj, "num_attention_heads"),
        ("num_kv_heads", k_proj, "num_key_value_heads"),
    ):
        rows = shape(name, 2)[0]
        if rows % head_dim:
            raise UserError(f"tensor '{name}' has {rows} rows, no multiple of head_dim {head_dim}")
        values.measured(field, rows // head_dim, name, key)
    values.measured("intermediate_size", shape(gate, 2)[0], gate, "intermediate_size")
    _measure_vocabulary(values, vocab_size)
    encoder_layers = _count_layers(tensors, ENCODER)
    values.measured("num_encoder_layers", encoder_layers, *_last(ENCODER, encoder_layers))
    if not tie_stacks:
        decoder_layers = _count_layers(tensors, DECODER)
        values.measured("num_decoder_layers", decoder_layers, *_last(DECODER, decoder_layers))
        return
    decoder_layers = values.get("num_decoder_layers", "num_decoder_layers")
    if not 0 < decoder_layers <= encoder_layers:
        raise UserError(
            f"config.json says num_decoder_layers = {decoder_layers}, but the encoder it is tied "
            f"to has {encoder_layers} ('{_last(ENCODER, encoder_layers)[0]}')"
        )


def _measure_vocabulary(values: _Values, rows: int) -> None:
    """Records V; `config.json` may count the tokenizer's entries instead of the padded rows."""
    (_, backbone), (_, config), *_, (_, base) = values.layers
    stated, multiple = config.get("vocab_size"), config.get("pad_vocab_size_multiple") or 1
    override = backbone.get("vocab_size")
    # Without an override the rows are those of the base model, whatever the tokenizer fills.
    slack = override is None and base.get("vocab_size") == rows
    contradicts = False
    if stated is not None and rows != -(-stated // multiple) * multiple:
        contradicts = stated > rows or not slack
    if contradicts:
        raise UserError(
            f"config.json says vocab_size = {stated}, but tensor '{EMBEDDING}' shows {rows}"
        )
    keys = ("vocab_size",) if override is not None or stated is None else ()
    values.measured("vocab_size", rows, EMBEDDING, *keys)


def _count_layers(tensors: Mapping[str, np.ndarray], side: str) -> int:
    """1 + the largest layer index of a side."""
    pattern = re.compile(re.escape(side) + r"model\.layers\.(\d+)\.")
    indices = [int(match[1]) for name in tensors if (match := pattern.match(name))]
    if not indices:
        raise UserError(f"missing tensor '{side}model.layers.0.*': no layers")
    return 1 + max(indices)


def _last(side: str, count: int) -> tuple[str, str]:
    """Name of the last layer and the config key of the count, for messages."""
    key = "num_encoder_layers" if side == ENCODER else "num_decoder_layers"
    return f"{side}model.layers.{count - 1}.*", key


def _kv_layers(values: _Values, base: Json) -> tuple[tuple[int, ...], str]:
    """Which encoder layer's keys and values each decoder layer reads.

    Tied: its own copy in the encoder. Decoder cut from the top of the base model: it kept the
    base model's layer numbers. Otherwise: equal index.
    """
    backbone = values.layers[0][1]
    n_enc, n_dec = values.found["num_encoder_layers"], values.found["num_decoder_layers"]
    explicit = values.layers[1][1].get("kv_layers")
    if explicit is not None:
        chosen, source = tuple(explicit), "config.json"
    elif values.found["tie_encoder_decoder"]:
        chosen, source = tuple(range(n_enc - n_dec, n_enc)), "tied stacks"
    elif backbone.get("keep_top_decoder_layers") and not backbone.get("reinit_decoder"):
        first = int(base["num_hidden_layers"]) - n_dec
        chosen = tuple(range(first, first + n_dec))
        source = f"keep_top_decoder_layers and num_hidden_layers of {values.layers[-1][0]}"
    else:
        chosen, source = tuple(range(n_dec)), "equal layer index"
    if len(chosen) != n_dec or not all(0 <= layer < n_enc for layer in chosen):
        raise UserError(
            f"decoder layers would read encoder layers {list(chosen)} ({source}), but there are "
            f"{n_enc} encoder and {n_dec} decoder layers: give the right --base-config FILE"
        )
    return chosen, source


def _schedule_name(config: Json) -> str:
    options = {k: v for k, v in config.get("noise_config", {}).items() if v is not None}
    target = str(options.pop("_target_", "LinearNoise"))
    kind = re.split(r"[._]", target)[-1]
    if kind not in SCHEDULE_CLASSES or options:
        raise UserError(f"config.json: noise_config '{target}' {options or ''} is not supported")
    return SCHEDULE_CLASSES[kind]


def _check_scope(config: Json) -> None:
    """Refuses variants this network does not have."""
    if config.get("diffusion_type", "absorbing") != "absorbing":
        raise UserError(f"config.json: diffusion_type '{config['diffusion_type']}' not supported")
    if config.get("time_conditioned_backbone"):
        raise UserError("config.json: time_conditioned_backbone is not supported for E2D2")
