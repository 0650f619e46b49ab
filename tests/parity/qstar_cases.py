"""Reading the recorded q* cases."""

import json
import re
from typing import Any, NamedTuple

import numpy as np

from tests.parity.fixtures import fixture_root

ROOT = fixture_root() / "qstar"
SPECIAL_NUMBERS = {"-inf": -np.inf, "inf": np.inf, "nan": np.nan}


def numbers(values: list[Any]) -> np.ndarray:
    """Floats in which -inf, inf and nan are written as strings."""
    return np.array([SPECIAL_NUMBERS[v] if isinstance(v, str) else v for v in values])


def read(name: str) -> Any:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


class SmallPairs:
    """Arrays of pairs_small.npz for one vocabulary size."""

    def __init__(self, size: int) -> None:
        self.arrays = np.load(ROOT / "pairs_small.npz")
        self.size = size
        self.theta = self.arrays[f"v{size}_logits_theta"]
        self.t = self.arrays[f"v{size}_logits_t"]

    def get(self, name: str) -> np.ndarray:
        return np.asarray(self.arrays[f"v{self.size}_{name}"])

    def has(self, name: str) -> bool:
        return f"v{self.size}_{name}" in self.arrays

    def fixed_alphas(self) -> list[float]:
        """Exponents other than the solved one for which references are stored."""
        pattern = re.compile(rf"v{self.size}_ref_fixed([0-9.]+)_log_z")
        return [float(m[1]) for name in self.arrays.files if (m := pattern.fullmatch(name))]


def temperatures() -> list[float]:
    return [float(t) for t in np.load(ROOT / "pairs_small.npz")["temperatures"]]


def small_sizes() -> list[int]:
    """Vocabulary sizes with references per temperature."""
    names = np.load(ROOT / "pairs_small.npz").files
    found = {int(m[1]) for n in names if (m := re.fullmatch(r"v(\d+)_ref_jeffreys", n))}
    return sorted(found)


def two_token_sizes() -> list[int]:
    """Vocabulary sizes with references at temperature 1 alone (the closed form)."""
    names = np.load(ROOT / "pairs_small.npz").files
    found = {int(m[1]) for n in names if (m := re.fullmatch(r"v(\d+)_ref_alpha_kl", n))}
    return sorted(found - set(small_sizes()))


def large_rows() -> list[dict[str, Any]]:
    return list(read("pairs_large.json")["rows"])


class Pairs(NamedTuple):
    """Logits of both models, [N, V] each."""

    theta: np.ndarray
    t: np.ndarray


def generate_row(row: dict[str, Any]) -> Pairs:
    """Logits of pi_theta and pi_t by the recipe in pairs_large.json."""
    rs, size = np.random.RandomState(row["seed"]), row["V"]
    u, w = rs.standard_normal(size), rs.standard_normal(size)
    rank = rs.permutation(size)
    t = np.float32(row["sigma"] * u - row["zipf"] * np.log1p(np.float64(rank)))
    theta = np.float32(row["rho"] * np.float64(t) + row["noise"] * w)
    if row["spike_t"] != 0:
        t[rs.randint(0, size)] += np.float32(row["spike_t"])
    if row["spike_theta"] != 0:
        theta[rs.randint(0, size)] += np.float32(row["spike_theta"])
    return Pairs(theta[None], t[None])


def check_alpha(
    found: np.ndarray,
    wanted: np.ndarray,
    jeffreys: np.ndarray,
    sd: np.ndarray,
    double: bool,
    where: str,
    noise: np.ndarray | float = 0.0,
) -> None:
    """The stated tolerance: alpha itself where the models differ, else its effect on q.

    `noise` is what the reference itself may be off by.
    """
    error = np.abs(np.asarray(found, np.float64) - wanted) - noise
    if double:
        apart = jeffreys >= 1e-3
        assert np.all(error[apart] <= 1e-9), (where, error[apart].max())
        return
    apart = jeffreys >= 0.1
    assert np.all(error[apart] <= 1e-5), (where, error[apart].max())
    assert np.all((error * sd)[~apart] <= 2e-4), (where, (error * sd)[~apart].max())


def close(found: Any, wanted: Any, rate: float, where: Any) -> None:
    """|found - wanted| <= rate (1 + |wanted|)."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    error = np.abs(found - wanted) - rate * (1 + np.abs(wanted))
    assert np.all(error <= 0), (where, found[error > 0], wanted[error > 0])
