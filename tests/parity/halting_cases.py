"""Recorded cases of the halting models, found by the kind that their files state."""

import functools
import json
from typing import Any, NamedTuple

import numpy as np

from tests.parity.fixtures import fixture_root


class Case(NamedTuple):
    """One recorded case: its name, its settings and its arrays by key."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays under `prefix/`, named without it."""
        skip = len(prefix) + 1
        return {k[skip:]: v for k, v in self.arrays.items() if k.startswith(f"{prefix}/")}


@functools.cache
def load_cases() -> tuple[Case, ...]:
    """All recorded cases that state their settings."""
    found = []
    for path in sorted((fixture_root() / "halting").glob("*.npz")):
        arrays = dict(np.load(path))
        if "meta_json" in arrays:
            found.append(Case(path.stem, json.loads(str(arrays.pop("meta_json"))), arrays))
    return tuple(found)


def cases(kind: str, **meta: Any) -> list[Case]:
    """The cases of a kind whose settings have these values."""
    wanted = {"kind": kind, **meta}
    return [c for c in load_cases() if all(c.meta.get(k) == v for k, v in wanted.items())]


def case_name(case: Any) -> str:
    """Test id of a case."""
    return case.name if isinstance(case, Case) else str(case)
