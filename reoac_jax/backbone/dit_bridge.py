"""MDLM and SEDD weights under the names of the PyTorch modules: reading and writing.

Layouts: a hub directory (names with the prefix `backbone.` for MDLM's code, without for SEDD's), a
Lightning checkpoint of MDLM's code (`state_dict`, averages in `ema.shadow_params`), a training
checkpoint of SEDD's code (`model`, `ema`). Averages are preferred: they are what the authors
evaluate.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import torch_bridge
from common.errors import UserError
from common.lm.layers import Params
from common.torch_bridge import Rule, Tensors, linear
from reoac_jax.backbone.dit import DiTConfig, parameter_shapes
from reoac_jax.backbone.dit_config import INV_FREQ, derive_config, family_of, hub_config
from reoac_jax.backbone.hub_files import IGNORED_TENSORS, Json, read_json, stored_dtype, write_model

PREFIX = "backbone."
_BLOCK = "blocks.{i}."


class HubDiT(NamedTuple):
    """A network read from files.

    Attributes:
        config: Its static description.
        params: Float32 parameter tree (NumPy arrays).
        provenance: Source of every field of `config`, and which weights were taken.
    """

    config: DiTConfig
    params: dict[str, Any]
    provenance: dict[str, str]


# ----------------------------------------------------------------------------------- name table
def name_table(prefix: str = "") -> list[Rule]:
    """The name table, in the order of the PyTorch module's parameters."""

    def weight_and_bias(torch_name: str, path: str) -> list[Rule]:
        return [
            Rule(f"{prefix}{torch_name}.weight", f"{path}/kernel", linear()),
            Rule(f"{prefix}{torch_name}.bias", f"{path}/bias"),
        ]

    return [
        Rule(f"{prefix}vocab_embed.embedding", "embed/embedding"),
        *weight_and_bias("sigma_map.mlp.0", "sigma/fc0"),
        *weight_and_bias("sigma_map.mlp.2", "sigma/fc2"),
        Rule(f"{prefix}{_BLOCK}norm1.weight", "blocks/norm1/scale"),
        Rule(f"{prefix}{_BLOCK}attn_qkv.weight", "blocks/attn_qkv/kernel", linear()),
        Rule(f"{prefix}{_BLOCK}attn_out.weight", "blocks/attn_out/kernel", linear(2)),
        Rule(f"{prefix}{_BLOCK}norm2.weight", "blocks/norm2/scale"),
        *weight_and_bias(f"{_BLOCK}mlp.0", "blocks/mlp/fc1"),
        *weight_and_bias(f"{_BLOCK}mlp.2", "blocks/mlp/fc2"),
        *weight_and_bias(f"{_BLOCK}adaLN_modulation", "blocks/ada"),
        Rule(f"{prefix}output_layer.norm_final.weight", "final/norm/scale"),
        *weight_and_bias("output_layer.linear", "final/linear"),
        *weight_and_bias("output_layer.adaLN_modulation", "final/ada"),
    ]


def parameter_order(num_blocks: int) -> list[str]:
    """Tensor names in the order in which unnamed averages are stored: block after block."""
    names: list[str] = []
    block: list[str] = []
    for rule in name_table():
        if rule.stacked:
            block.append(rule.torch_name)
            continue
        if block:
            names += [name.format(i=i) for i in range(num_blocks) for name in block]
            block = []
        names.append(rule.torch_name)
    return names


def apply_averages(tensors: Tensors, averages: Sequence[np.ndarray], num_blocks: int) -> Tensors:
    """The tensors with every parameter replaced by its average, matched by position.

    Scalars behind the last parameter belong to the noise schedule and are ignored.

    Raises:
        UserError: Too few or too many averages, or one whose shape is not its parameter's.
    """
    order = parameter_order(num_blocks)
    extra = averages[len(order) :]
    if len(averages) < len(order) or any(value.size != 1 for value in extra):
        raise UserError(
            f"the checkpoint holds {len(averages)} averages (ema.shadow_params), but the network "
            f"has {len(order)} parameters"
        )
    replaced = dict(tensors)
    for position, (name, value) in enumerate(zip(order, averages, strict=False)):
        if name in tensors and tensors[name].shape != value.shape:
            raise UserError(
                f"average {position} (ema.shadow_params) has shape {value.shape}, but tensor "
                f"'{name}' has {tensors[name].shape}"
            )
        replaced[name] = value
    return replaced


# ---------------------------------------------------------------------------------------- files
def load_directory(
    directory: str | Path,
    weights: str | Path | None = None,
    family: str | None = None,
    overrides: Json | None = None,
) -> HubDiT:
    """Reads a model.

    Args:
        directory: Holds `config.json` (a training checkpoint may do without) and the weights.
        weights: Weight file, when it is not the directory's own.
        family: "mdlm" or "sedd"; None = what `config.json` says.
        overrides: Values that no file states, see `dit_config.parse_overrides`.

    Returns:
        Config, float32 parameters and the source of every config value.

    Raises:
        UserError: Anything missing, unknown, mis-shaped or contradictory; names it.
    """
    directory = Path(directory)
    config: Json = {}
    if family is None or (directory / "config.json").is_file():
        config = read_json(directory / "config.json")
        stated = family_of(config)
        if stated is None:
            raise UserError(f"'{directory / 'config.json'}' is neither an MDLM nor a SEDD config")
        if family not in (None, stated):
            raise UserError(f"'{directory / 'config.json'}' describes {stated}, not {family}")
    checkpoint = torch_bridge.read_checkpoint(weights or directory)
    tensors = {name.removeprefix(PREFIX): v for name, v in checkpoint.tensors.items()}
    cfg, provenance = derive_config(tensors, config, family, overrides)
    provenance["weights"] = "the model's own"
    if checkpoint.averages is not None:
        tensors = apply_averages(tensors, checkpoint.averages, cfg.num_blocks)
        provenance["weights"] = "moving average (ema.shadow_params)"
    shapes = torch_bridge.flatten(parameter_shapes(cfg))
    params = torch_bridge.import_state(tensors, name_table(), shapes, allow=IGNORED_TENSORS)
    return HubDiT(cfg, params, provenance)


def export_tensors(cfg: DiTConfig, params: Params, prefix: str) -> Tensors:
    """Every tensor of the PyTorch module, the rotary buffer included."""
    tensors = torch_bridge.export_state(params, name_table(prefix))
    exponent = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    tensors[prefix + INV_FREQ] = (1.0 / cfg.rope_theta**exponent).astype(np.float32)
    return tensors


def save_directory(
    directory: str | Path,
    cfg: DiTConfig,
    params: Params,
    *,
    dtype: str = "float32",
    tokenizer_files: Sequence[str | Path] = (),
    source_config: Json | None = None,
) -> None:
    """Writes a model in hub layout: config.json, model.safetensors, tokenizer.

    Args:
        directory: Target; made when missing.
        cfg: The network.
        params: Its parameter tree.
        dtype: Stored dtype: float32, bfloat16 or float16.
        tokenizer_files: Files to copy beside the weights.
        source_config: `config.json` the model came from; its other keys are kept.
    """
    config = hub_config(cfg, source_config)
    prefix = "" if "tokens" in config else PREFIX
    tensors: Mapping[str, np.ndarray] = export_tensors(cfg, params, prefix)
    kind = stored_dtype(dtype)
    tensors = {
        name: value if name.endswith(INV_FREQ) else value.astype(kind, copy=False)
        for name, value in tensors.items()
    }
    if "model_type" in config:
        config["torch_dtype"] = dtype
    write_model(directory, tensors, {"config.json": config}, tokenizer_files)
