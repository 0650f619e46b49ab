"""Copying a string of symbols (Universal Transformer, section 4); also reverse.

    python -m halting_jax.main --config=configs/halting_copy.py:cpu
    python -m halting_jax.main --config=configs/halting_copy.py:tiny      # seconds

Variants
  (none)     the same as cpu.
  tiny       every code path in seconds, for tests.
  cpu        up to 8 symbols, tested up to 16; minutes on two cores.
  reverse    the same, backwards.
  add        adding two numbers written as characters.
  runbook    the original's encoding and values.
  paper      train up to 40 symbols, test up to 400 (needs a GPU).

With --config.task.position_offset=-1 training sequences start at random positions, so that those of
longer test sequences are known. What the runs reach stands in README.md and
results/halting_learning.json.

Other models: --config.model.type=act_rnn. --config.task.name=reverse and string_addition work too.
"""

from ml_collections import ConfigDict

from halting_jax.defaults import get_default_config

VARIANTS = ("", "tiny", "cpu", "reverse", "add", "runbook", "paper")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    c = get_default_config()
    c.task.position_offset = -1 if variant == "paper" else 0
    c.logging.exp_name = f"halting_copy_{variant or 'cpu'}"
    c.task.name = "copy"
    c.model.type = "universal_transformer"
    c.model.hidden_size = 512
    if variant in ("runbook", "paper"):
        c.data.batch_size = 64
        c.optim.lr = 1e-4
        c.train.max_steps = 200000
        c.eval.every = 10000
        if variant == "runbook":
            c.task.encoding = "original"
    else:
        c.task.train_max_length = 8
        c.task.eval_max_length = 16
        c.model.hidden_size = 64
        c.ut.embedding_size = 64
        c.ut.key_depth = 64
        c.ut.value_depth = 64
        c.ut.filter_size = 128
        c.ut.max_hops = 4
        c.ut.act = True
        c.data.batch_size = 64
        c.optim.lr = 1e-3
        c.optim.clip_norm = 1.0
        c.optim.schedule = "cosine"
        c.train.max_steps = 8000
        c.train.log_every = 100
        c.eval.every = 1000
        c.eval.test_size = 1000
    if variant == "reverse":
        c.task.name = "reverse"
    if variant == "add":
        c.task.name = "string_addition"
        c.task.max_digits = 2
        c.task.test_max_digits = 4
    if variant == "tiny":
        c.task.train_max_length = 4
        c.task.eval_max_length = 6
        c.model.hidden_size = 16
        c.ut.embedding_size = 16
        c.ut.heads = 2
        c.ut.key_depth = 16
        c.ut.value_depth = 16
        c.ut.filter_size = 16
        c.ut.max_hops = 2
        c.data.batch_size = 8
        c.train.max_steps = 20
        c.train.log_every = 10
        c.eval.every = 10
        c.eval.val_size = 16
        c.eval.test_size = 16
        c.eval.batch_size = 16
    return c
