"""The vocabulary that the recorded cases are written in."""

import functools
import json
from pathlib import Path

from reoac_jax.tables import Tables, build_tables
from reoac_jax.types import SpecialIds
from tests.parity.fixtures import fixture_root


def reoac_files(pattern: str) -> list[Path]:
    """Fixture files of this system that match a pattern."""
    return sorted((fixture_root() / "reoac").glob(pattern))


@functools.cache
def load_tables(strings_mode: str = "raw") -> Tables:
    """Tables of the recorded vocabulary."""
    path = fixture_root() / "reoac" / "vocab_tables.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    return build_tables(record["tokens"], SpecialIds(**record["special"]), strings_mode)
