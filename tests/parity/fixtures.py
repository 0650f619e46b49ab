"""Where the parity fixtures lie."""

import os
from pathlib import Path


def fixture_root() -> Path:
    """Returns the directory that holds `reoac/`, `backbones/`: env PARITY_FIXTURES or our copy."""
    default = Path(__file__).resolve().parent.parent / "fixtures"
    return Path(os.environ.get("PARITY_FIXTURES") or default).resolve()
