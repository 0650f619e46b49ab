"""Intervals in closed form."""

import numpy as np
import pytest

from common.statistics import Z95, mean_interval, wilson_interval


def test_wilson_interval_in_closed_form() -> None:
    z2 = Z95 * Z95
    assert wilson_interval(0, 10) == pytest.approx((0.0, z2 / (10 + z2)))
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z2), 1.0))
    # The bounds solve (share - p)^2 = z^2 p (1 - p) / n.
    for successes, n in ((1, 3), (50, 100), (511, 512)):
        for p in wilson_interval(successes, n):
            assert (successes / n - p) ** 2 == pytest.approx(z2 * p * (1 - p) / n, rel=1e-9)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(50, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)


def test_mean_interval() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == pytest.approx((2.0, Z95 / np.sqrt(3)))
    assert mean - low == pytest.approx(high - mean)
    assert mean_interval([4.0]) == (4.0, 4.0, 4.0)
