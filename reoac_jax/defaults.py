"""The whole configuration tree of REOAC with its defaults, and its validation.

A config file starts from `get_default_config()` and edits it, so no key is ever missing and the
difference between two experiments is short. Sections follow the specification's key table; keys of
the original that it read but never used are not carried over (an unknown key is an error here).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from common.answers.paper_parsers import parser_name
from common.config_checks import require_at_least, require_choices, require_each, value_at
from common.errors import UserError
from common.flags import refuse_negative
from common.problems_math import SUBJECTS
from reoac_jax.records import TASKS
from reoac_jax.types import OPERATORS

ALGORITHMS = ("paper", "plus")
SCORE_MODES = ("blockwise", "single_block", "left_to_right", "bidirectional", "prompt_cached")
SELECTION_MODES = ("argmax", "sample", "random", *(f"fixed:{name}" for name in OPERATORS))


def get_default_config() -> ConfigDict:
    """Defaults of every key: the original's code defaults where it had one, else ours."""
    c = ConfigDict()
    c.algo = "plus"  # "paper" = the original's rules; "plus" = the better method
    c.seed = 0

    c.logging = ConfigDict()
    c.logging.output_dir = "runs"
    c.logging.exp_name = "reoac"
    c.logging.checkpoint_interval = 1  # iterations between checkpoints
    c.logging.sample_interval = 5  # iterations between dumps of samples/*.json
    c.logging.num_samples = 2  # episodes per dump
    c.logging.tensorboard = True

    c.dataset = ConfigDict()
    c.dataset.task = "gsm8k"  # gsm8k | math
    c.dataset.train_path = "generated"  # a file, or "generated" = the problem generator
    c.dataset.eval_path = "generated"
    c.dataset.data_root = ""  # "" = REOAC_DATA_ROOT, else the working directory
    c.dataset.toy_size = 64
    c.dataset.math_subjects = SUBJECTS
    c.dataset.dump_math_subjects = False
    c.dataset.math_subject_root = "dataset/raw/math"
    c.dataset.raw_train_path = ""
    c.dataset.raw_eval_path = ""
    c.dataset.prompt_field = "prompt"
    c.dataset.answer_field = "target_answer"
    c.dataset.task_field = "task"
    c.dataset.allow_toy = False
    c.dataset.download_on_missing = False
    c.dataset.hf_dataset = "openai/gsm8k"
    c.dataset.hf_config = "main"
    c.dataset.shuffle = True  # False = file order, as the original
    c.dataset.train_size = 20000  # generated problems only
    c.dataset.eval_size = 512  # generated problems only
    c.dataset.problem_seed = 0
    c.dataset.min_ops = 1
    c.dataset.max_ops = 4
    c.dataset.max_value = 99

    c.backbone = ConfigDict()
    c.backbone.name = "e2d2"  # e2d2 | mdlm | sedd | simple
    # "embedded" (e2d2), "scratch" = random weights in the sizes of `model`, a directory, a hub name
    c.backbone.model_name_or_path = "embedded"
    c.backbone.tokenizer_name_or_path = ""  # "" = the model's own
    c.backbone.max_length = 64  # P, prompt tokens; longer prompts are truncated
    # "" = the model's; e2d2: blockwise | single_block | left_to_right; mdlm, sedd: bidirectional |
    # prompt_cached (approximate: the prompt is read once per episode)
    c.backbone.score_mode = ""
    # left_to_right: finished blocks are kept in caches and the active block alone is scored; for a
    # frozen backbone, since the caches pass no gradient
    c.backbone.block_cache = False
    c.backbone.sample_strategy = "argmax"  # argmax | sample
    c.backbone.temperature = 1.0
    c.backbone.dtype = "float32"  # activations: float32 | bfloat16
    c.backbone.num_steps = 32  # of the sigma schedule
    c.backbone.sigma_schedule = "cosine"  # cosine | linear
    c.backbone.sigma_max = 1.0
    c.backbone.sigma_min = 0.0
    c.backbone.renoise = False  # re-mask decoded tokens at random before scoring, as the original
    c.backbone.hidden_size = 32  # "simple" only

    c.relation = ConfigDict()
    c.relation.temperature = 1.0
    c.relation.strings = "raw"  # raw | stripped
    c.relation.numbers = "token"  # token | span
    c.relation.canvas = "written"  # plus: tentative = masked positions show their prediction

    c.operators = ConfigDict()
    for name, tokens in zip(OPERATORS, (16, 16, 32, 32, 64), strict=True):
        c.operators[name] = ConfigDict()
        c.operators[name].k = tokens  # max_tokens or scope_len
        c.operators[name].step_scale = 1.0  # plus: multiplies the pace; 0 = at least one position
        c.operators[name].threshold = 0.0  # plus: also write all of this confidence; 0 = off
        c.operators[name].factor = 0.0  # plus: also write by the factor rule; 0 = off
    c.operators.O_BRANCH.branch_depth = 1
    c.operators.O_FAST.step_scale = 1.5

    c.actor = ConfigDict()
    c.actor.hidden_size = 128
    c.actor.dropout = 0.0
    c.critic = ConfigDict()
    c.critic.hidden_size = 128
    c.critic.dropout = 0.0

    c.rollout = ConfigDict()
    c.rollout.max_steps = 8  # T
    c.rollout.gen_len = 32  # G
    c.rollout.batch_size = 16
    c.rollout.selection_mode = "sample"  # argmax | sample; plus: random | fixed:<operator>
    c.rollout.use_hidden = True
    c.rollout.cost_lambda = 0.0
    # plus, training: steps at which other operators are tried; evaluation with branching: steps at
    # which every row looks ahead. paper: steps whose candidates the samples record.
    c.rollout.branch_steps = ()
    c.rollout.branch_k = 2  # operators tried
    c.rollout.branching = False  # plus: O_BRANCH may be chosen
    c.rollout.branch_horizon = "end"  # plus: a trial lasts to the end | depth = branch_depth
    c.rollout.branch_depth = 2  # plus: decisions of a trial with branch_horizon=depth
    c.rollout.gpu_critic = True  # True = tensor feature path, False = host path
    c.rollout.fast_critic = False  # paper: no relation features
    c.rollout.fast_operator = False  # paper, with fast_critic: operators see no strings
    c.rollout.save_relation = True
    c.rollout.ensure_update = True
    c.rollout.fallback_operator = "O_SCOPE"
    c.rollout.group_size = 1  # episodes per prompt (plus)
    c.rollout.early_exit = True  # plus
    c.rollout.valid_mask = True  # plus: void operators are out of the policy
    c.rollout.use_progress = True  # plus: the policy sees the 4 progress features
    c.rollout.patience = 0  # plus: unchanged repair rounds asked for before leaving
    c.rollout.remask_ratio = 0.1  # plus: share re-masked by one repair
    c.rollout.stop_at_eos = True  # plus: positions behind a written eos need no writing

    c.finetune_mode = "full"  # full | lora (adapters alone) | none
    c.lora = ConfigDict()
    c.lora.r = 8
    c.lora.alpha = 16.0  # the adapter counts alpha / r times
    c.lora.dropout = 0.0  # of its input
    c.lora.target_modules = ()  # PyTorch module names; () = the projections of the attention
    c.lora.mlp = False  # and those of the MLP
    c.lora.adapter = ""  # directory of a PEFT adapter to start from; "" = a fresh one
    c.losses = ConfigDict()
    c.losses.critic_weight = 1.0
    c.losses.actor_weight = 1.0
    c.losses.backbone_weight = 1.0
    c.losses.actor_temperature = 1.0
    c.losses.advantage_positive = True
    c.losses.advantage_clip = 0.0  # 0 = off
    c.losses.entropy_weight = 0.01
    c.losses.advantage_scale = "batch"  # plus: unit deviation per batch | group
    c.losses.branch_weight = 1.0  # plus: of the losses on tried operators
    c.losses.backbone_pg_weight = 1.0
    c.losses.backbone_sft_weight = 0.5
    c.losses.gamma = 1.0
    c.losses.gae_lambda = 0.95
    c.losses.clip = 0.2

    c.optim = ConfigDict()
    c.optim.actor_lr = 1e-4
    c.optim.critic_lr = 1e-4
    c.optim.backbone_lr = 1e-5
    c.optim.weight_decay = 0.01
    c.optim.grad_clip = 0.0  # global norm; 0 = off
    c.optim.warmup = 0  # optimizer steps
    c.optim.anneal = False  # plus: rates fall linearly to 0 over num_iterations

    # The original's section `update`: that name is a method of ConfigDict. The command line accepts
    # --config.update.* as well.
    c.updates = ConfigDict()
    c.updates.critic_steps = 1  # paper
    c.updates.actor_steps = 1  # paper
    c.updates.backbone_steps = 1  # paper
    c.updates.epochs = 4  # plus
    c.updates.minibatch = 512  # plus: episode steps per minibatch
    c.updates.backbone_batch = 64  # rows per micro-batch of the backbone loss
    c.updates.backbone_rows = 256  # episode steps drawn for one backbone update; 0 = all
    c.updates.target_decay = 0.5  # plus: per iteration, of the slow copy of the critic

    c.buffer_size = 1000
    c.num_iterations = 1
    c.episodes_per_iter = 2

    c.eval = ConfigDict()
    c.eval.interval = 0  # iterations between evaluations; 0 = only at the end
    c.eval.batch_size = 128
    c.eval.limit = 0  # 0 = all
    c.eval.verifier = "robust"  # robust | paper
    c.eval.math_parser = "sympy"  # verifier=paper: sympy | latex2sympy2 | sympy_latex | auto
    c.reward = ConfigDict()
    c.reward.mode = "strict"  # strict | shaped
    c.reward.verifier = "robust"
    c.reward.workers = 1  # grading processes
    c.reward.time_limit = 2.0  # seconds per answer

    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 3
    c.checkpoint.resume = True

    c.parallel = ConfigDict()
    c.parallel.num_devices = 0  # 0 = all
    c.parallel.mode = "jit"  # jit | pmap
    c.parallel.fsdp = False  # True: the backbone and its moments are split over the devices

    c.model = ConfigDict()  # network built by --mode=pretrain
    c.model.hidden_size = 128
    c.model.intermediate_size = 384
    c.model.num_encoder_layers = 2
    c.model.num_decoder_layers = 3
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 32
    c.model.rope_theta = 100.0  # short sequences need no low frequencies
    c.model.share_kv = False
    c.model.num_blocks = 4  # mdlm, sedd
    c.model.cond_dim = 64  # mdlm, sedd: width of the noise level's embedding

    c.pretrain = ConfigDict()
    c.pretrain.stage_steps = (1500, 1000, 3000)  # updates per stage of the curriculum
    c.pretrain.stage_max_ops = (1, 2, 4)  # longest problems of each stage
    c.pretrain.batch_size = 64
    c.pretrain.corpus_size = 60000  # generated problems per stage
    c.pretrain.init_from = ""  # "" = random weights; else a language model: a directory or smollm2
    c.pretrain.decoder_layers = 0  # of an adapted model; 0 = half of its layers
    c.pretrain.block_size = 4  # of an adapted model
    c.pretrain.lr = 2e-3
    c.pretrain.final_lr = 0.0  # share of lr at the end of the cosine
    c.pretrain.warmup = 200
    c.pretrain.weight_decay = 0.01
    c.pretrain.grad_clip = 1.0
    c.pretrain.ema_decay = 0.998
    c.pretrain.steps_per_dispatch = 50
    c.pretrain.eval_interval = 1000
    c.pretrain.checkpoint_interval = 500
    c.pretrain.eval_steps = (1, 2, 4, 8, 20)  # passes of the plain sampler at each evaluation
    c.pretrain.eval_thresholds = (0.5, 0.7, 0.9)  # of the final table
    c.pretrain.output = placeholder(str)  # directory of the exported model; default: the run's
    return c


def finalize(config: ConfigDict) -> list[str]:
    """Validate a parsed config.

    Returns:
      warnings for the log, one line each.

    Raises:
      UserError: a value is out of range; the line names the key.
    """
    c = config
    choices: dict[str, tuple[str, ...]] = {
        "algo": ALGORITHMS,
        "rollout.selection_mode": SELECTION_MODES,
        "rollout.fallback_operator": OPERATORS,
        "finetune_mode": ("full", "lora", "none"),
        "backbone.name": ("e2d2", "mdlm", "sedd", "simple"),
        "backbone.sample_strategy": ("argmax", "sample"),
        "backbone.score_mode": ("", *SCORE_MODES),
        "backbone.dtype": ("float32", "bfloat16"),
        "relation.strings": ("raw", "stripped"),
        "relation.numbers": ("token", "span"),
        "relation.canvas": ("written", "tentative"),
        "reward.mode": ("strict", "shaped"),
        "reward.verifier": ("robust", "paper"),
        "eval.verifier": ("robust", "paper"),
        "losses.advantage_scale": ("batch", "group"),
        "parallel.mode": ("jit", "pmap"),
        "rollout.branch_horizon": ("end", "depth"),
        "dataset.task": TASKS,
    }
    require_choices(c, choices)
    parser_name(c.eval.math_parser)
    if c.parallel.fsdp and c.parallel.mode != "jit":
        raise UserError("config key parallel.fsdp=True needs parallel.mode=jit")
    positive = (
        "rollout.max_steps",
        "rollout.gen_len",
        "rollout.batch_size",
        "rollout.group_size",
        "rollout.branch_k",
        "rollout.branch_depth",
        "backbone.max_length",
        "buffer_size",
        "num_iterations",
        "episodes_per_iter",
        "eval.batch_size",
        "updates.epochs",
        "updates.minibatch",
        "updates.backbone_batch",
        "logging.checkpoint_interval",
        "actor.hidden_size",
        "critic.hidden_size",
        "checkpoint.keep",
        "reward.workers",
        "lora.r",
        *(f"operators.{name}.k" for name in OPERATORS),
    )
    require_at_least(c, positive, 1)
    not_negative = (
        "rollout.cost_lambda",
        "optim.actor_lr",
        "optim.critic_lr",
        "optim.backbone_lr",
        "optim.weight_decay",
        "optim.grad_clip",
        "eval.limit",
        "eval.interval",
        "rollout.patience",
        "losses.entropy_weight",
        "updates.backbone_rows",
        "losses.branch_weight",
        "losses.backbone_pg_weight",
        "losses.backbone_sft_weight",
        "losses.critic_weight",
        "losses.actor_weight",
        "losses.backbone_weight",
    )
    require_at_least(c, not_negative, 0)
    above_zero = (
        "relation.temperature",
        "backbone.temperature",
        "losses.actor_temperature",
        "reward.time_limit",
        "lora.alpha",
    )
    require_each(c, above_zero, lambda value: value > 0, "must be positive")
    shares = (
        "actor.dropout",
        "critic.dropout",
        "rollout.remask_ratio",
        "losses.gamma",
        "losses.gae_lambda",
        "updates.target_decay",
    )
    require_each(c, shares, lambda value: 0.0 <= value <= 1.0, "must lie between 0 and 1")
    if c.algo == "plus" and c.episodes_per_iter % c.rollout.group_size:
        raise UserError(
            f"config key episodes_per_iter={c.episodes_per_iter} must be a multiple of "
            f"rollout.group_size={c.rollout.group_size}"
        )
    if c.algo == "plus" and c.rollout.batch_size % c.rollout.group_size:
        raise UserError(
            f"config key rollout.batch_size={c.rollout.batch_size} must be a multiple of "
            f"rollout.group_size={c.rollout.group_size}"
        )
    beyond = [t for t in c.rollout.branch_steps if not 0 <= t < c.rollout.max_steps]
    if c.algo == "plus" and beyond:
        raise UserError(
            f"config key rollout.branch_steps: step {beyond[0]} is outside 0.."
            f"{c.rollout.max_steps - 1} (rollout.max_steps={c.rollout.max_steps})"
        )
    if c.rollout.branching and c.operators.O_BRANCH.branch_depth < 1:
        raise UserError("config key operators.O_BRANCH.branch_depth must be at least 1 to branch")
    for key in ("rollout.branching", "optim.anneal"):
        if c.algo == "paper" and value_at(c, key):
            raise UserError(f"config key {key}=True is not the original's rule: algo=plus")
    if not 0.0 <= c.lora.dropout < 1.0:
        raise UserError(f"config key lora.dropout={c.lora.dropout} must lie in [0, 1)")
    if c.finetune_mode == "lora" and c.parallel.fsdp:
        raise UserError("config key parallel.fsdp=True: adapters are small, use finetune_mode=full")
    if c.backbone.block_cache and (c.algo == "paper" or c.finetune_mode != "none"):
        raise UserError(
            "config key backbone.block_cache=True needs algo=plus and finetune_mode=none, not "
            f"{c.algo} and {c.finetune_mode}"
        )
    for key in ("backbone.renoise", "rollout.fast_critic", "rollout.fast_operator"):
        if c.algo == "plus" and value_at(c, key):
            raise UserError(f"config key {key}=True is the original's rule: set algo=paper")
    if c.algo == "paper":
        original = {"rollout.selection_mode": SELECTION_MODES[:2], "relation.canvas": ("written",)}
        require_choices(c, original)
    last = ("dataset.min_ops", "dataset.max_ops", "dataset.max_value", "backbone.num_steps")
    require_at_least(c, (*last, "logging.sample_interval"), 1)
    refuse_negative(c, allowed=("seed", "dataset.problem_seed"))
    warnings = []
    worst = c.rollout.cost_lambda * c.rollout.max_steps  # cheapest operator costs 1 per step
    if c.algo == "paper" and worst >= 1.0:
        warnings.append(
            f"rollout.cost_lambda * rollout.max_steps * cheapest cost = {worst:.2f} >= 1, the "
            "largest reward: every return is negative, and with losses.advantage_positive the "
            "backbone loss is 0"
        )
    return warnings
