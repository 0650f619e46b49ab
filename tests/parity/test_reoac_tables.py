"""Token tables against the recorded string predicates."""

import json

import numpy as np
import pytest

from reoac_jax.tables import Tables, build_tables
from reoac_jax.types import SpecialIds
from tests.parity.fixtures import fixture_root

FILES = sorted((fixture_root() / "reoac").glob("vocab_tables*.json"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def vocabulary(request: pytest.FixtureRequest) -> tuple[dict, Tables]:
    record = json.loads(request.param.read_text(encoding="utf-8"))
    return record, build_tables(record["tokens"], SpecialIds(**record["special"]))


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("num_full", "is_numeric_full"),
        ("op_char", "is_operator_char"),
        ("op_char", "op_is_operator"),
        ("has_digit", "op_has_digit"),
        ("tail", "tail_code"),
    ],
)
def test_predicates(vocabulary: tuple[dict, Tables], field: str, key: str) -> None:
    record, tables = vocabulary
    np.testing.assert_array_equal(
        np.asarray(getattr(tables, field)).astype(int), np.asarray(record[key])
    )


def test_case_groups(vocabulary: tuple[dict, Tables]) -> None:
    record, tables = vocabulary
    ours, theirs = np.asarray(tables.lower_id), np.asarray(record["lower_group"])
    np.testing.assert_array_equal(ours[:, None] == ours, theirs[:, None] == theirs)


def test_literals(vocabulary: tuple[dict, Tables]) -> None:
    record, tables = vocabulary
    naming: dict[int, str] = {}
    for row, expected in zip(np.asarray(tables.num_ids), record["token_numbers"], strict=True):
        found = [int(item) for item in row if item >= 0]
        assert len(found) == len(expected)
        for item, index in zip(found, expected, strict=True):
            text = record["number_strings"][index]
            assert naming.setdefault(item, text) == text
    assert len(set(naming.values())) == len(naming)


def test_special(vocabulary: tuple[dict, Tables]) -> None:
    record, tables = vocabulary
    assert set(np.flatnonzero(tables.special)) == set(record["special"].values())
    assert (tables.eos_id, tables.mask_id) == (
        record["special"]["eos_id"],
        record["special"]["mask_id"],
    )
