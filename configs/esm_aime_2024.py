"""Episodic Steering Memory on AIME 2024: the first 10 are mined, the other 20 evaluated.

    python -m esm.main --config=configs/esm_aime_2024.py --stage=all --config.task.data_root=DIR

Needs a GPU and the data set in hub layout under task.data_root. Settings of the published tables;
what those numbers are worth is told in README.md.

Variants
  (none)   DeepSeek-R1-Distill-Qwen-1.5B.
  r1_7b    DeepSeek-R1-Distill-Qwen-7B.
  qwen_3b  Qwen2.5-3B-Instruct.
  qwen_7b  Qwen2.5-7B-Instruct.
  tuned    the 1.5B model; layer and strength are chosen on a dev part first.
"""

from ml_collections import ConfigDict

from esm.published import VARIANTS as PUBLISHED
from esm.published import published_config

VARIANTS = PUBLISHED


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    return published_config("aime_2024", variant)
