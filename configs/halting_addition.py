"""Adding numbers digit by digit, a ponder loop per number (Graves 2016, section 3.3).

    python -m halting_jax.main --config=configs/halting_addition.py:cpu
    python -m halting_jax.main --config=configs/halting_addition.py:tiny      # seconds

Variants
  (none)     the same as cpu.
  tiny       every code path in seconds, for tests.
  cpu        three numbers of up to two digits; under 20 minutes on two cores.
  runbook    the original's values: five numbers of five digits, GRU 512, always five.
  paper      five numbers of up to five digits, LSTM 512, limit 20 (needs a GPU).

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
    c.logging.exp_name = f"halting_addition_{variant or 'cpu'}"
    c.task.name = "addition"
    c.act.cell = "lstm"
    c.data.batch_size = 32
    if variant in ("runbook", "paper"):
        c.model.hidden_size = 512
        c.act.time_limit = 20
        c.optim.lr = 1e-4
        c.train.max_steps = 200000 if variant == "runbook" else 1000000
        c.eval.every = 10000
        if variant == "runbook":
            c.act.cell = "gru"
            c.task.fixed_sequence_length = True
            c.data.batch_size = 64
    else:
        c.task.sequence_length = 3
        c.task.max_digits = 2
        # Half as wide, two seeds of three stay at 86 % of the two-digit sums after 40000 steps.
        c.model.hidden_size = 128
        c.act.time_limit = 10
        c.data.batch_size = 16
        c.optim.lr = 2e-3
        c.optim.schedule = "cosine"
        c.optim.warmup_steps = 200
        c.optim.clip_norm = 1.0
        c.train.max_steps = 80000
        c.train.log_every = 250
        c.eval.every = 4000
    if variant == "tiny":
        c.model.hidden_size = 16
        c.data.batch_size = 8
        c.act.time_limit = 3
        c.optim.warmup_steps = 5
        c.train.max_steps = 40
        c.train.log_every = 10
        c.eval.every = 20
        c.eval.val_size = 32
        c.eval.test_size = 32
        c.eval.batch_size = 16
    return c
