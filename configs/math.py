"""REOAC on MATH: seven subjects, five levels, graded by typed values.

    python -m reoac_jax.main --config=configs/math.py        # no download, smoke run
    python -m reoac_jax.main --config=configs/math.py:e2d2 --mode=prep      # data, once
    python -m reoac_jax.main --config=configs/math.py:e2d2

Variants
  (none)  plus on the bundled E2D2 and generated MATH-style problems; minutes on two cores. That
          backbone has never seen such problems: the run shows the machinery, not an accuracy.
  tiny    the same in seconds, for tests.
  e2d2    kuleshov-group/e2d2-owt with the original's values of its MATH config (needs a GPU).
  mdlm    kuleshov-group/mdlm-owt, the backbone of an older release, with the same values.
  paper   the original's algorithm, values and verifier on the bundled backbone.

SEDD has a file of its own (configs/sedd_math.py). Real files work with every variant:
--config.dataset.train_path=.../math/train.jsonl --config.dataset.eval_path=.../math/test.jsonl.
Evaluation writes eval_math.json with accuracy by subject and by level.
"""

from ml_collections import ConfigDict

from configs import gsm8k

VARIANTS = ("", "tiny", "e2d2", "mdlm", "paper")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    like = {"tiny": "tiny", "": ""}.get(variant, "paper")
    config = gsm8k.get_config(like)
    config.logging.exp_name = f"math_{variant or 'embedded'}"
    config.dataset.task = "math"
    config.dataset.hf_dataset = "EleutherAI/hendrycks_math"
    config.dataset.hf_config = ""
    config.reward.time_limit = 5.0  # computer algebra decides few pairs, but not at once
    if variant == "":
        config.num_iterations = 10
    elif variant != "tiny":
        _published(config)
    if variant in ("e2d2", "mdlm"):
        _released(config, variant)
    elif variant == "paper":
        config.eval.verifier = config.reward.verifier = "paper"
    return config


def _published(c: ConfigDict) -> None:
    """The original's values of `mdlm_small_math`."""
    c.logging.checkpoint_interval = 5
    c.backbone.sample_strategy = "argmax"
    c.rollout.max_steps = 8
    c.rollout.gen_len = 48
    c.rollout.branch_steps = (2, 5)
    c.rollout.branch_k = 3
    c.rollout.selection_mode = "sample"
    c.rollout.cost_lambda = 0.0
    c.rollout.gpu_critic = False  # its code default
    c.rollout.batch_size = 1
    c.rollout.fallback_operator = "O_SCOPE"
    c.actor.hidden_size = c.critic.hidden_size = 64
    c.losses.backbone_weight = 1.0
    c.losses.actor_temperature = 1.0
    c.losses.advantage_clip = 0.0
    c.optim.backbone_lr = 1e-5
    c.updates.critic_steps = 1
    c.num_iterations = 1
    c.episodes_per_iter = 2


def _released(c: ConfigDict, variant: str) -> None:
    """Released weights, prepared files."""
    c.dataset.train_path = "dataset/processed/math_train.jsonl"
    c.dataset.eval_path = "dataset/processed/math_test.jsonl"
    c.backbone.name = variant
    c.backbone.model_name_or_path = f"kuleshov-group/{variant}-owt"
    c.backbone.tokenizer_name_or_path = "gpt2"
    c.backbone.max_length = 256
    c.finetune_mode = "lora"
