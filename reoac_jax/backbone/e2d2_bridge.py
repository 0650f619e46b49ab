"""E2D2 weights under the names of the PyTorch module: reading and writing hub directories."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import torch_bridge
from common.errors import UserError
from common.lm.layers import Params
from common.torch_bridge import FLATTENED, Rule, Tensors, linear
from reoac_jax.backbone.e2d2 import E2D2Config, parameter_shapes
from reoac_jax.backbone.e2d2_config import (
    DECODER,
    EMBEDDING,
    ENCODER,
    HEAD,
    declared_ties,
    derive_config,
    find_base_config,
)
from reoac_jax.backbone.e2d2_hub_config import hub_base_config, hub_config
from reoac_jax.backbone.hub_files import IGNORED_TENSORS, Json, read_json, stored_dtype, write_model

_DECODER_EMBEDDING = DECODER + "model.embed_tokens.weight"
_ENCODER_HEAD = ENCODER + "lm_head.weight"


class HubModel(NamedTuple):
    """A network read from a hub directory.

    Attributes:
        config: Its static description.
        params: Float32 parameter tree (NumPy arrays).
        provenance: Source of every field of `config`.
    """

    config: E2D2Config
    params: dict[str, Any]
    provenance: dict[str, str]


# ----------------------------------------------------------------------------------- name table
def name_table(cfg: E2D2Config) -> list[Rule]:
    """The name table of a network without its aliases."""
    rules = [Rule(EMBEDDING, "embed/embedding")]
    sides = [("encoder", ENCODER)]
    if not cfg.tie_encoder_decoder:
        sides.append(("decoder", DECODER))
    for side, prefix in sides:
        torch_layer, path = prefix + "model.layers.{i}.", f"{side}/layers/"
        rules += [
            Rule(torch_layer + "input_layernorm.weight", path + "norm_attn/scale"),
            Rule(torch_layer + "post_attention_layernorm.weight", path + "norm_mlp/scale"),
            Rule(torch_layer + "self_attn.o_proj.weight", path + "attn/o/kernel", linear(2)),
            Rule(prefix + "model.norm.weight", f"{side}/norm_final/scale"),
        ]
        for name in ("q", "k", "v"):
            torch_name = f"{torch_layer}self_attn.{name}_proj"
            rules.append(Rule(f"{torch_name}.weight", f"{path}attn/{name}/kernel", linear()))
            if cfg.qkv_bias:
                rules.append(Rule(f"{torch_name}.bias", f"{path}attn/{name}/bias", FLATTENED))
        for name in ("q_norm", "k_norm") if cfg.qk_norm else ():
            rules.append(Rule(f"{torch_layer}self_attn.{name}.weight", f"{path}attn/{name}/scale"))
        for name in ("gate", "up", "down"):
            torch_name = f"{torch_layer}mlp.{name}_proj.weight"
            rules.append(Rule(torch_name, f"{path}mlp/{name}/kernel", linear()))
    if not cfg.tie_head:
        rules.append(Rule(HEAD, "head/kernel", linear()))
    return rules


# -------------------------------------------------------------------------------------- aliases
def remove_aliases(
    tensors: Tensors, tie_stacks: bool | None, tie_head: bool | None
) -> tuple[Tensors, bool, bool]:
    """Keeps one name of every tensor that the checkpoint repeats under several.

    A declared tie is checked by value and may miss names (converters drop repeated tensors); an
    undeclared one is detected by value.

    Args:
        tensors: Tensors under the original names.
        tie_stacks: What the config says about tied encoder and decoder; None = nothing.
        tie_head: What the config says about a tied head; None = nothing.

    Returns:
        The tensors under their first names, whether the stacks and whether the head are tied.

    Raises:
        UserError: Two names that should be one tensor differ; names both.
    """
    tensors = dict(tensors)
    partners = {
        name: ENCODER + name.removeprefix(DECODER)
        for name in tensors
        if name.startswith(DECODER + "model.") and name != _DECODER_EMBEDDING
    }
    if tie_stacks is None:
        tie_stacks = all(_equal(tensors, one, other) for one, other in partners.items())
    if tie_stacks:
        for name, partner in partners.items():
            _merge(tensors, partner, name)
    if not tie_head:
        undeclared_and_absent = tie_head is None and HEAD not in tensors
        tie_head = undeclared_and_absent or _equal(tensors, HEAD, EMBEDDING)
    _merge(tensors, EMBEDDING, _DECODER_EMBEDDING)
    if tie_head:
        _merge(tensors, EMBEDDING, _ENCODER_HEAD)
        _merge(tensors, EMBEDDING, HEAD)
    elif tie_stacks:
        _merge(tensors, HEAD, _ENCODER_HEAD)
    return tensors, tie_stacks, tie_head


def _equal(tensors: Mapping[str, np.ndarray], one: str, other: str) -> bool:
    return one in tensors and other in tensors and np.array_equal(tensors[one], tensors[other])


def _merge(tensors: Tensors, keep: str, alias: str) -> None:
    """Removes an alias after checking it, or renames it when it is the only copy."""
    if alias not in tensors:
        return
    value = tensors.pop(alias)
    if not np.array_equal(tensors.setdefault(keep, value), value):
        raise UserError(f"tensors '{keep}' and '{alias}' should be tied but differ")


def add_aliases(tensors: Tensors, cfg: E2D2Config) -> Tensors:
    """Repeats tied tensors under every name the PyTorch module has for them."""
    full = dict(tensors)
    if cfg.tie_encoder_decoder:
        for name, value in tensors.items():
            if name.startswith(ENCODER + "model."):
                full[DECODER + name.removeprefix(ENCODER)] = value
    if cfg.tie_head:
        full[_ENCODER_HEAD] = full[HEAD] = tensors[EMBEDDING]
    return full


# ------------------------------------------------------------------------------ hub directories
def load_hf_directory(
    directory: str | Path, base_config: str | Path | None = None, weights: str | Path | None = None
) -> HubModel:
    """Reads a model in hub layout.

    Args:
        directory: Holds `config.json`, the weights and perhaps `base_config.json`.
        base_config: Config of the base model; wins over the file and the built-in table.
        weights: Weight file, when it is not the directory's own.

    Returns:
        Config, float32 parameters and the source of every config value.

    Raises:
        UserError: Anything missing, unknown, mis-shaped or contradictory; names it.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    if config.get("model_type") != "e2d2":
        raise UserError(f"'{directory / 'config.json'}' is no E2D2 config (model_type)")
    override = None if base_config is None else Path(base_config)
    base, base_source = find_base_config(config, directory, override)
    tensors = torch_bridge.read_tensors(weights or directory)
    if not any(name.startswith("backbone.") for name in tensors):
        tensors = {f"backbone.{name}": value for name, value in tensors.items()}
    tensors, tie_stacks, tie_head = remove_aliases(tensors, *declared_ties(config, base))
    cfg, provenance = derive_config(
        tensors, config, base, base_source, tie_stacks=tie_stacks, tie_head=tie_head
    )
    shapes = torch_bridge.flatten(parameter_shapes(cfg))
    params = torch_bridge.import_state(tensors, name_table(cfg), shapes, allow=IGNORED_TENSORS)
    return HubModel(cfg, params, provenance)


def save_hf_directory(
    directory: str | Path,
    cfg: E2D2Config,
    params: Params,
    *,
    dtype: str = "float32",
    tokenizer_files: Sequence[str | Path] = (),
    source_config: Json | None = None,
    source_base_config: Json | None = None,
) -> None:
    """Writes a model in hub layout: config.json, base_config.json, model.safetensors, tokenizer.

    Args:
        directory: Target; made when missing.
        cfg: The network.
        params: Its parameter tree.
        dtype: Stored dtype: float32, bfloat16 or float16.
        tokenizer_files: Files to copy beside the weights.
        source_config: `config.json` the model came from; its other keys are kept.
        source_base_config: The same for the base config.
    """
    tensors = torch_bridge.export_state(params, name_table(cfg))
    tensors = {n: value.astype(stored_dtype(dtype), copy=False) for n, value in tensors.items()}
    configs = {
        "base_config.json": hub_base_config(cfg, source_base_config),
        "config.json": {**hub_config(cfg, source_config), "torch_dtype": dtype},
    }
    write_model(directory, add_aliases(tensors, cfg), configs, tokenizer_files)
