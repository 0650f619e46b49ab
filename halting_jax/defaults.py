"""The whole configuration tree of the halting models with its defaults, and its validation.

A config file starts from `get_default_config()` and edits it. Keys that do not act for the chosen
task or model cannot be overridden: `active_keys.check_overrides` refuses them instead of ignoring
them.
"""

from ml_collections import ConfigDict

from common.config_checks import require_at_least, require_choices, require_each, value_at
from common.errors import UserError
from common.flags import refuse_negative
from halting_jax.active_keys import FILE_TASKS as FILE_TASKS
from halting_jax.active_keys import check_overrides as check_overrides
from halting_jax.active_keys import inactive_reason as inactive_reason

TASKS = (
    "maze",
    "sudoku",
    "parity",
    "addition",
    "logic",
    "sort",
    "copy",
    "reverse",
    "string_addition",
)
MODELS = ("act_rnn", "universal_transformer", "trm")


def get_default_config() -> ConfigDict:
    """Defaults of every key; 0 means "by the task" where the comment says auto."""
    c = ConfigDict()
    c.seed = 0

    c.task = ConfigDict()
    c.task.name = "parity"
    c.task.bits = 16  # parity: longest training length
    c.task.placement = "prefix"  # parity: prefix | random positions of the bits
    c.task.near_ood_bits = 0  # auto: bits + 4; -1 = no such test set
    c.task.ood_bits = 0  # auto: bits + 8; -1 = no such test set
    c.task.input_proj = False  # parity, act_rnn: a linear layer and ReLU before the cell
    c.task.sequence_length = 5  # addition: numbers
    c.task.max_digits = 5  # addition, string_addition: digits per number
    c.task.fixed_sequence_length = False  # addition: always sequence_length numbers
    c.task.encoding = "paper"  # logic, sort, copy, reverse: paper | original
    c.task.train_min_steps = 1  # logic: gates per sequence
    c.task.train_max_steps = 10
    c.task.eval_min_steps = 1
    c.task.eval_max_steps = 10
    c.task.min_n = 2  # sort: items
    c.task.max_n = 15
    c.task.train_min_length = 1  # copy, reverse: symbols
    c.task.train_max_length = 40
    c.task.eval_min_length = 1
    c.task.eval_max_length = 400
    c.task.position_offset = 0  # copy, reverse, paper: random leading padding in training up to
    # this many places; -1: up to the longest test length
    c.task.max_terms = 2  # string_addition
    c.task.test_max_digits = 0  # string_addition; auto: ten times max_digits

    c.model = ConfigDict()
    c.model.type = "act_rnn"  # act_rnn | universal_transformer | trm
    c.model.hidden_size = 128
    c.model.dtype = "float32"  # of the large matrix products: float32 | bfloat16

    c.act = ConfigDict()
    c.act.kind = "act"  # act | pondernet | none
    c.act.cell = "gru"  # gru | lstm | tanh_rnn
    c.act.embedding_size = 16  # of grid tokens
    c.act.time_limit = 20  # M
    c.act.epsilon = 0.01
    c.act.halt_bias = 1.0
    c.act.time_penalty = 1e-3  # tau
    c.act.time_penalty_start = 0.0
    c.act.time_penalty_warmup_steps = 0
    c.act.disable_ponder_cost = False  # log the ponder cost, do not add it
    c.act.ponder_reduce = "mean"  # over the calls of a row: mean | sum (paper)
    c.act.halt_warmup_steps = 0  # the halting unit is frozen before this step
    c.act.lstm_reset_cell = False  # the original's LSTM without memory
    c.act.fixed_ponder_steps = 0  # evaluation: steps without halting; 0 = halt
    c.act.execution = "while"  # while | chunked | scan
    c.act.chunk = 4  # inner steps per chunk
    c.act.prior = 0.2  # pondernet: lambda_p of the geometric prior
    c.act.kl_weight = 0.01  # pondernet: beta

    c.ut = ConfigDict()
    c.ut.embedding_size = 64
    c.ut.heads = 4
    c.ut.key_depth = 256
    c.ut.value_depth = 256
    c.ut.filter_size = 256
    c.ut.conv_size = 0  # grids: odd width of a depth-wise convolution in the transition
    c.ut.max_hops = 6
    c.ut.supervise_every = 0  # training: hops between two losses; 0 = one after the last hop
    c.ut.act = False
    c.ut.act_loss_weight = 1e-3
    c.ut.act_epsilon = 0.01
    c.ut.act_mix = "basic"  # basic | accumulated
    c.ut.act_level = "token"  # token | example
    c.ut.halt_bias = 1.0
    c.ut.halt_kernel = "uniform"  # uniform | zero
    c.ut.attention_mode = "auto"  # auto | full | causal
    c.ut.pos = "1d"  # 1d | 2d
    c.ut.remat = False  # recompute each hop in the backward pass
    c.ut.attn_impl = "auto"

    c.trm = ConfigDict()
    c.trm.layers = 2
    c.trm.heads = 4
    c.trm.expansion = 4.0
    c.trm.mixer = "attention"  # attention | mlp
    c.trm.conv_size = 0  # odd width of a depth-wise convolution over the grid in the SwiGLU
    c.trm.inner_cycles = 6  # latent updates per cycle
    c.trm.cycles = 3  # the last one carries the gradient
    c.trm.supervision_steps = 16
    c.trm.halt_exploration = 0.1
    c.trm.halt_at_eval = True

    c.data = ConfigDict()
    c.data.dir = "generated"  # maze, sudoku: a directory, or "generated" (mazes)
    c.data.batch_size = 64
    c.data.aug = "none"  # mazes: none | aug8 (drawn per row and step, relabelled)
    c.data.style = "random_walls"  # generated mazes: random_walls | perfect
    c.data.side = 30
    c.data.min_path_moves = 110  # shortest S-G distance is longer than this
    c.data.loops = 0  # perfect: extra openings
    c.data.labels = "canonical"  # canonical | unique | all_optimal
    c.data.train_size = 1000
    c.data.val_size = 200
    c.data.test_size = 1000
    c.data.seed = 0  # of the generator; config.seed draws weights and order

    c.optim = ConfigDict()
    c.optim.lr = 1e-4
    c.optim.beta2 = 0.999  # decay of Adam's second moment
    c.optim.weight_decay = 0.0
    c.optim.decay_mask = False  # True spares biases, norms and embeddings
    c.optim.clip_norm = 0.0  # 0 = off
    c.optim.schedule = "constant"  # constant | cosine
    c.optim.schedule_unit = "step"  # step | epoch (the original's)
    c.optim.warmup_epochs = 0
    c.optim.warmup_steps = 0
    c.optim.ema = ConfigDict()
    c.optim.ema.enabled = False
    c.optim.ema.decay = 0.999

    c.train = ConfigDict()
    c.train.max_steps = 0  # 0: max_epochs decides
    c.train.max_epochs = 0  # mazes, sudoku
    c.train.log_every = 100  # steps
    c.train.save_every_steps = 0  # 0: with every evaluation
    c.train.save_every_epochs = 0  # mazes, sudoku
    c.train.resume = "auto"  # auto | none | a run directory to go on from
    c.train.max_walltime_s = 0  # stop resumably after this; 0 = never

    c.eval = ConfigDict()
    c.eval.every = 1000  # steps between validations; 0 = only at the end
    c.eval.val_size = 1024  # generated tasks; files: what the split holds, at most this many
    c.eval.test_size = 10000
    c.eval.batch_size = 512
    c.eval.seed = 1234  # of the generated sets: validation; test = seed + 1
    c.eval.early_exit = True  # rows that have halted leave the batch
    c.eval.by_difficulty = True  # table of accuracy and steps per difficulty at the end

    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 3
    c.checkpoint.keep_every = 0  # steps; also keeps each multiple of it

    c.parallel = ConfigDict()
    c.parallel.num_devices = 0  # 0 = all
    c.parallel.mode = "jit"  # jit | pmap
    c.parallel.fsdp = False  # True: weights and moments are split over the devices

    c.logging = ConfigDict()
    c.logging.output_dir = "runs"
    c.logging.exp_name = "halting"
    c.logging.tensorboard = True
    return c


def finalize(config: ConfigDict) -> list[str]:
    """Validate a parsed config.

    Returns:
      warnings for the log, one line each.

    Raises:
      UserError: a value is out of range; the line names the key.
    """
    c = config
    choices = {
        "task.name": TASKS,
        "task.placement": ("prefix", "random"),
        "task.encoding": ("paper", "original"),
        "model.type": MODELS,
        "model.dtype": ("float32", "bfloat16"),
        "act.kind": ("act", "pondernet", "none"),
        "act.cell": ("gru", "lstm", "tanh_rnn"),
        "act.execution": ("while", "chunked", "scan"),
        "act.ponder_reduce": ("mean", "sum"),
        "ut.act_mix": ("basic", "accumulated"),
        "ut.act_level": ("token", "example"),
        "ut.attention_mode": ("auto", "full", "causal"),
        "ut.pos": ("1d", "2d"),
        "ut.halt_kernel": ("uniform", "zero"),
        "trm.mixer": ("attention", "mlp"),
        "data.aug": ("none", "aug8"),
        "data.style": ("random_walls", "perfect"),
        "data.labels": ("canonical", "unique", "all_optimal"),
        "optim.schedule": ("constant", "cosine"),
        "optim.schedule_unit": ("step", "epoch"),
        "parallel.mode": ("jit", "pmap"),
    }
    require_choices(c, choices)
    positive = (
        "task.bits",
        "task.sequence_length",
        "task.max_digits",
        "task.train_min_steps",
        "task.eval_min_steps",
        "task.min_n",
        "task.train_min_length",
        "task.eval_min_length",
        "task.max_terms",
        "model.hidden_size",
        "act.time_limit",
        "act.embedding_size",
        "act.chunk",
        "ut.embedding_size",
        "ut.heads",
        "ut.key_depth",
        "ut.value_depth",
        "ut.filter_size",
        "ut.max_hops",
        "trm.layers",
        "trm.heads",
        "trm.inner_cycles",
        "trm.cycles",
        "trm.supervision_steps",
        "data.batch_size",
        "data.side",
        "data.train_size",
        "data.test_size",
        "train.log_every",
        "eval.val_size",
        "eval.test_size",
        "eval.batch_size",
        "checkpoint.keep",
    )
    require_at_least(c, positive, 1)
    not_negative = (
        "act.time_penalty",
        "act.time_penalty_start",
        "act.time_penalty_warmup_steps",
        "act.halt_warmup_steps",
        "act.fixed_ponder_steps",
        "act.kl_weight",
        "ut.act_loss_weight",
        "data.min_path_moves",
        "data.loops",
        "data.val_size",
        "optim.lr",
        "optim.weight_decay",
        "optim.clip_norm",
        "optim.warmup_epochs",
        "optim.warmup_steps",
        "train.max_steps",
        "train.max_epochs",
        "train.save_every_steps",
        "train.save_every_epochs",
        "train.max_walltime_s",
        "eval.every",
        "checkpoint.keep_every",
    )
    require_at_least(c, not_negative, 0)
    rule = "must lie between 0 and 1"
    inside = ("act.epsilon", "act.prior", "ut.act_epsilon", "optim.ema.decay", "optim.beta2")
    require_each(c, inside, lambda value: 0.0 < value < 1.0, rule)
    require_each(c, ("trm.halt_exploration",), lambda value: 0.0 <= value <= 1.0, rule)
    if c.parallel.fsdp and c.parallel.mode != "jit":
        raise UserError("config key parallel.fsdp=True needs parallel.mode=jit")
    for low, high in (
        ("task.train_min_steps", "task.train_max_steps"),
        ("task.eval_min_steps", "task.eval_max_steps"),
        ("task.train_min_length", "task.train_max_length"),
        ("task.eval_min_length", "task.eval_max_length"),
        ("task.min_n", "task.max_n"),
    ):
        if value_at(c, low) > value_at(c, high):
            raise UserError(
                f"config key {low}={value_at(c, low)} is larger than {high}={value_at(c, high)}"
            )
    if c.task.name in FILE_TASKS:
        if bool(c.train.max_steps) == bool(c.train.max_epochs):
            raise UserError("give one of train.max_steps and train.max_epochs (the other is 0)")
        if c.optim.warmup_epochs and c.optim.warmup_steps:
            raise UserError("give one of optim.warmup_epochs and optim.warmup_steps")
        if c.optim.schedule_unit == "epoch" and (not c.train.max_epochs or c.optim.warmup_steps):
            raise UserError("optim.schedule_unit=epoch needs train.max_epochs and warmup_epochs")
        if c.train.save_every_epochs and c.train.save_every_steps:
            raise UserError("give one of train.save_every_epochs and train.save_every_steps")
        if c.task.name == "sudoku" and c.data.dir == "generated":
            raise UserError("task.name=sudoku has no generator: set data.dir to a built data set")
    elif not c.train.max_steps:
        raise UserError("config key train.max_steps must be at least 1")
    if c.model.type == "trm" and c.task.name not in FILE_TASKS:
        raise UserError(
            f"model.type=trm solves grids, not task.name={c.task.name}; "
            "use act_rnn or universal_transformer"
        )
    if (
        c.model.type == "act_rnn"
        and c.act.kind == "pondernet"
        and c.task.name
        not in (
            *FILE_TASKS,
            "parity",
        )
    ):
        raise UserError(
            "act.kind=pondernet works for tasks with one ponder loop per example (maze, sudoku, "
            f"parity), not for task.name={c.task.name}"
        )
    if c.model.type == "universal_transformer":
        for key in ("ut.key_depth", "ut.value_depth"):
            if value_at(c, key) % c.ut.heads:
                raise UserError(
                    f"config key {key}={value_at(c, key)} must be a multiple of ut.heads"
                )
    require_at_least(c, ("task.near_ood_bits", "task.ood_bits", "task.position_offset"), -1)
    refuse_negative(
        c,
        allowed=(
            "seed",
            "data.seed",
            "eval.seed",
            "act.halt_bias",
            "ut.halt_bias",
            "task.near_ood_bits",
            "task.ood_bits",
            "task.position_offset",
        ),
    )
    warnings = []
    if c.model.type == "act_rnn" and c.act.kind == "act" and c.act.time_limit == 1:
        warnings.append("act.time_limit=1 leaves one inner step: nothing can be adapted")
    return warnings
