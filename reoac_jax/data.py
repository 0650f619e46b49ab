"""The records a run trains or evaluates on: generated problems, or the file the config names."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from common.errors import UserError
from common.problems import Difficulty, ProblemSet
from common.problems_math import MathProblemSet
from reoac_jax.prep import GENERATED, load_split
from reoac_jax.prompts import PromptSet, encode_prompts
from reoac_jax.tokenizer import Tokenizer

SPLITS = ("train", "test")


def difficulty(config: ConfigDict) -> Difficulty:
    """Ranges of the generated problems."""
    d = config.dataset
    return Difficulty(min_ops=d.min_ops, max_ops=d.max_ops, max_value=d.max_value)


def load_records(config: ConfigDict, split: str, limit: int = 0) -> Sequence[Mapping[str, Any]]:
    """Records of a split.

    Args:
      config: the whole tree; dataset.train_path and dataset.eval_path are "generated" or a file.
      split: "train" | "test".
      limit: the most records, 0 = all.

    Raises:
      UserError: the file is missing, truncated or holds no usable row.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is none of {', '.join(SPLITS)}")
    d = config.dataset
    if (d.train_path if split == "train" else d.eval_path) != GENERATED:
        return load_split(config, split, limit)
    size = d.train_size if split == "train" else d.eval_size
    if size < 1:
        raise UserError(f"config key dataset.{'train' if split == 'train' else 'eval'}_size={size}")
    if d.task == "math":
        return MathProblemSet(split, min(size, limit) if limit else size, d.problem_seed)
    return ProblemSet(
        split, min(size, limit) if limit else size, d.problem_seed, difficulty(config)
    )


def load_prompts(config: ConfigDict, split: str, tokenizer: Tokenizer, limit: int = 0) -> PromptSet:
    """Encoded prompts of a split; see `load_records` and `encode_prompts`."""
    return encode_prompts(
        load_records(config, split, limit),
        tokenizer,
        prompt_width=config.backbone.max_length,
        gen_len=config.rollout.gen_len,
        sentence_final_numbers=config.algo == "plus",
    )
