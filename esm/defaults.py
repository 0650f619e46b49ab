"""Every configuration key of the method with its default, and the validation of a config.

A config file under `configs/` starts from `get_default_config()` and edits it; the tree is locked,
so an unknown key is an error that names the nearest ones. Texts that are "" and tuples that are ()
stand for "not given" where the comment says so.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from common.config_checks import require_at_least, require_choices, require_each
from common.engines.base import SCOPES
from common.engines.factory import ENGINES
from common.errors import UserError
from common.flags import refuse_negative
from esm.core.contrast import QUALITIES
from esm.core.sets import POSITIVE_SOURCES
from esm.pairs import METHODS as MINE_METHODS
from esm.policies import ALPHA_NORMS, KEY_CENTERS, PROBE_SCALES, VARIANTS
from esm.select import KERNEL_SCOPES
from esm.select import METHODS as SELECT_METHODS

METHODS = ("greedy", "esm", "static", "self_consistency")
# Ablations by name: what they change, and whether the whole pipeline runs again for them.
ABLATIONS: dict[str, dict[str, Any]] = {
    "random_mining": {"offline_mine.method": "random"},
    "top1_memory": {"offline_select.B": 1, "online.k_retrieve": 1, "online.L": 1},
    "no_dpp": {"offline_select.method": "top"},
    "random_library": {"offline_select.method": "random"},
    "first_step_only": {"online.max_tool_m": 1},
}
LEGACY_KEYS = {"online.k": "online.k_retrieve", "online.alpha_mult": "online.k_scale"}


def get_default_config() -> ConfigDict:
    """Defaults of every key; those of the original schema where it has the key."""
    c = ConfigDict()
    c.seed = 0

    c.model = ConfigDict()
    c.model.name_or_path = "smollm2"  # packaged name, directory, .gguf file, hub name, or "tiny"
    c.model.revision = ""  # of the hub
    c.model.dtype = "auto"  # of weights, cache and products; auto: float32 on a CPU, else bfloat16
    c.model.params_dtype = ""  # jax: another one for weights and cache; "" = dtype
    c.model.tensor_parallel_size = 1
    c.model.enforce_eager = True  # vllm
    c.model.enable_chunked_prefill = False  # vllm
    c.model.gpu_memory_utilization = 0.6  # vllm
    c.model.max_model_len = 8192  # longest prompt plus answer
    c.model.max_num_seqs = 64  # vllm

    c.backend = ConfigDict()
    c.backend.rollouts = "jax"  # mining rollouts, greedy, self-consistency: jax | hf | vllm
    c.backend.states = "jax"  # hidden states of mined answers
    c.backend.online = "jax"  # steered answers

    c.task = ConfigDict()
    c.task.dataset = "gsm8k"
    c.task.data_root = "datasets"  # data sets in their hub layout
    c.task.train_split = "train"
    c.task.eval_split = "test"
    c.task.dev_split = ""  # where settings are chosen; "" = train_split
    c.task.max_train_examples = 200  # 0 = all
    c.task.max_eval_examples = 200  # 0 = all
    c.task.max_dev_examples = 100  # of the stage tune
    c.task.train_offset = 0  # rows skipped
    c.task.eval_offset = -1  # -1: behind the rows mined and tuned on where splits coincide, else 0
    c.task.dev_offset = -1  # -1: behind the mined rows where splits coincide, else 0
    c.task.split_seed = -1  # shuffles rows before offsets; -1 = file order
    c.task.allow_overlap = False  # evaluate on mined questions

    c.prompt = ConfigDict()
    c.prompt.template = "gsm8k_0shot"

    c.decode = ConfigDict()
    c.decode.temperature = 0.0
    c.decode.top_p = 1.0
    c.decode.max_new_tokens = 256  # T, committed tokens of an answer
    c.decode.logprobs = 1  # 0 leaves the log-probability of an answer out of its row

    c.control_points = ConfigDict()
    c.control_points.M = 6
    c.control_points.segment_delimiter = "\n\n"

    c.offline_mine = ConfigDict()
    c.offline_mine.method = "contrastive"  # contrastive | random
    c.offline_mine.K = 8  # rollouts per question
    c.offline_mine.batch_size_examples = 1  # questions per call of the engine
    c.offline_mine.K_pos = 4
    c.offline_mine.K_neg = 4
    c.offline_mine.temperature = 0.7
    c.offline_mine.top_p = 0.95
    c.offline_mine.max_new_tokens = 512
    c.offline_mine.eta0 = 0.001  # price of a whole budget
    c.offline_mine.keep_top_C = 512  # pairs
    c.offline_mine.candidate_layers = ()  # int, ratio or text such as "3/5"; () = top third
    c.offline_mine.require_correct_and_incorrect = True
    c.offline_mine.min_correct_rollouts = 1
    c.offline_mine.min_incorrect_rollouts = 1
    c.offline_mine.pos_source = "rollout"  # rollout | gold | rollout_or_gold
    c.offline_mine.mine_last = False  # also control point M, which is never looked up
    c.offline_mine.quality = "reward_gap"  # reward_gap | separation

    c.offline_select = ConfigDict()
    c.offline_select.B = 64  # entries of the library
    c.offline_select.lambda_diversity = 0.5
    c.offline_select.epsilon = 1e-4
    c.offline_select.method = "dpp"  # dpp | top | random
    c.offline_select.random_seed = 0
    c.offline_select.min_per_control_point = 0
    c.offline_select.condition_on_forced = False
    c.offline_select.kernel_scope = "all"  # all | same_m_layer
    c.offline_select.layers = ()  # only entries of these layers; () = the tuned one, else all

    c.offline_memory = ConfigDict()
    c.offline_memory.normalize_keys = True

    c.online = ConfigDict()
    c.online.variant = "esm"
    c.online.k_retrieve = 16
    c.online.L = 2  # tools tried
    c.online.probe_tokens = 8
    c.online.beta = 1.0
    c.online.rho = 0.1
    c.online.k_scale = 1.0
    c.online.tau_null = 0.0
    c.online.min_sim = 0.0
    c.online.min_entries = 1
    c.online.max_tool_m = placeholder(int)
    c.online.min_tool_m = placeholder(int)
    c.online.batch_size_examples = 0  # answers side by side; <= 0: jax.slots
    c.online.protocol = "P1"  # the only one
    c.online.injection_scope = "segment"  # segment | persistent
    c.online.probe_scale = "unit"  # unit | commit
    c.online.alpha_max = 0.0  # 0 = no limit
    c.online.alpha_norm = "raw"  # raw | rel: strengths in units of |h| / |v|
    c.online.key_center = "none"  # none | layer | layer_m

    c.tune = ConfigDict()
    c.tune.k_scales = ()  # grid of the stage tune; () = it is left out of --stage=all
    c.tune.layers = ()  # () = every mined layer
    c.tune.use = True  # later stages take the tuned layer and k_scale

    c.eval = ConfigDict()
    c.eval.methods = ("greedy", "esm")  # greedy | esm | static | self_consistency
    c.eval.ablations = ()  # variants or named ablations, run after the methods
    c.eval.case_top_n = 20
    c.eval.artifact_run_dir = ""  # another run's directory with library and memory
    c.eval.grader = "strict"  # strict | legacy
    c.eval.grader_workers = 2
    c.eval.tag = ""  # appended to the directories of results
    c.eval.sc_samples = 8  # of self_consistency
    c.eval.sc_temperature = 0.7
    c.eval.static_layer = -1  # of the method static; -1: the layer with the most corrections
    c.eval.static_strength = -1.0  # -1: beta * k_scale
    c.eval.bootstrap = 2000  # resamples of the intervals

    c.outputs = ConfigDict()
    c.outputs.root_dir = "outputs"
    c.outputs.run_name = "debug"
    c.outputs.run_id = ""  # "" = a new or the unfinished run; "latest"
    c.outputs.tensorboard = True

    c.jax = ConfigDict()
    c.jax.slots = 16  # answers side by side
    c.jax.sample_slots = 0  # rollouts side by side; 0 = from the free memory
    c.jax.length_buckets = ()  # cache sizes, e.g. (1024, 4096); () = multiples of 64
    c.jax.mesh = 0  # devices the model is split over; 0 = model.tensor_parallel_size
    c.jax.tail_chunk = 64  # tokens of an answer's rest per round; 0 = no limit

    c.suite = ConfigDict()
    c.suite.run_name_prefix = "suite"
    c.suite.gpus = ()  # numbers, one process each; () = suite.slots processes on the CPU
    c.suite.slots = 1
    c.suite.stages = ("mine", "select", "memory", "eval")
    c.suite.datasets = ()  # dicts: name, prompt_template, keys of `task`, dotted keys, run_name
    c.suite.id = ""  # "" = a time stamp
    return c


_CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.params_dtype": ("", "float32", "bfloat16", "float16"),
    "backend.rollouts": tuple(ENGINES),
    "backend.states": tuple(ENGINES),
    "backend.online": tuple(ENGINES),
    "offline_mine.method": MINE_METHODS,
    "offline_mine.pos_source": POSITIVE_SOURCES,
    "offline_mine.quality": QUALITIES,
    "offline_select.method": SELECT_METHODS,
    "offline_select.kernel_scope": KERNEL_SCOPES,
    "online.variant": VARIANTS,
    "online.injection_scope": SCOPES,
    "online.probe_scale": PROBE_SCALES,
    "online.alpha_norm": ALPHA_NORMS,
    "online.key_center": KEY_CENTERS,
    "eval.grader": ("strict", "legacy"),
}
_POSITIVE = (
    "model.tensor_parallel_size",
    "model.max_model_len",
    "model.max_num_seqs",
    "decode.max_new_tokens",
    "control_points.M",
    "offline_mine.K",
    "offline_mine.max_new_tokens",
    "offline_mine.keep_top_C",
    "eval.grader_workers",
    "eval.sc_samples",
    "eval.bootstrap",
    "jax.slots",
    "suite.slots",
)
_NOT_NEGATIVE = (
    "task.max_train_examples",
    "task.max_eval_examples",
    "task.max_dev_examples",
    "task.train_offset",
    "decode.temperature",
    "offline_mine.temperature",
    "offline_mine.eta0",
    "offline_mine.K_pos",
    "offline_mine.K_neg",
    "offline_mine.min_correct_rollouts",
    "offline_mine.min_incorrect_rollouts",
    "offline_select.B",
    "offline_select.lambda_diversity",
    "offline_select.epsilon",
    "offline_select.min_per_control_point",
    "online.k_retrieve",
    "online.L",
    "online.probe_tokens",
    "online.alpha_max",
    "online.min_entries",
    "eval.case_top_n",
    "jax.sample_slots",
    "jax.mesh",
    "jax.tail_chunk",
)


def finalize(config: ConfigDict) -> list[str]:
    """Validates a parsed config.

    Returns:
        Warnings for the log, one line each.

    Raises:
        UserError: a value is out of range or names nothing; the line names the key.
    """
    from esm.datasets import check_dataset
    from esm.prompts import check_template

    require_choices(config, _CHOICES)
    require_at_least(config, _POSITIVE, 1)
    require_at_least(config, _NOT_NEGATIVE, 0)
    or_minus_one = ("task.split_seed", "task.dev_offset", "task.eval_offset", "eval.static_layer")
    require_at_least(config, or_minus_one, -1)
    refuse_negative(
        config,
        allowed=(
            "seed",
            "task.split_seed",
            "task.dev_offset",
            "task.eval_offset",
            "offline_select.random_seed",
            "eval.static_layer",
            "eval.static_strength",
            "online.k_scale",
            "online.min_sim",
            "online.tau_null",
        ),
    )
    shares = ("decode.top_p", "offline_mine.top_p")
    require_each(config, shares, lambda value: 0.0 < value <= 1.0, "must lie in (0, 1]")
    if not config.control_points.segment_delimiter:
        raise UserError("control_points.segment_delimiter is empty: no segment would ever end")
    for name in config.eval.methods:
        _known("eval.methods", name, METHODS)
    for name in config.eval.ablations:
        _known("eval.ablations", name, (*VARIANTS, *ABLATIONS))
    if config.eval.tag and any(char in config.eval.tag for char in "/\\ "):
        raise UserError(f"eval.tag={config.eval.tag!r} must be part of a directory name")
    check_dataset(config.task.dataset)
    check_template(config.prompt.template)
    return _warnings(config)


def _warnings(config: ConfigDict) -> list[str]:
    warnings: list[str] = []
    mine = config.offline_mine
    if not mine.require_correct_and_incorrect and mine.pos_source != "rollout":
        warnings.append(
            f"offline_mine.pos_source={mine.pos_source} has no effect without "
            "require_correct_and_incorrect"
        )
    if mine.temperature == 0 and mine.K > 1:
        warnings.append(
            f"offline_mine.temperature=0 makes all {mine.K} rollouts of a question the same"
        )
    if config.control_points.M < 2:
        warnings.append("control_points.M=1 has no control point at which a correction could act")
    return warnings


def _known(key: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise UserError(f"config key {key}: {name!r} is none of {', '.join(allowed)}")
