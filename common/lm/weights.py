"""Models in and out of files: Hugging Face safetensors (single and sharded) and GGUF.

One declarative table says which tensor feeds which parameter; it serves both directions and is
strict: a tensor that is unknown, missing, given twice or of another shape is an error naming it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from common.errors import UserError, require
from common.hub import download_model
from common.lm.config import DecoderConfig, read_config, read_stop_ids, to_hf
from common.lm.decoder import build_params, param_shapes, params_by_path
from common.lm.sharding import check_divides, param_sharding
from common.lm.tensor_files import open_tensors
from common.rundir import atomic_write_json
from common.torch_bridge import (
    FLATTENED,
    Rule,
    export_state,
    flatten,
    import_state,
    linear,
    unflatten,
    write_safetensors,
)

IGNORED = ("*.rotary_emb.inv_freq",)
"""Buffers old checkpoints carry; they follow from the config."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Model(NamedTuple):
    """A decoder ready to run.

    Attributes:
        params: Parameter tree, in cfg.dtype.
        cfg: Its config.
        stop_ids: End-of-sequence ids its files declare.
    """

    params: dict[str, Any]
    cfg: DecoderConfig
    stop_ids: tuple[int, ...]


def hf_rules(cfg: DecoderConfig) -> list[Rule]:
    """Name table of LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM."""
    rules = [
        Rule(_EMBEDDING, "embed/embedding"),
        Rule("model.norm.weight", "norm_final/scale"),
    ]
    for i in range(cfg.num_layers):
        source, target = f"model.layers.{i}", f"layers/{i}"
        rules += [
            Rule(f"{source}.input_layernorm.weight", f"{target}/norm_attn/scale"),
            Rule(f"{source}.post_attention_layernorm.weight", f"{target}/norm_mlp/scale"),
            Rule(f"{source}.self_attn.o_proj.weight", f"{target}/attn/o/kernel", linear(2)),
        ]
        for part in ("q", "k", "v"):
            name = f"{source}.self_attn.{part}_proj"
            rules.append(Rule(f"{name}.weight", f"{target}/attn/{part}/kernel", linear()))
            if cfg.qkv_bias:
                rules.append(Rule(f"{name}.bias", f"{target}/attn/{part}/bias", FLATTENED))
        if cfg.qk_norm:
            rules += [
                Rule(f"{source}.self_attn.{part}_norm.weight", f"{target}/attn/{part}_norm/scale")
                for part in ("q", "k")
            ]
        rules += [
            Rule(f"{source}.mlp.{part}_proj.weight", f"{target}/mlp/{part}/kernel", linear())
            for part in ("gate", "up", "down")
        ]
    if not cfg.tie_embeddings:
        rules.append(Rule(_HEAD, "head/kernel", linear()))
    return rules


# --------------------------------------------------------------------------------------- loading
def load_model(path: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> Model:
    """Loads a model from a directory in hub layout or a GGUF file.

    Args:
        path: Directory with config.json and weights; a `.gguf` file; or a directory whose only
            model is one `.gguf` file.
        dtype: "float32" | "bfloat16" | "float16", for weights and activations.
        mesh: Splits the weights over its `model` axis as they are read; None = one device.

    Returns:
        The model.

    Raises:
        UserError: No model there, an unsupported config, or tensors that do not fit it.
    """
    path = Path(path)
    packed = find_gguf(path)
    if packed is not None:
        from common.lm.gguf import open_gguf

        cfg, stop_ids, packed_tensors, rules = open_gguf(packed, dtype)
        return Model(place_tensors(packed_tensors, rules, cfg, mesh), cfg, stop_ids)
    require(path.is_dir(), f"no model at '{path}': expected a directory or a .gguf file")
    cfg = read_config(path, dtype)
    tensors = open_tensors(path)
    if cfg.tie_embeddings and _HEAD in tensors:
        tensors = _without_tied_head(tensors)
    try:
        params = place_tensors(tensors, hf_rules(cfg), cfg, mesh)
    except UserError as error:
        raise UserError(
            f"the weights in '{path}' do not fit its config.json: {error}; restore both, or name "
            "another model"
        ) from error
    return Model(params, cfg, read_stop_ids(path))


def find_gguf(path: Path) -> Path | None:
    """The GGUF file a path stands for, None where it stands for something else."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        require(
            len(found) < 2,
            f"several GGUF files in '{path}' ({', '.join(p.name for p in found)}): name one",
        )
        return found[0] if found else None
    return None


def place_tensors(
    tensors: Mapping[str, Any], rules: Sequence[Rule], cfg: DecoderConfig, mesh: Mesh | None
) -> dict[str, Any]:
    """Parameter tree on the devices, read one parameter after the other.

    Args:
        tensors: By name; opened files or arrays.
        rules: The name table.
        cfg: The decoder; its dtype is that of the parameters.
        mesh: For tensor parallelism, or None.

    Returns:
        The parameters.

    Raises:
        UserError: Tensors and table do not match, or the mesh does not fit the model.
    """
    if mesh is not None:
        check_divides(cfg, mesh)

    def place(path: str, value: np.ndarray) -> jax.Array:
        host = np.ascontiguousarray(value).astype(cfg.activation_dtype)
        return jax.device_put(host, None if mesh is None else param_sharding(cfg, mesh, path))

    tree = import_state(tensors, rules, param_shapes(cfg), allow=IGNORED, place=place)
    return build_params(flatten(tree))


def _without_tied_head(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Drops a head that repeats the embedding.

    Raises:
        UserError: It differs, so one of config and weights is wrong.
    """
    rest = {name: tensor for name, tensor in tensors.items() if name != _HEAD}
    embedding = np.asarray(tensors[_EMBEDDING]) if _EMBEDDING in tensors else None
    same = embedding is not None and np.array_equal(np.asarray(tensors[_HEAD]), embedding)
    require(
        same,
        f"tensor '{_HEAD}' differs from '{_EMBEDDING}' although config.json ties the embeddings",
    )
    return rest


# ---------------------------------------------------------------------------------------- saving
def save_model(
    directory: str | Path, model: Model, *, dtype: str = "", max_shard_bytes: int = 5 * 2**30
) -> None:
    """Writes config.json, generation_config.json and safetensors as transformers lays them out.

    Args:
        directory: Created where it is missing. Tokenizer files are not this function's business.
        model: Model to write.
        dtype: Of the stored tensors; "" = the model's.
        max_shard_bytes: Above this size the weights are split into shards with an index.

    Raises:
        UserError: The directory already holds weights.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    present = [p.name for p in target.glob("*.safetensors*")]
    require(not present, f"'{target}' already holds weights ({', '.join(present[:2])})")
    stored = np.dtype(jax.numpy.dtype(dtype)) if dtype else None

    def to_host(value: jax.Array) -> np.ndarray:
        host = np.asarray(value)
        return host if stored is None else host.astype(stored)

    flat = {path: to_host(value) for path, value in params_by_path(model.params).items()}
    tensors = export_state(unflatten(flat), hf_rules(model.cfg))
    shards = _split(tensors, max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(target / name, {key: tensors[key] for key in shard})
    if len(shards) > 1:
        weight_map = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        total = sum(value.nbytes for value in tensors.values())
        atomic_write_json(
            target / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    config = to_hf(model.cfg, model.stop_ids)
    atomic_write_json(target / "config.json", {**config, "dtype": dtype or model.cfg.dtype})
    if model.stop_ids:
        generation = {"eos_token_id": config["eos_token_id"], "do_sample": False}
        atomic_write_json(target / "generation_config.json", generation)


def _split(tensors: Mapping[str, np.ndarray], limit: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would exceed the limit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += value.nbytes
    return shards


# ------------------------------------------------------------------------------------------- hub
def locate_model(name: str, revision: str = "") -> Path:
    """The local path of a model: a path as it is, or a hub name downloaded into the hub's cache.

    Args:
        name: Path, or "owner/name" on the Hugging Face hub.
        revision: Branch, tag or commit; "" = the default branch.

    Returns:
        An existing path.

    Raises:
        UserError: Neither exists, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")):
        raise UserError(f"no model at '{name}': not a path here, nor 'owner/name' of the hub")
    try:
        patterns = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
        return download_model(name, revision, patterns)
    except Exception as error:  # the client raises a dozen types for a dozen causes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot download model '{name}': {reason}") from error
