"""Parity of a vector of bits: one ponder loop per example (Graves 2016, section 3.1).

    python -m halting_jax.main --config=configs/halting_parity.py:cpu
    python -m halting_jax.main --config=configs/halting_parity.py:tiny      # seconds

Variants
  (none)     the same as cpu.
  tiny       every code path in seconds, for tests.
  cpu        16 bits in the first places, tanh cell; about two minutes on two cores.
  bits8      8 bits in the first places.
  random8    8 bits at random places: a larger task than its size says.
  ponder8    8 bits at random places with PonderNet halting.
  runbook    the original's own values (16 bits, GRU 64).
  paper      64 bits at random places, tanh 128, limit 100 (needs a GPU).

What the runs reach stands in README.md and results/halting_learning.json.
"""

from ml_collections import ConfigDict

from halting_jax.defaults import get_default_config

VARIANTS = ("", "tiny", "cpu", "bits8", "random8", "ponder8", "runbook", "paper")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    c = get_default_config()
    c.logging.exp_name = f"halting_parity_{variant or 'cpu'}"
    c.task.name = "parity"
    c.model.hidden_size = 128
    c.act.cell = "tanh_rnn"
    c.act.time_limit = 10
    c.data.batch_size = 128
    c.optim.lr = 3e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 200
    c.optim.clip_norm = 1.0
    c.train.max_steps = 30000
    c.train.log_every = 250
    c.eval.every = 5000
    if variant == "bits8":
        c.task.bits = 8
        c.train.max_steps = 20000
    elif variant in ("random8", "ponder8"):
        c.task.bits = 8
        c.task.placement = "random"
        c.task.near_ood_bits = c.task.ood_bits = -1
        c.optim.lr = 2e-3
        c.train.max_steps = 25000
        if variant == "ponder8":
            c.act.kind = "pondernet"
    elif variant == "runbook":
        c.model.hidden_size = 64
        c.act.cell = "gru"
        c.act.time_limit = 20
        c.data.batch_size = 64
        c.optim.lr = 1e-4
        c.optim.schedule = "constant"
        c.optim.warmup_steps = 0
        c.optim.clip_norm = 0.0
        c.train.max_steps = 200000
        c.eval.every = 10000
    elif variant == "paper":
        c.task.bits = 64
        c.task.placement = "random"
        c.task.near_ood_bits = c.task.ood_bits = -1
        c.optim.schedule = "constant"
        c.optim.warmup_steps = 0
        c.act.time_limit = 100
        c.optim.lr = 1e-4
        c.optim.clip_norm = 0.0
        c.train.max_steps = 1000000
        c.eval.every = 10000
    elif variant == "tiny":
        c.task.bits = 4
        c.model.hidden_size = 16
        c.data.batch_size = 16
        c.act.time_limit = 4
        c.optim.warmup_steps = 5
        c.train.max_steps = 60
        c.train.log_every = 10
        c.eval.every = 20
        c.eval.val_size = 64
        c.eval.test_size = 64
        c.eval.batch_size = 16
    return c
