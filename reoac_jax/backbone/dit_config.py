"""Config files of MDLM and SEDD against `DiTConfig`, with the source of every value.

Three spellings exist: the hub config of MDLM (`model_type: mdlm`), the same with
`parameterization: sedd` for the baseline trained by MDLM's code, and the tree of SEDD's own code
(`tokens`, `graph`, `noise`, `model`). A training checkpoint may lie without any of them: then what
no tensor shows is given by hand.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.errors import UserError
from reoac_jax.backbone.dit import GRAPHS, PARAMETERIZATIONS, SCORE_MODES, DiTConfig
from reoac_jax.backbone.hub_files import Json

FAMILIES = ("mdlm", "sedd")
EMBEDDING = "vocab_embed.embedding"
INV_FREQ = "rotary_emb.inv_freq"
GPT2_ROWS, GPT2_END = 50258, 50256  # of the GPT-2 tokenizer with one more row for the mask

# Spelling of the noise schedules in the files.
_NOISE_NAMES = {
    "loglinear": "loglinear",
    "geometric": "geometric",
    "linear": "linear_sigma",
    "cosine": "cosine_floor",
    "cosinesqr": "cosine_squared",
}
_OVERRIDES = {
    "num_heads": int,
    "length": int,
    "dropout": float,
    "time_conditioning": bool,
    "parameterization": str,
    "graph": str,
    "scale_by_sigma": bool,
    "noise": str,
    "noise_eps": float,
    "sigma_min": float,
    "sigma_max": float,
    "eos_id": int,
    "bos_id": int,
    "pad_id": int,
}
"""What no tensor shows, hence what may be given by hand."""


def family_of(config: Json) -> str | None:
    """ "mdlm", "sedd", or None when a config file belongs to neither."""
    if config.get("model_type") == "mdlm":
        return "sedd" if config.get("parameterization") == "sedd" else "mdlm"
    if "tokens" in config and isinstance(config.get("graph"), Mapping):
        return "sedd"
    return None


def parse_overrides(pairs: list[str]) -> Json:
    """`key=value` texts as typed values.

    Raises:
        UserError: An unknown key or a value of the wrong kind.
    """
    values: Json = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in _OVERRIDES:
            raise UserError(f"--set {pair}: expected KEY=VALUE with KEY in {', '.join(_OVERRIDES)}")
        kind = _OVERRIDES[key]
        try:
            if kind is bool:
                values[key] = {"true": True, "false": False}[text.lower()]
            else:
                values[key] = kind(text)
        except (KeyError, ValueError) as error:
            raise UserError(f"--set {pair}: '{text}' is no {kind.__name__}") from error
    return values


def _flat_config(config: Json) -> Json:
    """The stated values of any spelling under the names of `DiTConfig`."""
    inner = config.get("model")
    network: Mapping[str, Any] = inner if isinstance(inner, Mapping) else config
    named = {
        "hidden_size": network.get("hidden_size", network.get("hidden_dim")),
        "cond_dim": network.get("cond_dim"),
        "num_blocks": network.get("n_blocks"),
        "num_heads": network.get("n_heads"),
        "length": network.get("length", network.get("model_length")),
        "dropout": network.get("dropout"),
        "eos_id": config.get("eos_token_id"),
        "bos_id": config.get("bos_token_id"),
        "pad_id": config.get("pad_token_id"),
        "score_mode": config.get("score_mode"),
    }
    schedule: Any = config.get("noise")
    if isinstance(schedule, str):  # our own exports of MDLM
        schedule = {"type": schedule}
    if isinstance(schedule, Mapping):
        kind = str(schedule.get("type", "loglinear"))
        if kind not in _NOISE_NAMES:
            raise UserError(
                f"config.json: noise type '{kind}' is none of {', '.join(_NOISE_NAMES)}"
            )
        named["noise"] = _NOISE_NAMES[kind]
        for key in ("sigma_min", "sigma_max"):
            named[key] = None if schedule.get(key) is None else float(schedule[key])
    if "tokens" in config:
        graph = str(config["graph"].get("type"))
        named |= {
            "vocab_size": int(config["tokens"]) + (graph == "absorb"),
            "graph": graph,
            "parameterization": "sedd",
            "time_conditioning": True,
            "scale_by_sigma": network.get("scale_by_sigma"),
        }
    else:
        sedd = config.get("parameterization") == "sedd"
        named |= {
            "vocab_size": config.get("vocab_size"),
            "graph": "absorb",
            "parameterization": config.get("parameterization"),
            "time_conditioning": True if sedd else config.get("time_conditioning"),
            "scale_by_sigma": sedd,
        }
    return {key: value for key, value in named.items() if value is not None}


_DEFAULTS: Json = {
    "parameterization": "subs",
    "graph": "absorb",
    "time_conditioning": False,
    "scale_by_sigma": False,
    "dropout": 0.1,
    "noise": "loglinear",
    "noise_eps": 1e-3,
    "sigma_min": 1e-4,
    "sigma_max": 20.0,
    "score_mode": "bidirectional",
}


def derive_config(
    tensors: Mapping[str, np.ndarray],
    config: Json,
    family: str | None = None,
    overrides: Json | None = None,
) -> tuple[DiTConfig, dict[str, str]]:
    """Builds the static description of a network from its tensors and files.

    Args:
        tensors: Tensors under the original names without prefixes.
        config: Content of `config.json`; {} when there is none.
        family: "mdlm" or "sedd" when there is no config.
        overrides: Values given by hand, see `parse_overrides`.

    Returns:
        The config and the source of every field.

    Raises:
        UserError: A value is missing, unsupported or contradicts a tensor; names both.
    """
    stated, given = (_flat_config(config) if config else {}), dict(overrides or {})
    if not config and family == "sedd":
        given = {"parameterization": "sedd", "time_conditioning": True} | given
        given.setdefault("scale_by_sigma", given.get("graph", "absorb") == "absorb")
    found: Json = {}
    provenance: dict[str, str] = {}
    for field, value in _DEFAULTS.items():
        found[field], provenance[field] = value, "default"
    for source, values in (("config.json", stated), ("command line", given)):
        for field, value in values.items():
            found[field], provenance[field] = value, source
    for field, value, tensor in _measured(tensors):
        for source, values in (("config.json", stated), ("the command line", given)):
            if values.get(field, value) != value:
                raise UserError(
                    f"{source} says {field} = {values[field]}, but tensor '{tensor}' shows {value}"
                )
        found[field], provenance[field] = value, f"tensor {tensor}"
    for field in ("num_heads", "length"):
        if field not in found:
            raise UserError(f"neither config.json nor a tensor shows {field}: give --set {field}=N")
    _check(found)
    absorbing = found["graph"] == "absorb"
    found["mask_id"] = found["vocab_size"] - 1 if absorbing else -1
    provenance["mask_id"] = "last row of the embedding" if absorbing else "uniform graph: no mask"
    gpt2 = found["vocab_size"] == GPT2_ROWS
    for field in ("eos_id", "bos_id", "pad_id"):
        if field not in found:
            found[field] = GPT2_END if gpt2 else -1
            provenance[field] = "GPT-2 vocabulary" if gpt2 else "the tokenizer's"
    return DiTConfig(**found), provenance


def _measured(tensors: Mapping[str, np.ndarray]) -> list[tuple[str, int, str]]:
    """(field, size, tensor) of every size that a tensor shape shows."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"missing tensor '{name}'")
        if tensors[name].ndim != rank:
            raise UserError(f"tensor '{name}' has shape {tensors[name].shape}, not {rank} axes")
        return tensors[name].shape

    pattern = re.compile(r"blocks\.(\d+)\.")
    indices = [int(match[1]) for name in tensors if (match := pattern.match(name))]
    if not indices:
        raise UserError("missing tensor 'blocks.0.*': no blocks")
    last = max(indices)
    rows, width = shape(EMBEDDING, 2)
    sizes = [
        ("vocab_size", rows, EMBEDDING),
        ("hidden_size", width, EMBEDDING),
        ("cond_dim", shape("sigma_map.mlp.0.weight", 2)[0], "sigma_map.mlp.0.weight"),
        ("num_blocks", last + 1, f"blocks.{last}.*"),
        ("intermediate_size", shape("blocks.0.mlp.0.weight", 2)[0], "blocks.0.mlp.0.weight"),
    ]
    if INV_FREQ in tensors:
        head = 2 * shape(INV_FREQ, 1)[0]
        if width % head:
            raise UserError(f"width {width} is no multiple of the {head} shown by '{INV_FREQ}'")
        sizes.append(("num_heads", width // head, INV_FREQ))
    return sizes


def _check(found: Json) -> None:
    for field, choices in (
        ("parameterization", PARAMETERIZATIONS),
        ("graph", GRAPHS),
        ("score_mode", SCORE_MODES),
    ):
        if found[field] not in choices:
            raise UserError(f"config.json: {field} '{found[field]}' is none of {choices}")
    if found["parameterization"] == "subs" and found["graph"] != "absorb":
        raise UserError("config.json: the SUBS parameterization needs the absorbing graph")
    if found["hidden_size"] % found["num_heads"]:
        raise UserError(
            f"hidden size {found['hidden_size']} is no multiple of {found['num_heads']} heads"
        )


def hub_config(cfg: DiTConfig, source: Json | None = None) -> Json:
    """Content of `config.json` for a network, in the spelling it came from.

    Args:
        cfg: The network.
        source: The `config.json` it came from, whose other keys are kept.
    """
    source = dict(source or {})
    ids = {"eos_token_id": cfg.eos_id, "bos_token_id": cfg.bos_id, "pad_token_id": cfg.pad_id}
    common: Json = {key: value for key, value in ids.items() if value >= 0}
    if cfg.score_mode != "bidirectional":
        common["score_mode"] = cfg.score_mode
    kind = {ours: theirs for theirs, ours in _NOISE_NAMES.items()}.get(cfg.noise)
    if kind is None:
        raise UserError(f"noise schedule '{cfg.noise}' has no name in the hub layout")
    schedule = {"type": kind, "sigma_min": cfg.sigma_min, "sigma_max": cfg.sigma_max}
    sizes = {"cond_dim": cfg.cond_dim, "n_blocks": cfg.num_blocks, "n_heads": cfg.num_heads}
    if cfg.parameterization == "sedd" and "model_type" not in source:
        network = {
            **source.get("model", {}),
            **sizes,
            "hidden_size": cfg.hidden_size,
            "length": cfg.length,
            "scale_by_sigma": cfg.scale_by_sigma,
            "dropout": cfg.dropout,
        }
        return {
            **source,
            **common,
            "tokens": cfg.vocab_size - (cfg.graph == "absorb"),
            "graph": {**source.get("graph", {}), "type": cfg.graph},
            "noise": {**source.get("noise", {}), **schedule},
            "model": network,
        }
    if cfg.parameterization == "sedd":
        common["parameterization"] = "sedd"
    if cfg.noise != "loglinear":
        common["noise"] = schedule
    return {
        "architectures": ["MDLM"],
        **source,
        **common,
        **sizes,
        "model_type": "mdlm",
        "vocab_size": cfg.vocab_size,
        "model_length": cfg.length,
        "hidden_dim": cfg.hidden_size,
        "dropout": cfg.dropout,
        "time_conditioning": cfg.time_conditioning,
    }
