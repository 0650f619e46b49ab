"""The same quantities written down in float64 NumPy, one row at a time."""

from collections.abc import Sequence

import numpy as np

LOW = -np.inf


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max()
    return shifted - np.log(np.sum(np.exp(shifted)))


def log_sum(x: np.ndarray) -> float:
    if not len(x) or x.max() == LOW:
        return LOW
    return float(x.max() + np.log(np.sum(np.exp(x - x.max()))))


def pair(x: np.ndarray, y: np.ndarray, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """b and d over the common columns."""
    with np.errstate(invalid="ignore"):
        a = log_softmax(np.asarray(x, np.float64) / temperature)
        b = log_softmax(np.asarray(y, np.float64) / temperature)
    common = np.isfinite(a) & np.isfinite(b)
    return b[common], (a - b)[common]


def log_z(b: np.ndarray, d: np.ndarray, s: float) -> float:
    return log_sum(b + s * d)


def mean_d(b: np.ndarray, d: np.ndarray, s: float) -> float:
    """K'(s)."""
    weight = b + s * d
    return float(np.sum(np.exp(weight - log_sum(weight)) * d))


def variance_d(b: np.ndarray, d: np.ndarray, s: float) -> float:
    weight = b + s * d
    q = np.exp(weight - log_sum(weight))
    return float(np.sum(q * (d - np.sum(q * d)) ** 2))


def kl_alpha(b: np.ndarray, d: np.ndarray) -> float:
    """Root of K' by 200 halvings, its sign taken in log space."""
    up, down = d > 0, d < 0
    low, high = 0.0, 1.0
    for _ in range(200):
        s = 0.5 * (low + high)
        positive = log_sum((b + s * d)[up] + np.log(d[up]))
        negative = log_sum((b + s * d)[down] + np.log(-d[down]))
        low, high = (low, s) if positive >= negative else (s, high)
    return 0.5 * (low + high)


def ess_alpha(b: np.ndarray, d: np.ndarray) -> float:
    """Root of K(-s) = K(2 - s) by 200 halvings."""
    low, high = 0.0, 1.0
    for _ in range(200):
        s = 0.5 * (low + high)
        low, high = (low, s) if log_z(b, d, -s) >= log_z(b, d, 2 - s) else (s, high)
    return 0.5 * (low + high)


def random_pair(
    rng: np.random.Generator, size: int, distance: float, scale: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 rows, `distance` apart in the standard deviation of their difference."""
    y = rng.normal(size=size) * scale
    return (
        (y + distance * rng.normal(size=size)).astype(np.float32),
        y.astype(np.float32),
    )


def random_pairs(
    rng: np.random.Generator, size: int, distances: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """One row per distance; [rows, size] each."""
    rows = [random_pair(rng, size, distance) for distance in distances]
    return np.stack([x for x, _ in rows]), np.stack([y for _, y in rows])
