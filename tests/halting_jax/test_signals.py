"""Sinusoid tables against their formula."""

import math

import numpy as np
import pytest

from common.errors import UserError
from halting_jax.signals import grid_sinusoids, make_signals, sinusoids


@pytest.mark.parametrize(("length", "channels"), [(7, 8), (40, 10), (3, 2)])
def test_formula(length: int, channels: int) -> None:
    table, half = sinusoids(length, channels), channels // 2
    assert table.shape == (length, channels) and table.dtype == np.float32
    for position in range(length):
        for i in range(half):
            angle = position * math.exp(-i * math.log(1e4) / max(half - 1, 1))
            assert table[position, i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, half + i] == pytest.approx(math.cos(angle), abs=1e-5)


def test_odd_and_single_channels() -> None:
    odd = sinusoids(5, 7)
    np.testing.assert_array_equal(odd[:, :6], sinusoids(5, 6))
    np.testing.assert_array_equal(odd[:, 6], 0)
    np.testing.assert_array_equal(sinusoids(4, 1), 0)


def test_a_longer_table_extends_a_shorter_one() -> None:
    np.testing.assert_array_equal(sinusoids(9, 12)[:6], sinusoids(6, 12))


def test_cached_tables_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        sinusoids(5, 8)[0, 0] = 1


def test_grid_tells_rows_and_columns() -> None:
    side, channels = 5, 9
    table = grid_sinusoids(side, channels).reshape(side, side, channels)
    rows, columns = table[..., :4], table[..., 4:]
    np.testing.assert_array_equal(rows, np.repeat(rows[:, :1], side, axis=1))
    np.testing.assert_array_equal(columns, np.repeat(columns[:1], side, axis=0))
    np.testing.assert_array_equal(rows[:, 0], sinusoids(side, 4))
    np.testing.assert_array_equal(columns[0], sinusoids(side, 5))
    assert len(np.unique(table.reshape(-1, channels), axis=0)) == side * side


def test_make_signals() -> None:
    signals = make_signals(9, 6, 4)
    np.testing.assert_array_equal(signals.position, sinusoids(9, 6))
    np.testing.assert_array_equal(signals.hop, sinusoids(4, 6))
    square = make_signals(9, 6, 4, "2d")
    np.testing.assert_array_equal(square.position, grid_sinusoids(3, 6))
    with pytest.raises(UserError, match="square"):
        make_signals(8, 6, 4, "2d")
    with pytest.raises(UserError, match=r"ut\.pos"):
        make_signals(9, 6, 4, "3d")
