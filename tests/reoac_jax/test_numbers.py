"""Span numbers of random token rows against the numbers read from their text."""

import re
from decimal import Decimal

import jax.numpy as jnp
import numpy as np

from reoac_jax.numbers import number_spans
from reoac_jax.tables import build_tables
from reoac_jax.types import SpecialIds

STRINGS = ["0", "00", "7", "12", "340", "Ġ5", "Ġ10", ".", ",", "Ġ", "word", "<eos>", "<mask>"]
TABLES = build_tables(STRINGS, SpecialIds(11, 11, 11, 12))


def numbers_of(text: str) -> list[Decimal]:
    """Digit runs joined by "." and "," under the same rules, on characters."""
    found: list[tuple[str, str, int]] = []  # digits, how joined, end
    values: list[Decimal] = []
    for match in re.finditer(r"\d+", text):
        glue = ""
        if found and match.start() == found[-1][2] + 1:
            digits, joined, _ = found[-1]
            between = text[match.start() - 1]
            comma = between == "," and joined != "." and len(digits) <= 3
            if between == "." and joined != ".":
                glue = "."
            elif comma and len(match.group()) == 3:
                glue = ","
        if glue == ".":
            # Rounding of decimals must not enter: build the text again.
            values[-1] = Decimal(f"{values[-1]:f}.{match.group()}")
        elif glue == ",":
            values[-1] = Decimal(f"{values[-1]:f}{match.group()}")
        else:
            values.append(Decimal(match.group()))
        found.append((match.group(), glue, match.end()))
    return values


def canonical(value: Decimal) -> tuple[int, int]:
    _, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    mantissa, scale = int("".join(map(str, digits))), -exponent
    while scale > 0 and mantissa % 10 == 0:
        mantissa, scale = mantissa // 10, scale - 1
    return mantissa % 2**32, scale


def test_random_rows() -> None:
    rng = np.random.default_rng(0)
    ids = rng.choice(len(STRINGS) - 2, (400, 14), p=[0.1, 0.05, *[0.1] * 3, 0.05, 0.05, 0.2, 0.15,
                                                     0.05, 0.05])  # fmt: skip
    spans = number_spans(TABLES, jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, bool))
    several = 0
    for row in range(len(ids)):
        text = "".join(STRINGS[i] for i in ids[row]).replace("Ġ", " ")
        wanted = [canonical(value) for value in numbers_of(text)]
        last = np.flatnonzero(spans.is_last[row])
        found = [(int(spans.mantissa[row, j]), int(spans.scale[row, j])) for j in last]
        assert found == wanted, text
        several += any(scale for _, scale in wanted)
    assert several > 50


def test_an_invalid_token_separates_numbers() -> None:
    ids = jnp.asarray([[3, 3, 3]], jnp.int32)
    spans = number_spans(TABLES, ids, jnp.asarray([[True, False, True]]))
    assert spans.mantissa[0].tolist() == [12, 0, 12]
    assert (
        number_spans(TABLES, jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 0), bool)).in_run.size == 0
    )
