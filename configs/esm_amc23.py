"""Episodic Steering Memory on AMC 2023: the first 10 are mined, the other 30 evaluated.

    python -m esm.main --config=configs/esm_amc23.py --stage=all --config.task.data_root=DIR

Needs a GPU and the data set in hub layout under task.data_root. Settings of the published tables;
what those numbers are worth is told in README.md.

Variants, told in `esm.published`: r1_7b, qwen_3b, qwen_7b, tuned.
"""

import functools

from esm import published

VARIANTS = published.VARIANTS
get_config = functools.partial(published.published_config, "amc23")
