"""REOAC on GSM8K with MDLM, a bidirectional masked diffusion model.

    python -m reoac_jax.main --mode=pretrain --config=configs/mdlm_gsm8k.py:pretrain
    python -m reoac_jax.main --config=configs/mdlm_gsm8k.py
    python -m reoac_jax.main --config=configs/mdlm_gsm8k.py:owt   # released 170M model, needs a GPU

Variants
  (none)    plus on the model that `pretrain` leaves in runs/mdlm_gsm8k_model.
  pretrain  with --mode=pretrain: trains that model from scratch on generated word problems.
  tiny      every code path in seconds, random weights, for tests.
  cached    like (none), with the prompt's keys and values kept over an episode (approximate).
  owt       kuleshov-group/mdlm-owt with the original's GSM8K values.
"""

from ml_collections import ConfigDict

from configs import gsm8k

VARIANTS = ("", "pretrain", "tiny", "cached", "owt")
MODEL = "runs/mdlm_gsm8k_model"


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    like = {"tiny": "tiny", "pretrain": "pretrain", "owt": "e2d2"}.get(variant, "")
    config = gsm8k.get_config(like)
    _mdlm(config)
    if variant == "tiny":
        _tiny(config)
    elif variant == "pretrain":
        config.logging.exp_name = "mdlm_gsm8k_pretrain"
        config.pretrain.output = MODEL
    elif variant == "owt":
        config.logging.exp_name = "mdlm_owt_gsm8k"
        config.backbone.model_name_or_path = "kuleshov-group/mdlm-owt"
        config.backbone.tokenizer_name_or_path = "gpt2"
    else:
        config.backbone.model_name_or_path = MODEL
        config.logging.exp_name = "mdlm_gsm8k"
    if variant == "cached":
        config.logging.exp_name = "mdlm_gsm8k_cached"
        config.backbone.score_mode = "prompt_cached"
    return config


def _mdlm(c: ConfigDict) -> None:
    """The family, and the size of the model trained here (1.3 M parameters)."""
    c.backbone.name = "mdlm"
    c.model.hidden_size = 128
    c.model.num_blocks = 5
    c.model.num_heads = 4
    c.model.cond_dim = 64


def _tiny(c: ConfigDict) -> None:
    """Random weights of 0.1 M parameters."""
    c.logging.exp_name = "mdlm_gsm8k_tiny"
    c.backbone.model_name_or_path = "scratch"
    c.model.hidden_size = 32
    c.model.num_blocks = 2
    c.model.num_heads = 2
    c.model.cond_dim = 16
