"""95 % intervals of proportions and means."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson score)."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): normal 95 % interval of a mean."""
    x = np.asarray(values, np.float64)
    half = Z95 * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else 0.0
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)
