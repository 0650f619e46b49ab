"""Arrays on disk: written atomically, and read with a line that names a damaged file."""

import io
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.rundir import atomic_write


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
    """Reads an .npy file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that writes it again") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{path} is damaged ({error}); run the stage that writes it again"
        ) from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads an .npz file.

    Raises:
        UserError: it is missing or damaged.
    """
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that writes it again") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged ({error}); run the stage that writes it again"
        ) from None
