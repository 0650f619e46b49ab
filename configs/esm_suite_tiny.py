"""Episodic Steering Memory on several data sets, one process per GPU or CPU slot.

    python -m esm.main --config=configs/esm_suite_tiny.py --stage=suite --gpus=0,1
    python -m esm.main --config=configs/esm_suite_tiny.py:tiny --stage=suite      # minutes on a CPU

Variants
  (none)  GSM8K and ARC-Challenge with Qwen2.5-7B, ten questions each (needs GPUs and the data sets
          in hub layout: --config.task.data_root=DIR).
  paper   every data set of the published tables with their settings.
  tiny    two parts of the generated problems and a random model, for tests.
"""

from typing import Any

from ml_collections import ConfigDict

from esm.defaults import get_default_config
from esm.published import MODELS, SETTINGS, use_published_values

VARIANTS = ("", "paper", "tiny")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    c = get_default_config()
    c.suite.run_name_prefix = f"suite_{variant}" if variant else "suite_tiny"
    if variant == "tiny":
        return _tiny(c)
    if variant == "paper":
        c.model.name_or_path = MODELS[""]
        use_published_values(c)
        c.suite.datasets = tuple(_published_job(name) for name in SETTINGS)
        return c
    c.model.name_or_path = "Qwen/Qwen2.5-7B-Instruct"
    c.task.max_train_examples = 10
    c.task.max_eval_examples = 10
    c.suite.datasets = (
        {"name": "gsm8k", "prompt_template": "gsm8k_0shot"},
        {"name": "arc-c", "prompt_template": "arc_0shot", "eval_split": "validation"},
    )
    return c


def _published_job(name: str) -> dict[str, Any]:
    setting = SETTINGS[name]
    return {
        "name": name,
        "prompt_template": setting.template,
        "train_split": setting.train_split,
        "eval_split": setting.eval_split,
        "max_train_examples": setting.train,
        "max_eval_examples": 0,
        "model.max_model_len": setting.max_model_len,
        "decode.max_new_tokens": setting.max_tokens,
        "offline_mine.max_new_tokens": setting.max_tokens,
    }


def _tiny(c: ConfigDict) -> ConfigDict:
    c.model.name_or_path = "tiny"
    c.task.max_train_examples = 3
    c.task.max_eval_examples = 2
    c.decode.max_new_tokens = 12
    c.control_points.M = 3
    c.offline_mine.K = 3
    c.offline_mine.batch_size_examples = 0
    c.offline_mine.temperature = 1.0
    c.offline_mine.max_new_tokens = 16
    c.offline_mine.pos_source = "rollout_or_gold"
    c.offline_mine.candidate_layers = (1,)
    c.offline_select.B = 8
    c.online.k_retrieve = 4
    c.eval.ablations = ("no_memory",)
    c.jax.slots = 2
    c.jax.sample_slots = 2
    problems = {"name": "problems", "prompt_template": "problems_0shot"}
    c.suite.datasets = (
        problems,
        {**problems, "run_name": "problems_later", "train_offset": 50},
    )
    return c
