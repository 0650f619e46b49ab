"""Mazes with the ACT-RNN of the original: the whole grid passes through one hidden vector.

    python -m halting_jax.main --config=configs/halting_maze_act.py:cpu
    python -m halting_jax.main --config=configs/halting_maze_act.py:tiny      # seconds

Variants
  (none)     the same as runbook.
  tiny       every code path in seconds, for tests.
  cpu        6x6 mazes; minutes on two cores.
  runbook    30x30 mazes with the original's values: batch 128, 1000 epochs, limit 16.

Without official files (data.dir) mazes are generated, in the same file format, once per recipe.
What the runs reach stands in README.md and results/halting_learning.json.
"""

from ml_collections import ConfigDict

from halting_jax.defaults import get_default_config

VARIANTS = ("", "tiny", "cpu", "runbook")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    c = get_default_config()
    c.logging.exp_name = f"halting_maze_act_{variant or 'runbook'}"
    c.task.name = "maze"
    c.model.hidden_size = 512
    c.act.time_limit = 16
    c.act.time_penalty_warmup_steps = 5000
    c.data.batch_size = 128
    c.optim.weight_decay = 1.0
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 5
    c.optim.ema.enabled = True
    c.train.max_epochs = 1000
    c.train.log_every = 8
    c.train.save_every_epochs = 50
    c.eval.every = 400
    c.eval.val_size = 200
    c.eval.test_size = 1000
    c.eval.batch_size = 128
    if variant in ("cpu", "tiny"):
        c.data.side = 6
        c.data.min_path_moves = 6
        c.data.train_size = 4000
        c.data.val_size = 200
        c.data.test_size = 500
        c.model.hidden_size = 256
        c.optim.lr = 1e-3
        c.optim.weight_decay = 0.1
        c.act.time_penalty_warmup_steps = 500
        c.train.max_epochs = 60
        c.train.save_every_epochs = 0
        c.train.log_every = 50
        c.eval.every = 500
    if variant == "tiny":
        c.data.train_size = 32
        c.data.val_size = 8
        c.data.test_size = 8
        c.model.hidden_size = 16
        c.act.embedding_size = 4
        c.act.time_limit = 4
        c.data.batch_size = 8
        c.optim.warmup_epochs = 1
        c.train.max_epochs = 5
        c.train.log_every = 5
        c.eval.every = 10
        c.eval.batch_size = 8
    return c
