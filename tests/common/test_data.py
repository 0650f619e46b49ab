"""Readers name the file and the line; the shuffler is a pure function of its position."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import IndexShuffler, read_records
from common.errors import UserError

ROWS = [{"id": f"r{i}", "text": "é" * i, "n": i} for i in range(4)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(params=[".jsonl", ".json", ".parquet"])
def records_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"data{request.param}"
    if request.param == ".jsonl":
        # A byte-order mark and blank lines are harmless.
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        write(path, b"\xef\xbb\xbf" + text.encode())
    elif request.param == ".json":
        write(path, json.dumps(ROWS))
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def test_reads_every_format(records_file: Path) -> None:
    assert read_records(records_file) == ROWS
    assert read_records(str(records_file), limit=2) == ROWS[:2]
    assert read_records(records_file, limit=99) == ROWS


GOOD = '{"a": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "holds no records"),
        ("a.jsonl", "\n \n", "holds no records"),
        ("a.json", "", "holds no records"),
        ("a.json", "[]", "holds no records"),
        ("a.jsonl", GOOD + '{"a": ', r"a\.jsonl:2: not valid JSON.*truncated"),
        ("a.jsonl", GOOD + "nonsense\n" + GOOD, r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", GOOD + "\n[1]\n", r"a\.jsonl:3: must be a JSON object, not a list"),
        ("a.jsonl", GOOD + "null\n", r"a\.jsonl:2: must be a JSON object, not null"),
        ("a.jsonl", GOOD.encode() + b'{"a": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json: not UTF-8"),
        ("a.json", '[{"a": 1},\n {"a"', r"a\.json:2: not valid JSON"),
        ("a.json", '{"a": 1}', "must hold one list of objects, not an object"),
        ("a.json", '[{"a": 1}, 3]', "record 1: must be a JSON object, not a number"),
        ("a.parquet", "PAR1 not really", "not a readable parquet file"),
        ("a.csv", "a,b", "unknown file type"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        read_records(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_directory_and_limit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(UserError, match="is a directory"):
        read_records(tmp_path / "d.jsonl")
    with pytest.raises(UserError, match="limit"):
        read_records(tmp_path / "none.jsonl", limit=-1)


def test_limit_stops_before_a_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD * 2 + "nonsense\n")
    assert len(read_records(path, limit=2)) == 2


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 200),
    parts=st.lists(st.integers(0, 60), min_size=1, max_size=4),
)
def test_shuffler_does_not_depend_on_how_it_is_read(
    size: int, seed: int, position: int, parts: list[int]
) -> None:
    shuffler = IndexShuffler(size, seed)
    whole = shuffler.indices(position, sum(parts))
    assert whole.dtype == np.int64
    pieces = []
    for n in parts:
        pieces.append(shuffler.indices(position, n))
        position += n
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    shuffler = IndexShuffler(50, seed=3)
    epochs = shuffler.indices(0, 150).reshape(3, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], IndexShuffler(50, seed=4).indices(0, 50))
    np.testing.assert_array_equal(epochs[1], IndexShuffler(50, seed=3).indices(50, 50))
    assert shuffler.epoch(75) == 1.5


def test_file_order() -> None:
    ordered = IndexShuffler(3, shuffle=False)
    assert ordered.indices(2, 5).tolist() == [2, 0, 1, 2, 0]


def test_shuffler_refuses_nonsense() -> None:
    with pytest.raises(UserError, match="no records"):
        IndexShuffler(0)
    with pytest.raises(UserError, match="seed"):
        IndexShuffler(3, seed=-1)
    with pytest.raises(ValueError, match="negative"):
        IndexShuffler(3).indices(-1, 2)
