"""Low-rank adapters (Hu et al., 2021): W' = W + (alpha / r) A B, with A [in, r] and B [r, out].

An adapter is a tree that holds {"a", "b"} at the place of each adapted kernel. `attach` puts both
into the parameter tree, where `layers.dense` adds x A B to x W, so that W takes no gradient;
`merge` makes plain kernels of them. A starts Kaiming-uniform, B at zero: a fresh adapter changes
nothing. Kernels may have several input and output axes and a leading layer axis; A and B then see
the flattened ones. Adapters are read and written in the PEFT layout.
"""

import dataclasses
import fnmatch
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from common import torch_bridge
from common.errors import UserError
from common.rundir import atomic_write
from common.torch_bridge import Rule

Params = Mapping[str, Any]
Adapter = Mapping[str, Any]

PEFT_PREFIX = "base_model.model."
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@flax.struct.dataclass
class LoraKernel:
    """A kernel with its adapter; sliced like an array when layers are scanned.

    Attributes:
      base: [*lead, *in, *out] the frozen kernel.
      a: [*lead, I, r], I = product of the input axes.
      b: [*lead, r, O].
      keys: typed keys [*lead] of dropout on the adapter's input, or None.
      scale: alpha / r.
      rate: share of dropped inputs.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    keys: jax.Array | None
    scale: float = flax.struct.field(pytree_node=False)
    rate: float = flax.struct.field(pytree_node=False)

    def delta(self, x: jax.Array) -> jax.Array:
        """What the adapter adds, [..., O] in x's dtype, for inputs x [..., I]."""
        if self.keys is not None and self.rate:
            keep = jax.random.bernoulli(self.keys, 1.0 - self.rate, x.shape)
            x = jnp.where(keep, x / (1.0 - self.rate), 0).astype(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ self.a.astype(x.dtype)
        out = low @ self.b.astype(x.dtype) * jnp.asarray(self.scale, x.dtype)
        return out.reshape(*x.shape[:-1], -1)


class Target(NamedTuple):
    """One adapted kernel.

    Attributes:
      path: of the kernel in the parameter tree, `a/b/c`.
      torch_module: its name in PyTorch without `.weight`; `{i}` = layer.
      num_layers: length of the leading layer axis, 0 = there is none.
      inputs, outputs: I and O.
    """

    path: str
    torch_module: str
    num_layers: int
    inputs: int
    outputs: int


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Attributes: rank r; alpha; dropout; targets: kernels that are adapted."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[Target, ...]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


def select_targets(
    rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]], modules: Sequence[str] | str
) -> tuple[Target, ...]:
    """The kernels of named PyTorch modules.

    Args:
      rules: name table of the network.
      shapes: shape of every parameter by path.
      modules: names as PEFT matches them: a module's last components, for instance `q_proj`, or
        one regular expression for whole names. `{i}` may stand for the layer.

    Raises:
      UserError: a name matches no linear map; lists those there are.
    """

    def matches(module: str, name: str) -> bool:
        if isinstance(modules, str):
            return re.fullmatch(name, module.format(i=0)) is not None
        return module == name or module.endswith(f".{name}")

    names = [modules] if isinstance(modules, str) else modules
    linear = [r for r in rules if r.path.endswith("/kernel") and r.torch_name.endswith(".weight")]
    targets = []
    for rule in linear:
        module = rule.torch_name.removesuffix(".weight")
        if not any(matches(module, name) for name in names):
            continue
        shape = tuple(shapes[rule.path])
        layers, own = (shape[0], shape[1:]) if rule.stacked else (0, shape)
        outputs, inputs = rule.layout.torch_shape(own)
        targets.append(Target(rule.path, module, layers, inputs, outputs))
    for name in names:
        if not any(matches(target.torch_module, name) for target in targets):
            known = sorted({r.torch_name.removesuffix(".weight").split("{i}.")[-1] for r in linear})
            raise UserError(f"LoRA target '{name}' is no linear map: choose of {', '.join(known)}")
    return tuple(targets)


# -------------------------------------------------------------------------------------- algebra
def init_adapter(key: jax.Array, settings: LoraSettings) -> dict[str, Any]:
    """A fresh float32 adapter: A uniform in +-1/sqrt(I) (Kaiming with a = sqrt 5), B zero."""
    flat: dict[str, jax.Array] = {}
    for index, target in enumerate(settings.targets):
        lead = (target.num_layers,) if target.num_layers else ()
        bound = target.inputs**-0.5
        shape = (*lead, target.inputs, settings.rank)
        draw = jax.random.uniform(
            jax.random.fold_in(key, index), shape, minval=-bound, maxval=bound
        )
        flat[f"{target.path}/a"] = draw
        flat[f"{target.path}/b"] = jnp.zeros((*lead, settings.rank, target.outputs))
    return torch_bridge.unflatten(flat)


def _pairs(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """{"a", "b"} by path of the adapted kernel."""
    pairs: dict[str, dict[str, Any]] = {}
    for path, value in torch_bridge.flatten(adapter).items():
        kernel, _, part = path.rpartition("/")
        pairs.setdefault(kernel, {})[part] = value
    return pairs


def attach(
    params: Params, adapter: Adapter, settings: LoraSettings, key: jax.Array | None = None
) -> dict[str, Any]:
    """The parameters with a `LoraKernel` at every adapted place.

    Args:
      params: plain parameters; they take no gradient.
      adapter: tree of `init_adapter`.
      settings: rank, scale, dropout.
      key: typed key of dropout; None = off.
    """
    frozen = jax.tree.map(jax.lax.stop_gradient, dict(params))
    flat = torch_bridge.flatten(frozen)
    for index, (path, pair) in enumerate(_pairs(adapter).items()):
        keys = None
        if key is not None and settings.dropout:
            keys = jax.random.fold_in(key, index)
            if pair["a"].ndim == 3:
                keys = jax.random.split(keys, pair["a"].shape[0])
        flat[path] = LoraKernel(
            flat[path], pair["a"], pair["b"], keys, settings.scale, settings.dropout
        )
    return torch_bridge.unflatten(flat)


def merge(params: Params, adapter: Adapter, scale: float) -> dict[str, Any]:
    """Plain parameters W + scale A B; with a negative scale the adapter is taken out again."""
    flat = torch_bridge.flatten(params)
    for path, pair in _pairs(adapter).items():
        kernel = jnp.asarray(flat[path])
        product = jnp.matmul(pair["a"], pair["b"], precision=jax.lax.Precision.HIGHEST)
        flat[path] = kernel + (scale * product).reshape(kernel.shape).astype(kernel.dtype)
    return torch_bridge.unflatten(flat)


def unmerge(params: Params, adapter: Adapter, scale: float) -> dict[str, Any]:
    """Inverse of `merge`, up to rounding."""
    return merge(params, adapter, -scale)


# ------------------------------------------------------------------------------------ PEFT files
def save_peft(
    directory: str | Path, adapter: Adapter, settings: LoraSettings, base_name: str = ""
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` as PEFT does.

    Args:
      directory: target; made when missing.
      adapter: the adapter.
      settings: its rank, alpha, dropout and targets.
      base_name: name or directory of the base model, for the config.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pairs, tensors = _pairs(adapter), {}
    for target in settings.targets:
        pair = pairs[target.path]
        for layer in range(target.num_layers) if target.num_layers else (None,):
            module = target.torch_module.format(i=layer)
            for part, name in (("a", "lora_A"), ("b", "lora_B")):
                value = np.asarray(pair[part] if layer is None else pair[part][layer])
                tensors[f"{PEFT_PREFIX}{module}.{name}.weight"] = np.ascontiguousarray(value.T)
    torch_bridge.write_safetensors(directory / PEFT_WEIGHTS, tensors)
    # Whole names: last components alone could match further modules of the same name.
    patterns = [re.escape(t.torch_module).replace(r"\{i\}", r"\d+") for t in settings.targets]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name or None,
        "task_type": None,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": "|".join(patterns),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    atomic_write(directory / PEFT_CONFIG, text)


def load_peft(
    directory: str | Path, rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], LoraSettings]:
    """Reads a PEFT adapter for a network.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
      rules, shapes: name table and parameter shapes of the network.

    Returns:
      The adapter (NumPy arrays, float32) and its settings.

    Raises:
      UserError: a variant of LoRA that is not supported, or a tensor that is missing, unknown or
        mis-shaped; names it.
    """
    directory = Path(directory)
    try:
        config = json.loads((directory / PEFT_CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        modules = config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{directory / PEFT_CONFIG}' is no LoRA config: {error}") from error
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(key):
            raise UserError(f"'{directory / PEFT_CONFIG}': {key} is not supported")
    if config.get("bias", "none") != "none" or config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"'{directory / PEFT_CONFIG}': only LORA without biases is supported")
    if rank < 1:
        raise UserError(f"'{directory / PEFT_CONFIG}': r = {rank} must be at least 1")
    if config.get("use_rslora"):  # there the scale is alpha / sqrt(r)
        alpha *= math.sqrt(rank)
    targets = select_targets(rules, shapes, modules)
    files = [directory / PEFT_WEIGHTS, directory / "adapter_model.bin"]
    found = [file for file in files if file.is_file()]
    if not found:
        raise UserError(f"no '{PEFT_WEIGHTS}' in '{directory}'")
    tensors = {
        name.removeprefix(PEFT_PREFIX).replace(".default.", "."): value
        for name, value in torch_bridge.read_tensors(found[0], strip=()).items()
    }
    flat: dict[str, np.ndarray] = {}
    for target in targets:
        for part, name, shape in (
            ("a", "lora_A", (rank, target.inputs)),
            ("b", "lora_B", (target.outputs, rank)),
        ):
            values = []
            for layer in range(target.num_layers) if target.num_layers else (None,):
                full = f"{target.torch_module.format(i=layer)}.{name}.weight"
                if full not in tensors:
                    raise UserError(f"missing tensor '{PEFT_PREFIX}{full}' in '{found[0]}'")
                value = tensors.pop(full)
                if value.shape != shape:
                    raise UserError(f"tensor '{full}' has shape {value.shape}, not {shape}")
                values.append(value.T)
            flat[f"{target.path}/{part}"] = np.stack(values) if target.num_layers else values[0]
    unknown = [name for name in tensors if not fnmatch.fnmatchcase(name, "*inv_freq")]
    if unknown:
        raise UserError(f"unknown tensor '{unknown[0]}' in '{found[0]}': no target takes it")
    dropout = float(config.get("lora_dropout") or 0.0)
    return torch_bridge.unflatten(flat), LoraSettings(rank, alpha, dropout, targets)
