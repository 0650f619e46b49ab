"""Files of a model directory in hub layout, whatever the network."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.json_files import NotJson, parse_json
from common.rundir import atomic_write
from common.torch_files import write_safetensors

Json = dict[str, Any]

IGNORED_TENSORS = ("*static_attention_mask", "*rotary_emb.inv_freq", "*.empty")
"""Buffers a training checkpoint may hold; none is a parameter."""


def read_json(path: Path) -> Json:
    """Reads one JSON object; a `UserError` names a missing or broken file."""
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"no '{path.name}' in '{path.parent}'") from error
    except (OSError, NotJson) as error:
        raise UserError(f"'{path}' is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' must hold a JSON object")
    return content


def write_model(
    directory: str | Path,
    tensors: Mapping[str, np.ndarray],
    configs: Mapping[str, Json],
    tokenizer_files: Sequence[str | Path],
) -> None:
    """Writes weights, then configs, then the tokenizer.

    Args:
        directory: Target; made when missing.
        tensors: By their names in the PyTorch module.
        configs: Content by file name.
        tokenizer_files: Files to copy beside the weights.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors)
    for name, content in configs.items():
        atomic_write(directory / name, json.dumps(content, indent=2, sort_keys=True) + "\n")
    for file in tokenizer_files:
        atomic_write(directory / Path(file).name, Path(file).read_bytes())


def stored_dtype(name: str) -> np.dtype:
    """NumPy dtype of a stored precision; a `UserError` lists the choices."""
    import ml_dtypes

    choices = {
        "float32": np.dtype(np.float32),
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "float16": np.dtype(np.float16),
    }
    if name not in choices:
        raise UserError(f"dtype '{name}' is none of {', '.join(choices)}")
    return choices[name]
