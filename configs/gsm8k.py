"""REOAC on GSM8K.

    python -m reoac_jax.main --config=configs/gsm8k.py            # embedded, no download
    python -m reoac_jax.main --config=configs/gsm8k.py:e2d2       # released 170M model, real GSM8K

Variants
  (none)       plus on the bundled small E2D2 and generated word problems; minutes on two cores.
  tiny         the same in seconds, for tests.
  paper        the original's algorithm on the bundled backbone.
  pretrain     with --mode=pretrain: makes the bundled backbone from scratch.
  e2d2         kuleshov-group/e2d2-owt on GSM8K with the original's values (needs a GPU).
  e2d2_gsm8k   the 2B GSM8K fine-tune of the E2D2 authors (needs a GPU).

Real files work with every variant: --config.dataset.train_path=.../gsm8k/train.jsonl
--config.dataset.eval_path=.../gsm8k/test.jsonl. What the runs reach stands in README.md.
"""

from ml_collections import ConfigDict

from reoac_jax.defaults import get_default_config

VARIANTS = ("", "tiny", "paper", "pretrain", "e2d2", "e2d2_gsm8k")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    config = get_default_config()
    if variant in ("e2d2", "e2d2_gsm8k"):
        return _released(config, variant)
    _embedded(config)
    if variant == "tiny":
        _tiny(config)
    elif variant == "paper":
        _paper(config)
    elif variant == "pretrain":
        _pretrain(config)
    return config


def _embedded(c: ConfigDict) -> None:
    """plus on the bundled backbone; two cores, about four minutes."""
    c.logging.exp_name = "gsm8k_embedded"
    c.logging.checkpoint_interval = 5
    c.backbone.max_length = 64
    c.relation.temperature = 0.1
    c.relation.strings = "stripped"
    c.relation.numbers = "span"
    c.relation.canvas = "tentative"
    c.rollout.gen_len = 40
    c.rollout.max_steps = 20
    c.rollout.batch_size = 64
    c.rollout.group_size = 4
    c.rollout.cost_lambda = 3.0  # a pass costs as much as 5 % accuracy
    c.rollout.save_relation = False
    # 256 pooled states beside 15 features are more than 80 iterations can use, and at constant
    # rates the last few draws decide too much (README, "What the policy learns").
    c.rollout.use_hidden = False
    c.optim.anneal = True
    # O_SCOPE writes what is sure on the whole canvas, O_NUM and O_OP in their class, O_FAST all
    # that is left, at twice the price: the policy decides when certainty is worth another pass.
    for name, threshold in (("O_NUM", 0.5), ("O_OP", 0.5), ("O_SCOPE", 0.7)):
        c.operators[name].k = 40
        c.operators[name].step_scale = 0.0
        c.operators[name].threshold = threshold
    c.operators.O_FAST.k = 40
    c.operators.O_FAST.step_scale = 40.0
    c.finetune_mode = "none"
    c.optim.actor_lr = 1e-3
    c.optim.critic_lr = 1e-3
    c.optim.grad_clip = 1.0
    c.optim.weight_decay = 0.0
    c.num_iterations = 80
    c.episodes_per_iter = 256


def _tiny(c: ConfigDict) -> None:
    """Every code path of the embedded variant in seconds."""
    c.logging.exp_name = "gsm8k_tiny"
    c.logging.checkpoint_interval = 1
    c.logging.sample_interval = 1
    c.dataset.train_size = 64
    c.dataset.eval_size = 16
    c.finetune_mode = "full"
    c.rollout.max_steps = 4
    c.rollout.batch_size = 8
    c.rollout.group_size = 2
    c.rollout.save_relation = True
    c.rollout.use_hidden = True
    c.num_iterations = 3
    c.episodes_per_iter = 16
    c.updates.minibatch = 32
    c.updates.epochs = 2
    c.updates.backbone_batch = 4
    c.updates.backbone_rows = 8
    c.eval.batch_size = 8
    c.actor.hidden_size = c.critic.hidden_size = 16


def _paper(c: ConfigDict) -> None:
    """The original's rules and its GSM8K values, at the embedded sizes."""
    c.algo = "paper"
    c.logging.exp_name = "gsm8k_paper"
    c.relation.temperature = 1.0
    c.relation.strings = "raw"
    c.relation.numbers = "token"
    c.relation.canvas = "written"
    c.rollout.group_size = 1
    c.rollout.cost_lambda = 0.01
    c.rollout.fallback_operator = "O_FAST"
    c.rollout.use_hidden = True
    c.optim.anneal = False
    c.backbone.sample_strategy = "sample"
    c.dataset.shuffle = False
    for name, k in (("O_NUM", 16), ("O_OP", 16), ("O_SCOPE", 32), ("O_BRANCH", 32), ("O_FAST", 64)):
        c.operators[name].k = k
        c.operators[name].step_scale = 1.0
        c.operators[name].threshold = 0.0
    c.operators.O_FAST.step_scale = 1.5
    c.finetune_mode = "full"
    c.losses.backbone_weight = 1.1
    c.losses.actor_temperature = 1.1
    c.losses.advantage_clip = 0.1
    c.optim.actor_lr = c.optim.critic_lr = 1e-4
    c.optim.backbone_lr = 5e-6
    c.optim.weight_decay = 0.01
    c.optim.grad_clip = 0.0
    c.updates.critic_steps = 2
    c.updates.backbone_batch = 64
    c.updates.backbone_rows = 0
    c.buffer_size = 100
    c.num_iterations = 25
    c.episodes_per_iter = 8
    c.rollout.batch_size = 8


def _pretrain(c: ConfigDict) -> None:
    """From random weights to the bundled backbone; see README for time and result."""
    c.logging.exp_name = "gsm8k_pretrain"
    c.dataset.eval_size = 512


def _released(c: ConfigDict, variant: str) -> ConfigDict:
    """The original's GSM8K run on a released checkpoint."""
    _paper(c)
    c.logging.exp_name = "reoac_default" if variant == "e2d2" else "reoac_e2d2_gsm8k"
    c.logging.checkpoint_interval = 5
    c.dataset.train_path = "dataset/processed/gsm8k_train.jsonl"
    c.dataset.eval_path = "dataset/processed/gsm8k_test.jsonl"
    c.backbone.model_name_or_path = "kuleshov-group/e2d2-owt"
    c.backbone.tokenizer_name_or_path = "gpt2"
    c.backbone.max_length = 256
    c.backbone.num_steps = 512
    c.rollout.max_steps = 512
    c.rollout.gen_len = 128
    c.rollout.batch_size = 16
    c.rollout.branch_steps = (8, 16, 24, 32, 40, 48, 56)
    c.rollout.branch_k = 3
    c.updates.backbone_batch = 16
    if variant == "e2d2_gsm8k":
        c.backbone.model_name_or_path = "kuleshov-group/e2d2-gsm8k-finetune-Qwen3-2B"
        c.backbone.tokenizer_name_or_path = ""
        c.backbone.dtype = "bfloat16"
        c.rollout.batch_size = 8
        c.updates.backbone_batch = 2
    return c
