"""The E2D2 fixtures that are there, and the measure they are compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.fixtures import fixture_root

TOLERANCE = 2e-4
FLOOR = -1e5  # recorded values at or below stand for minus infinity


def e2d2_root() -> Path:
    """Directory of the E2D2 fixtures."""
    return fixture_root() / "backbones" / "e2d2"


def model_folders() -> list[Path]:
    """Every folder with a model."""
    return sorted(p.parent for p in e2d2_root().glob("*/config.json"))


def cases(pattern: str) -> list[Any]:
    """One test case per file of that name pattern in any model folder."""
    files = sorted(f for folder in model_folders() for f in folder.glob(pattern))
    return [pytest.param(f, id=f"{f.parent.name}-{f.stem}") for f in files]


def folder_cases() -> list[Any]:
    """One test case per model folder."""
    return [pytest.param(folder, id=folder.name) for folder in model_folders()]


def arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of a file."""
    with np.load(file) as content:
        return dict(content)


def error(ours: Any, theirs: np.ndarray, where: np.ndarray | None = None) -> float:
    """Largest |a - b| / (1 + |b|) with both sides clamped; `where` selects leading positions."""
    a, b = (np.maximum(np.asarray(x, np.float64), FLOOR) for x in (ours, theirs))
    if where is not None:
        a, b = a[where], b[where]
    assert a.shape == b.shape and np.all(np.isfinite(a))
    return float(np.max(np.abs(a - b) / (1.0 + np.abs(b))))


def assert_close(ours: Any, theirs: np.ndarray, where: np.ndarray | None = None) -> None:
    """Fails when the error exceeds the tolerance."""
    assert error(ours, theirs, where) < TOLERANCE
