"""The whole configuration tree of q* generation with its defaults, and its validation.

A config file starts from `get_default_config()` and edits it. `finalize` checks every value before
anything is downloaded or loaded. `GUIDE_NAMES` are the flags users know from the guide.
"""

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from common.errors import UserError, require
from qstar.adapters import ADAPTERS
from qstar.backend import BACKENDS
from qstar.prompts import STYLES
from qstar.sampling import DRAWS
from qstar.settings import alpha_settings, law_settings, parse_shard, prompt_settings

DTYPES = ("auto", "bfloat16", "float16", "float32")
ALIGNMENTS = ("none", "exact")
EOS_MODES = ("auto", "union", "merge")
PLATFORMS = ("", "cpu", "cuda", "tpu", "gpu")

GUIDE_NAMES: Mapping[str, str] = {
    "model_theta": "model.theta",
    "model_t": "model.t",
    "dtype": "model.dtype",
    "alpha_method": "alpha.method",
    "fixed_alpha": "alpha.fixed",
    "alpha_tol": "alpha.tol",
    "dataset": "data.name",
    "dataset_split": "data.split",
    "dataset_adapter": "data.adapter",
    "prompt_field": "data.prompt_field",
    "response_field": "data.response_field",
    "num_samples": "run.num_samples",
    "start_idx": "run.start_idx",
    "batch_size": "run.slots",
    "max_new_tokens": "sampling.max_new_tokens",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "output": "run.output",
    "save_diagnostics": "run.save_diagnostics",
    "device": "run.platform",
    "backend": "backend",
}


def get_default_config() -> ConfigDict:
    """Defaults of every key."""
    c = ConfigDict()
    c.seed = 0
    c.backend = "jax"  # jax | transformers | vllm

    c.model = ConfigDict()
    c.model.theta = ""  # current policy: directory, .gguf, smollm2, owner/name, tiny:N
    c.model.t = ""  # target policy; "" = the same as theta
    c.model.revision_theta = ""  # hub models: branch, tag or commit
    c.model.revision_t = ""
    c.model.tokenizer_theta = ""  # directory; "" = the model's
    c.model.tokenizer_t = ""
    c.model.dtype = "auto"  # bfloat16 | float16 | float32; auto: bfloat16, on CPUs float32
    c.model.vocab_align = "none"  # exact: two tokenizers mix over the tokens they share

    c.alpha = ConfigDict()
    c.alpha.method = "kl_symmetry"  # fixed | kl_symmetry | entropy | ess_balance |
    # reverse_kl_symmetry. entropy is a heuristic, 0.01-0.5 away from the KL-symmetric alpha and
    # worst where one model is peaked
    c.alpha.fixed = 0.5  # weight of pi_theta; 1 and 0 run one model alone
    c.alpha.solver = "newton"  # newton | bisection
    c.alpha.tol = 1e-6
    c.alpha.min = 0.0  # bounds for every method but fixed
    c.alpha.max = 1.0
    c.alpha.extrapolate = False  # allows fixed outside [0, 1]

    c.q = ConfigDict()
    c.q.force_first_token = False  # the first token is pi_t's
    c.q.special_tokens = "mix"  # mix | target_mass
    c.q.eos = "auto"  # union | merge; auto: merge where the models' end tokens differ
    c.q.support = "full"  # full | target
    c.q.support_top_k = -1  # of pi_t, for support=target; -1 = off
    c.q.support_top_p = 1.0

    c.sampling = ConfigDict()
    c.sampling.max_new_tokens = 512
    c.sampling.temperature = 1.0  # 0 = greedy
    c.sampling.top_p = 1.0
    c.sampling.top_k = -1
    c.sampling.stop_ids = ()  # further end tokens, by pi_theta's ids
    c.sampling.stop_strings = ()
    c.sampling.draw = "cumulative"  # cumulative | gumbel

    c.data = ConfigDict()
    c.data.name = ""  # problems | .jsonl, .json, .parquet | save_to_disk folder | hub name
    c.data.split = "train"
    c.data.size = 1000  # problems: how many there are
    c.data.seed = 0  # problems: of the generator
    c.data.adapter = "auto"  # auto | deepscaler | generic
    c.data.prompt_field = ""
    c.data.response_field = ""
    c.data.hint_field = ""  # column that only pi_t sees
    c.data.hint_template = "{prompt}\n\nHint: {hint}"  # pi_t's prompt where there is a hint column
    c.data.prompt_style = "auto"  # raw | chat | qa | auto
    c.data.prompt_style_t = ""  # "" = the same
    c.data.system = ""  # system message where a conversation has none
    c.data.system_t = ""  # "" = the same
    c.data.add_think_token = False  # prompts end with <think>
    c.data.max_prompt_tokens = 2048
    c.data.overlong = "error"  # error | left

    c.run = ConfigDict()
    c.run.output = ""  # OUTPUT.jsonl
    c.run.num_samples = 0  # rows, 0 = all
    c.run.start_idx = 0
    c.run.repeats = 1  # samples per row
    c.run.shard = "0/1"  # i/n: rows i, i + n, ...
    c.run.slots = "auto"  # sequences generated at a time
    c.run.burst = 32  # tokens per device call
    c.run.prefill_rows = 4  # prompts read per call
    c.run.deterministic = False  # results equal byte for byte after any interruption
    c.run.save_diagnostics = False
    c.run.save_tokens = False
    c.run.extra_fields = True  # reference, finish_reason, n_tokens, repeat
    c.run.sort_output = False
    c.run.overwrite = False
    c.run.dry_run = False  # print rendered prompts, load no weights
    c.run.metrics = True  # OUTPUT.metrics/ with metrics.jsonl and TensorBoard files
    c.run.log_seconds = 10.0  # between two rows of metrics
    c.run.platform = ""  # cpu | cuda | tpu; "" = what JAX finds
    return c


def rename_guide_flags(argv: Sequence[str]) -> list[str]:
    """The command line with the guide's flags (`--alpha_method=...`) as config keys."""
    result = list(argv[:1])
    for word in argv[1:]:
        name, equals, value = word.lstrip("-").partition("=")
        plain = name.removeprefix("config.")
        negative = plain.startswith("no") and plain.removeprefix("no") in GUIDE_NAMES
        key = GUIDE_NAMES.get(plain.removeprefix("no") if negative else plain)
        # `backend` and `seed` are keys of the same name already.
        if word.startswith("--") and key is not None and word != "--":
            if negative:
                equals, value = "=", "False"
            word = f"--config.{key}{equals}{value}"
        result.append(word)
    return result


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raises UserError unless a value is one of those allowed."""
    require(
        value in allowed, f"{key} {value!r} is none of {', '.join(a or repr(a) for a in allowed)}"
    )


def finalize(config: ConfigDict, needs_data: bool = True) -> list[str]:
    """Checks every value, the cheap way: nothing is read or downloaded.

    Args:
        config: the config.
        needs_data: whether data set and output are used (not by the Python API).

    Returns:
        Lines worth telling the user.

    Raises:
        UserError: with the key and what it may be.
    """
    if config.data.prompt_style_t:
        one_of("data.prompt_style_t", config.data.prompt_style_t, STYLES)
    alpha_settings(config)
    law_settings(config)
    prompt_settings(config)
    one_of("backend", config.backend, BACKENDS)
    one_of("model.dtype", config.model.dtype, DTYPES)
    one_of("model.vocab_align", config.model.vocab_align, ALIGNMENTS)
    one_of("q.eos", config.q.eos, EOS_MODES)
    one_of("sampling.draw", config.sampling.draw, DRAWS)
    one_of("data.adapter", config.data.adapter, ADAPTERS)
    one_of("run.platform", config.run.platform, PLATFORMS)
    require(bool(config.model.theta), "model.theta is empty: name a model, for example smollm2")
    sampling, run, data = config.sampling, config.run, config.data
    require(
        sampling.temperature >= 0.0,
        f"sampling.temperature must be 0 or more, not {sampling.temperature}",
    )
    for key, value, low in (
        ("seed", config.seed, 0),
        ("sampling.max_new_tokens", sampling.max_new_tokens, 1),
        ("data.size", data.size, 1),
        ("run.num_samples", run.num_samples, 0),
        ("run.start_idx", run.start_idx, 0),
        ("run.repeats", run.repeats, 1),
        ("run.burst", run.burst, 1),
        ("run.prefill_rows", run.prefill_rows, 1),
        ("run.log_seconds", run.log_seconds, 0),
    ):
        require(value >= low, f"{key} must be {low} or more, not {value}")
    require(config.seed < 2**32, f"seed must be below 2**32, not {config.seed}")
    for key, values, kind in (
        ("sampling.stop_ids", sampling.stop_ids, int),
        ("sampling.stop_strings", sampling.stop_strings, str),
    ):
        bad = [v for v in values if type(v) is not kind or (kind is str and not v)]
        require(not bad, f"{key}: {bad[:1]} is no {'token id' if kind is int else 'text'}")
    slots = str(run.slots)
    require(
        slots == "auto" or (slots.isdigit() and int(slots) >= 1),
        f"run.slots must be auto or a number of 1 or more, not {slots!r}",
    )
    parse_shard(run.shard)
    if data.hint_field:
        try:
            data.hint_template.format(prompt="", hint="")
        except (KeyError, IndexError, ValueError):
            raise UserError(
                "data.hint_template may hold {prompt} and {hint} only, not "
                f"{data.hint_template!r}"
            ) from None
    if needs_data:
        require(bool(data.name), "data.name is empty: name a data set, for example problems")
        require(bool(run.output), "run.output is empty: name the file to write, OUTPUT.jsonl")
    warnings = []
    if config.alpha.method == "fixed" and data.hint_field and config.alpha.fixed == 1.0:
        warnings.append("alpha.fixed=1 runs pi_theta alone: data.hint_field has no effect")
    if run.deterministic and str(run.slots) == "auto":
        warnings.append(
            "run.deterministic with run.slots=auto: results are equal byte for byte only where the "
            "same number of slots is found; name it"
        )
    return warnings
