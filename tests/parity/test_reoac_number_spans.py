"""Numbers across tokens against the text-level truth."""

import json
from decimal import Decimal

import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.numbers import number_spans
from tests.parity.reoac_vocabulary import load_tables, reoac_files

CASES = [
    case
    for path in reoac_files("number_spans*.json")
    for case in json.loads(path.read_text(encoding="utf-8"))["cases"]
]


def expected_value(text: str) -> tuple[int, int]:
    sign, digits, exponent = Decimal(text).normalize().as_tuple()
    assert sign == 0 and isinstance(exponent, int)
    mantissa = int("".join(map(str, digits)))
    if exponent > 0:
        mantissa, exponent = mantissa * 10**exponent, 0
    return mantissa % 2**32, -exponent


@pytest.mark.parametrize("padding", [0, 3])
def test_spans(padding: int) -> None:
    assert CASES
    tables = load_tables()
    width = max(len(case["ids"]) for case in CASES) + padding
    ids = np.zeros((len(CASES), width), np.int32)
    # Padding is filled with digits: it must not matter.
    digit = int(np.flatnonzero(tables.is_digits)[0])
    valid = np.zeros(ids.shape, bool)
    for row, case in enumerate(CASES):
        ids[row] = digit
        ids[row, : len(case["ids"])] = case["ids"]
        valid[row, : len(case["ids"])] = True
    spans = number_spans(tables, jnp.asarray(ids), jnp.asarray(valid))
    for row, case in enumerate(CASES):
        first = np.flatnonzero(spans.is_first[row])
        last = np.flatnonzero(spans.is_last[row])
        assert list(zip(first, last, strict=True)) == [(a, b) for a, b, _ in case["spans"]], case
        inside = np.zeros(width, bool)
        for start, end, text in case["spans"]:
            inside[start : end + 1] = True
            for column in range(start, end + 1):
                found = int(spans.mantissa[row, column]), int(spans.scale[row, column])
                assert found == expected_value(text), (case, text)
        np.testing.assert_array_equal(spans.in_run[row], inside)
