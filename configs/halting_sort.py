"""Sorting numbers: read them, then name their places in order (Graves 2016, section 3.4).

    python -m halting_jax.main --config=configs/halting_sort.py:cpu
    python -m halting_jax.main --config=configs/halting_sort.py:tiny      # seconds

Variants
  (none)     the same as cpu.
  tiny       every code path in seconds, for tests.
  cpu        2 to 5 numbers; minutes on two cores.
  runbook    the original's encoding and values.
  paper      2 to 15 numbers, LSTM 512, batch 16 (needs a GPU).

What the runs reach stands in README.md and results/halting_learning.json.
"""

from ml_collections import ConfigDict

from halting_jax.defaults import get_default_config

VARIANTS = ("", "tiny", "cpu", "runbook", "paper")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    c = get_default_config()
    c.logging.exp_name = f"halting_sort_{variant or 'cpu'}"
    c.task.name = "sort"
    c.model.hidden_size = 512
    c.act.cell = "lstm"
    c.act.time_limit = 100
    c.data.batch_size = 16
    if variant in ("runbook", "paper"):
        c.optim.lr = 1e-4
        c.train.max_steps = 1000000
        c.eval.every = 10000
        if variant == "runbook":
            c.task.encoding = "original"
    else:
        c.task.max_n = 5
        c.model.hidden_size = 96
        c.act.time_limit = 10
        c.data.batch_size = 64
        c.optim.lr = 2e-3
        c.optim.clip_norm = 1.0
        c.optim.schedule = "cosine"
        c.train.max_steps = 30000
        c.train.log_every = 250
        c.eval.every = 5000
    if variant == "tiny":
        c.model.hidden_size = 16
        c.data.batch_size = 8
        c.act.time_limit = 3
        c.train.max_steps = 40
        c.train.log_every = 10
        c.eval.every = 20
        c.eval.val_size = 32
        c.eval.test_size = 32
        c.eval.batch_size = 16
    return c
