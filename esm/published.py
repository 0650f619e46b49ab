"""The settings behind the published tables, one data set each (arXiv 2602.04925 and its code).

The published numbers were chosen among a grid of layers and strengths on the evaluated questions,
and single-split sets were evaluated on mined questions too. Here the evaluated part starts behind
the mined one.

Variants of every data set's config file
  (none)   DeepSeek-R1-Distill-Qwen-1.5B.
  r1_7b    DeepSeek-R1-Distill-Qwen-7B.
  qwen_3b  Qwen2.5-3B-Instruct.
  qwen_7b  Qwen2.5-7B-Instruct.
  tuned    the 1.5B model; layer and strength are chosen on a dev part of its own first.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from esm.defaults import get_default_config

MODELS = {
    "": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "r1_7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "qwen_3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen_7b": "Qwen/Qwen2.5-7B-Instruct",
}
TUNED = "tuned"
VARIANTS = (*MODELS, TUNED)
LONG, SHORT = 16384, 1024
_PROMPT_ROOM = 2048  # the published context length left none beside the answer


class Setting(NamedTuple):
    """A data set as it was used.

    Attributes:
        template: of the prompt.
        train: questions that are mined.
        train_split: where they come from.
        eval_split: where the evaluated ones come from; the same one where there is only one.
        dev: questions of the variant `tuned`.
        max_tokens: T.
        max_model_len: prompt and answer.
    """

    template: str
    train: int
    train_split: str
    eval_split: str
    dev: int
    max_tokens: int
    max_model_len: int


_CONTEST = Setting("math_0shot", 10, "train", "train", 5, LONG, LONG + _PROMPT_ROOM)
_CHOICE = Setting("arc_0shot", 100, "train", "validation", 100, SHORT, 4096)
SETTINGS = {
    "math500": Setting("math_0shot", 100, "test", "test", 50, LONG, LONG + _PROMPT_ROOM),
    "aime_2024": _CONTEST,
    "aime25": _CONTEST._replace(train_split="test", eval_split="test"),
    "amc23": _CONTEST._replace(train_split="test", eval_split="test"),
    "arc-c": _CHOICE,
    "openbookqa": _CHOICE,
}


def published_config(dataset: str, variant: str = "") -> ConfigDict:
    """The config of a data set.

    Args:
        dataset: a key of SETTINGS.
        variant: one of VARIANTS.

    Raises:
        ValueError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    setting = SETTINGS[dataset]
    c = get_default_config()
    suffix = f"_{variant}" if variant else ""
    c.outputs.run_name = f"esm_{dataset.replace('-', '_')}{suffix}"
    c.model.name_or_path = MODELS.get(variant, MODELS[""])
    c.model.max_model_len = setting.max_model_len
    c.task.dataset = dataset
    c.task.train_split = setting.train_split
    c.task.eval_split = setting.eval_split
    c.task.max_train_examples = setting.train
    c.task.max_dev_examples = setting.dev
    c.task.max_eval_examples = 0
    c.prompt.template = setting.template
    c.decode.max_new_tokens = setting.max_tokens
    use_published_values(c)
    c.offline_mine.max_new_tokens = setting.max_tokens
    if variant == TUNED:
        c.offline_mine.candidate_layers = (0.2, 0.4, 0.6, 0.8)
        c.tune.k_scales = (0.05, 0.1, 0.2, 0.5, 1.0)
    return c


def use_published_values(c: ConfigDict) -> None:
    """Sets what the published runs have in common."""
    c.control_points.M = 8
    c.offline_mine.K = 8
    c.offline_mine.batch_size_examples = 64
    c.offline_mine.K_pos = 2
    c.offline_mine.K_neg = 3
    c.offline_mine.eta0 = 0.01
    c.offline_mine.keep_top_C = 128
    c.offline_mine.candidate_layers = (0.6,)
    c.offline_mine.pos_source = "rollout_or_gold"
    c.offline_select.B = 256
    c.offline_select.lambda_diversity = 0.5
    c.offline_select.epsilon = 1e-4
    c.offline_select.min_per_control_point = 8
    c.online.k_retrieve = 8
    c.online.L = 4
    c.online.probe_tokens = 4
    c.online.beta = 2.0
    c.online.rho = 0.1
    c.online.k_scale = 0.5
    c.online.tau_null = 0.0
    c.online.batch_size_examples = 128
