"""`config.json` and `base_config.json` of an E2D2 network, as the hub's models have them."""

from common.errors import UserError
from reoac_jax.backbone.e2d2_config import SCHEDULE_CLASSES
from reoac_jax.backbone.e2d2_parameters import E2D2Config
from reoac_jax.backbone.hub_files import Json


def hub_config(cfg: E2D2Config, source: Json | None = None) -> Json:
    """Content of `config.json` for a network.

    Args:
        cfg: The network.
        source: The `config.json` it came from, whose other keys are kept.

    Returns:
        JSON object; besides the hub's keys it has `score_mode`, `prompt_attention`, `kv_layers`.
    """
    source = source or {}
    ids = {
        "bos_token_id": cfg.bos_id,
        "eos_token_id": cfg.eos_id,
        "mask_token_id": cfg.mask_id,
        "pad_token_id": cfg.pad_id,
    }
    kind = "LLMasEncoderDecoderShareKV" if cfg.share_kv else "LLMasEncoderDecoder"
    schedule = {name: cls for cls, name in SCHEDULE_CLASSES.items()}.get(cfg.noise)
    if schedule is None:
        raise UserError(f"noise schedule '{cfg.noise}' has no name in the hub layout of E2D2")
    backbone = {
        "_target_": f"backbone_encoder_decoder.{kind}",
        "pretrained_model_name_or_path": "base_config.json",
        "keep_top_decoder_layers": False,
        "keep_top_encoder_layers": False,
        "reinit_decoder": True,
        "reinit_encoder": True,
        "freeze_encoder": False,
        **source.get("backbone_config", {}),
        "max_length": cfg.length,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "vocab_size": cfg.vocab_size,
        "num_encoder_layers": cfg.num_encoder_layers,
        "num_decoder_layers": cfg.num_decoder_layers,
        "tie_encoder_decoder_weights": cfg.tie_encoder_decoder,
        "use_encoder_causal_mask": cfg.encoder_causal,
    }
    extra: Json = {"score_mode": cfg.score_mode, "prompt_attention": cfg.prompt_attention}
    if cfg.share_kv:
        extra["kv_layers"] = list(cfg.kv_layers)
    return {
        "architectures": ["E2D2"],
        "diffusion_type": "absorbing",
        "time_conditioned_backbone": False,
        "pad_vocab_size_multiple": 1,
        "vocab_size": cfg.vocab_size,
        "noise_config": {"_target_": f"noise_schedule_noise_schedules.{schedule}"},
        "T": 0,
        "eval_block_size": cfg.block_size,
        **source,
        "model_type": "e2d2",
        "length": cfg.length,
        "block_size": cfg.block_size,
        "keep_clean_bos": cfg.keep_clean_bos,
        "train_on_context": cfg.train_on_context,
        **ids,
        "tokenization_config": {
            "vocab_size": cfg.vocab_size,
            **source.get("tokenization_config", {}),
            **ids,
        },
        "backbone_config": backbone,
        **extra,
    }


def hub_base_config(cfg: E2D2Config, source: Json | None = None) -> Json:
    """Content of `base_config.json`: the layer geometry in the words of the base model.

    Args:
        cfg: The network.
        source: The base config it came from, whose other keys are kept.
    """
    layers = cfg.num_encoder_layers
    scaling = cfg.rope_scaling
    rope: Json = {}
    if scaling is not None:
        rope["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {
        "model_type": "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama",
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "attention_bias": False,
        **(source or {}),
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "vocab_size": cfg.vocab_size,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.rms_eps,
        "tie_word_embeddings": cfg.tie_head,
        **rope,
    }
