"""Tables of odd vocabularies, their cache; key tokens at sentence ends; the pace."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from reoac_jax.key_tokens import key_mask, key_spans
from reoac_jax.schedule import pace
from reoac_jax.tables import build_tables
from reoac_jax.types import SpecialIds

STRINGS = ["Ġ12", "12", "a", None, "a", "٣", "Ċ", "000", "100", None]
SPECIAL = SpecialIds(eos_id=3, pad_id=3, bos_id=-1, mask_id=9)


def test_ids_without_a_string_match_nothing() -> None:
    tables = build_tables(STRINGS, SPECIAL, vocab_size=14)
    assert tables.vocab_size == 14
    blank = [3, 9, 10, 11, 12, 13]
    for table in (tables.num_full, tables.op_char, tables.has_digit, tables.is_digits):
        assert not np.asarray(table)[blank].any()
    for groups in (tables.str_id, tables.lower_id):
        assert len(set(np.asarray(groups)[blank].tolist())) == len(blank)
    assert np.flatnonzero(tables.special).tolist() == [3, 9]


def test_equal_strings_share_an_identity() -> None:
    tables = build_tables(STRINGS, SPECIAL)
    assert tables.str_id[2] == tables.str_id[4]
    assert tables.str_id[0] != tables.str_id[1]
    stripped = build_tables(STRINGS, SPECIAL, "stripped")
    assert stripped.str_id[0] == stripped.str_id[1]
    assert bool(stripped.num_full[0]) and not bool(tables.num_full[0])


def test_digit_tables() -> None:
    tables = build_tables(STRINGS, SPECIAL)
    assert np.asarray(tables.is_digits)[[0, 1, 5, 7, 8]].all()
    assert np.asarray(tables.digit_value)[[0, 5, 7, 8]].tolist() == [12, 3, 0, 100]
    assert np.asarray(tables.digit_count)[[0, 5, 7, 8]].tolist() == [2, 1, 3, 3]
    assert np.asarray(tables.digit_zeros)[[0, 5, 7, 8]].tolist() == [0, 0, 3, 2]
    assert np.asarray(tables.starts_with_space)[[0, 1]].tolist() == [True, False]


def test_cache_is_used_and_keyed_by_its_inputs(tmp_path: Path) -> None:
    cache = str(tmp_path / "tables")
    first = build_tables(STRINGS, SPECIAL, cache_dir=cache)
    [stored] = Path(cache).iterdir()
    again = build_tables(STRINGS, SPECIAL, cache_dir=cache)
    np.testing.assert_array_equal(first.num_ids, again.num_ids)
    with np.load(stored) as arrays:
        changed = dict(arrays)
    changed["digit_value"] = changed["digit_value"] + 1
    np.savez(stored, **changed)
    assert int(build_tables(STRINGS, SPECIAL, cache_dir=cache).digit_value[1]) == 13
    build_tables(STRINGS, SPECIAL, "stripped", cache_dir=cache)
    assert len(list(Path(cache).iterdir())) == 2


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="tidy"):
        build_tables(STRINGS, SPECIAL, "tidy")
    with pytest.raises(UserError, match="mask_id"):
        build_tables(STRINGS, SPECIAL._replace(mask_id=10))


def test_sentence_final_numbers() -> None:
    text = "He has 15. She has 2.5. Version 1.2.3 of 7."
    assert not key_spans(text)
    found = [text[a:b] for a, b, _ in key_spans(text, sentence_final_numbers=True)]
    assert found == ["15", "2.5", "7"]
    assert key_mask(text, sentence_final_numbers=True, length=3).tolist() == [False, False, True]


def test_pace_finishes_in_time() -> None:
    for remaining in range(20):
        left = remaining
        for step in range(6):
            left -= int(pace(jnp.asarray([left]), 6 - step)[0])
        assert left == 0
    assert pace(jnp.asarray([5, 0]), 0).tolist() == [5, 0]
