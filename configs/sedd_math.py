"""REOAC with SEDD, score entropy diffusion: the original's MATH run, and small runs without it.

    python -m reoac_jax.main --config=configs/sedd_math.py:tiny
    python -m reoac_jax.main --mode=pretrain --config=configs/sedd_math.py:pretrain
    python -m reoac_jax.main --config=configs/sedd_math.py:generated
    python -m reoac_jax.main --config=configs/sedd_math.py    # released model, needs a GPU

Variants
  (none)     louaaron/sedd-small on MATH with the original's values (its config names
             kuleshov-group/sedd-owt, which was never published); data from --mode=prep.
  generated  plus on the model that `pretrain` leaves in runs/sedd_model, generated word problems.
  pretrain   with --mode=pretrain: trains that model from scratch by score entropy.
  tiny       every code path in seconds, random weights, for tests.
"""

from ml_collections import ConfigDict

from configs import gsm8k

VARIANTS = ("", "generated", "pretrain", "tiny")
MODEL = "runs/sedd_model"


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    like = {"": "paper", "tiny": "tiny", "pretrain": "pretrain"}.get(variant, "")
    config = gsm8k.get_config(like)
    _sedd(config)
    if variant == "":
        _released(config)
    elif variant == "tiny":
        _tiny(config)
    elif variant == "pretrain":
        config.logging.exp_name = "sedd_pretrain"
        config.pretrain.output = MODEL
    else:
        config.logging.exp_name = "sedd_generated"
        config.backbone.model_name_or_path = MODEL
    return config


def _sedd(c: ConfigDict) -> None:
    """The family, and the size of the model trained here (1.4 M parameters)."""
    c.backbone.name = "sedd"
    c.model.hidden_size = 128
    c.model.num_blocks = 5
    c.model.num_heads = 4
    c.model.cond_dim = 64


def _tiny(c: ConfigDict) -> None:
    """Random weights of 0.1 M parameters."""
    c.logging.exp_name = "sedd_tiny"
    c.backbone.model_name_or_path = "scratch"
    c.model.hidden_size = 32
    c.model.num_blocks = 2
    c.model.num_heads = 2
    c.model.cond_dim = 16


def _released(c: ConfigDict) -> None:
    """The original's values of its SEDD config."""
    c.logging.exp_name = "sedd_gpt2_math"
    c.dataset.task = "math"
    c.reward.time_limit = 5.0
    c.dataset.train_path = "dataset/processed/math_train.jsonl"
    c.dataset.eval_path = "dataset/processed/math_test.jsonl"
    c.dataset.hf_dataset = "EleutherAI/hendrycks_math"
    c.dataset.hf_config = ""
    c.backbone.model_name_or_path = "louaaron/sedd-small"
    c.backbone.tokenizer_name_or_path = "gpt2"
    c.backbone.max_length = 256
    c.backbone.sample_strategy = "argmax"
    c.rollout.max_steps = 8
    c.rollout.gen_len = 48
    c.rollout.branch_steps = (2, 5)
    c.rollout.branch_k = 3
    c.rollout.selection_mode = "argmax"
    c.rollout.cost_lambda = 0.0
    c.rollout.fallback_operator = "O_SCOPE"
    c.rollout.batch_size = 1
    c.losses.backbone_weight = 1.0
    c.losses.actor_temperature = 1.0
    c.losses.advantage_clip = 0.0
    c.actor.hidden_size = c.critic.hidden_size = 96
    c.finetune_mode = "lora"
    c.optim.backbone_lr = 1e-5
    c.updates.critic_steps = 1
    c.num_iterations = 1
    c.episodes_per_iter = 2
