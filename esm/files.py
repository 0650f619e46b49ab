"""Files between the stages: written atomically, and read with a line that names a damaged one."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.json_files import Fields, read_json_object
from common.rundir import atomic_write

FORMAT_VERSION = 1
"""Of manifests and the files they stand for; a file without the number is of the first."""

MANIFEST = "manifest.json"
AGAIN = "run the stage that writes it again"
_NULLABLE = (str, type(None))
ROLLOUT: Fields = {
    "example_id": str,
    "k": int,
    "text": str,
    "token_ids": list,
    "gen_tokens": int,
    "finish_reason": str,
    "correct": bool,
    "reward": float,
}
ENTRY: Fields = {
    "tool_id": int,
    "tool_name": str,
    "entry_type": str,
    "has_vector": bool,
    "layer": int,
    "control_point_m": int,
    "quality": float,
    "reward_gap": float,
    "r_pos_mean": float,
    "r_neg_mean": float,
    "n_pos": int,
    "n_neg": int,
    "pair_id": int,
}
RESULT: Fields = {
    "example_id": str,
    "task": str,
    "pred": _NULLABLE,
    "gold": _NULLABLE,
    "correct": bool,
    "tokens_used": int,
    "finish_reason": str,
    "text": str,
}
_OF_THE_MODEL: Fields = {
    "model": dict,
    "model.name": str,
    "model.digest": str,
    "prompt.hash": str,
    "prompt.template": str,
    "hidden_size": int,
    "num_layers": int,
    "delimiter": str,
    "M": int,
    "mined": list,
    "layers": list,
}
MINED_MANIFEST: Fields = {**_OF_THE_MODEL, "pairs": int, "skipped": dict}
LIBRARY_MANIFEST: Fields = {**_OF_THE_MODEL, "entries": int, "digest": str}


def read_object(path: Path, cure: str, fields: Fields | None = None) -> dict[str, Any]:
    """Reads a JSON object of a run.

    Args:
        path: the file.
        cure: what to do about a damaged one.
        fields: what it must hold.

    Raises:
        UserError: it is missing, damaged, or of a newer format.
    """
    return read_json_object(path, cure, fields, ("format_version", FORMAT_VERSION))


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file; readers see the old one or the new."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    atomic_write(path, buffer.getvalue())


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file; readers see the old one or the new."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())


def read_array(path: Path) -> np.ndarray:
    """Reads an .npy file of finite numbers.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        array = np.asarray(np.load(path, allow_pickle=False))
        if not np.issubdtype(array.dtype, np.number) or not np.isfinite(array).all():
            raise ValueError("not all of it are finite numbers")
        return array
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {AGAIN}") from None
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise UserError(f"{path} is damaged ({_reason(error)}); {AGAIN}") from None


def read_arrays(path: Path, cure: str = AGAIN) -> dict[str, np.ndarray]:
    """Reads an .npz file.

    Args:
        path: the file.
        cure: what to do about a damaged one.

    Raises:
        UserError: it is missing or damaged.
    """
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {cure}") from None
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({_reason(error)}); {cure}") from None


def _reason(error: Exception) -> str:
    """Why an array could not be read, without the values in it."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:120]
