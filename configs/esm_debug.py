"""Episodic Steering Memory, a quick look at a 7B model: ten questions mined, ten evaluated.

    python -m esm.main --config=configs/esm_debug.py --stage=all --config.task.data_root=DIR

Needs a GPU and GSM8K in hub layout under task.data_root; minutes.
"""

from ml_collections import ConfigDict

from esm.defaults import get_default_config

VARIANTS = ("",)


def get_config(variant: str = "") -> ConfigDict:
    """The configuration."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: this file has none")
    c = get_default_config()
    c.outputs.run_name = "debug"
    c.model.name_or_path = "Qwen/Qwen2.5-7B-Instruct"
    c.task.max_train_examples = 10
    c.task.max_eval_examples = 10
    c.decode.max_new_tokens = 256
    c.control_points.M = 4
    c.offline_mine.K = 4
    c.offline_mine.batch_size_examples = 0
    c.offline_mine.K_pos = 1
    c.offline_mine.K_neg = 2
    c.offline_mine.max_new_tokens = 128
    c.offline_mine.keep_top_C = 32
    c.offline_mine.pos_source = "rollout_or_gold"
    c.offline_select.B = 8
    c.online.k_retrieve = 8
    c.online.L = 2
    c.online.probe_tokens = 8
    c.online.beta = 2.0
    c.eval.ablations = ("no_memory", "no_probing")
    return c
