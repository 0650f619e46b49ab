"""The recordings of the ESM fixtures: found, not listed, so other sizes and names run as well."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.fixtures import fixture_root


def path(name: str) -> Path:
    """A file of the fixtures."""
    return fixture_root() / "esm" / name


def read(name: str) -> Any:
    """A JSON file of the fixtures."""
    return json.loads(path(name).read_text(encoding="utf-8"))


def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of an npz file."""
    with np.load(path(name)) as file:
        return {key: file[key] for key in file.files}
