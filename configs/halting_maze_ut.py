"""Mazes with the Universal Transformer, and with the recursive model trm.

    python -m halting_jax.main --config=configs/halting_maze_ut.py:cpu
    python -m halting_jax.main --config=configs/halting_maze_ut.py:tiny      # seconds

Variants
  (none)     the same as runbook.
  tiny       every code path in seconds, for tests.
  cpu        6x6 random-wall mazes, no ACT; minutes on two cores.
  act6       6x6 mazes with ACT halting and accumulated mixing.
  perfect10  10x10 perfect mazes: 2-D positions, convolutions in the transition, losses on the way;
             half an hour on one core.
  trm10      the same mazes with the recursive model; a quarter of an hour.
  tiny_trm   the recursive model in seconds, for tests.
  trm30      30x30 hard mazes with the recursive model (needs a GPU).
  runbook    30x30 mazes with the original's values: 6 hops, ACT weight 1e-3, 1000 epochs.

Without official files (data.dir) mazes are generated, in the same file format, once per recipe.
What the runs reach stands in README.md and results/halting_learning.json.
"""

from ml_collections import ConfigDict

from halting_jax.defaults import get_default_config

VARIANTS = ("", "tiny", "cpu", "act6", "perfect10", "trm10", "tiny_trm", "trm30", "runbook")


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    c = get_default_config()
    c.logging.exp_name = f"halting_maze_ut_{variant or 'runbook'}"
    c.task.name = "maze"
    c.model.type = "universal_transformer"
    c.model.hidden_size = 512
    c.ut.act = True
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
    c.eval.batch_size = 64
    if variant in ("cpu", "act6", "tiny", "perfect10", "trm10", "tiny_trm"):
        _small(c)
    if variant == "act6":
        c.ut.act = True
        c.ut.act_mix = "accumulated"
    if variant in ("perfect10", "trm10"):
        # Convolutions show a cell its neighbours; what is far away is left to the recursion. The
        # gradient through all of it explodes, so the answer is scored on the way.
        c.ut.conv_size = 3
        c.ut.heads = 2
        c.ut.supervise_every = 4
        c.data.aug = "aug8"
        c.optim.lr = 1e-3
        c.optim.beta2 = 0.95
        c.optim.ema.decay = 0.99  # a longer average would lag behind a run of 25 minutes
        c.train.max_steps = 7200
        c.data.style = "perfect"
        c.data.side = 10
        c.data.min_path_moves = 10
        c.data.train_size = 20000
        c.ut.max_hops = 16
        c.ut.pos = "2d"
    if variant == "tiny":
        _tiny(c)
        c.ut.act = True
    if variant in ("trm10", "tiny_trm", "trm30"):
        c.model.type = "trm"
        c.ut.act = False
        c.act.time_penalty_warmup_steps = 0
    if variant == "tiny_trm":
        _tiny(c)
        c.trm.heads = 2
        c.trm.inner_cycles = 2
        c.trm.cycles = 2
        c.trm.supervision_steps = 3
    if variant == "trm10":
        c.trm.conv_size = 3
        c.trm.inner_cycles = 2
        c.trm.cycles = 2
        c.trm.supervision_steps = 8
        c.optim.lr = 4e-4
        c.optim.ema.decay = 0.999
        c.train.max_steps = 6000
    if variant == "trm30":
        c.model.dtype = "bfloat16"
        c.trm.heads = 8
        c.data.batch_size = 768
        c.data.aug = "aug8"
        c.train.max_epochs = 50000
    return c


def _small(c: ConfigDict) -> None:
    """Generated 6x6 mazes and a network for two cores."""
    c.data.side = 6
    c.data.min_path_moves = 6
    c.data.train_size = 11000
    c.data.val_size = 200
    c.data.test_size = 500
    c.data.batch_size = 32
    c.model.hidden_size = 64
    c.ut.embedding_size = 64
    c.ut.key_depth = 64
    c.ut.value_depth = 64
    c.ut.filter_size = 128
    c.ut.act = False
    c.act.time_penalty_warmup_steps = 0
    c.optim.lr = 2e-3
    c.optim.weight_decay = 0.1
    c.optim.clip_norm = 1.0
    c.optim.warmup_epochs = 0
    c.optim.warmup_steps = 200
    c.train.max_epochs = 0
    c.train.max_steps = 6000
    c.train.save_every_epochs = 0
    c.train.log_every = 100
    c.eval.every = 1000
    c.eval.batch_size = 100


def _tiny(c: ConfigDict) -> None:
    """Every code path in seconds."""
    c.data.train_size = 32
    c.data.val_size = 8
    c.data.test_size = 8
    c.data.batch_size = 8
    c.model.hidden_size = 16
    c.ut.embedding_size = 8
    c.ut.heads = 2
    c.ut.key_depth = 16
    c.ut.value_depth = 16
    c.ut.filter_size = 16
    c.ut.max_hops = 3
    c.optim.warmup_steps = 5
    c.train.max_steps = 20
    c.train.log_every = 5
    c.eval.every = 10
    c.eval.batch_size = 8
