"""Run directories: atomic files, JSON lines after a crash, one writer at a time."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from common import rundir
from common.errors import UserError

NOW = datetime.datetime(2026, 2, 3, 4, 5, 6)


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    rundir.atomic_write(path, "é")
    rundir.atomic_write(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    assert os.listdir(path.parent) == ["file.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_atomic_write_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    rundir.atomic_write(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        rundir.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_json_is_strict_and_takes_arrays(tmp_path: Path) -> None:
    obj = {
        "a": np.float32(0.5),
        "b": jnp.arange(2),
        "c": float("nan"),
        "d": (1, True, None),
        "p": Path("x"),
        3: np.array([np.inf, 1.0]),
    }
    rundir.atomic_write_json(tmp_path / "a.json", obj)
    text = (tmp_path / "a.json").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    expected = {"a": 0.5, "b": [0, 1], "c": None, "d": [1, True, None], "p": "x", "3": [None, 1.0]}
    assert json.loads(text, parse_constant=refuse) == expected
    with pytest.raises(TypeError, match="object"):
        rundir.json_text({"a": object()})


def test_jsonl_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [{"i": i, "t": "a\nb"} for i in range(3)]
    for row in rows:
        rundir.append_jsonl(path, row)
    assert rundir.read_jsonl(path) == rows
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("torn", ['{"i": 2, "x', '{"i"', "\x00\x00\x00", "\x00\n", '{"i": 2}x\n'])
def test_torn_last_line_is_cut(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = '{"i": 0}\n{"i": 1}\n'
    path.write_text(good + torn)
    assert rundir.read_jsonl(path) == [{"i": 0}, {"i": 1}]
    assert path.read_text() == good + torn  # reading changes nothing
    assert rundir.repair_jsonl(path) == len(torn)
    assert path.read_text() == good
    assert rundir.repair_jsonl(path) == 0


def test_append_after_a_crash_does_not_glue_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"i": 0}\n{"i": 1, "x')
    rundir.append_jsonl(path, {"i": 2})
    assert rundir.read_jsonl(path) == [{"i": 0}, {"i": 2}]


def test_whole_row_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"i": 0}\n{"i": 1}')
    rundir.append_jsonl(path, {"i": 2})
    assert [row["i"] for row in rundir.read_jsonl(path)] == [0, 1, 2]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", '{"i":', "\xff"])
def test_bad_line_in_the_middle_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"i": 0}\n' + bad.encode("latin-1") + b'\n{"i": 1}\n')
    for call in (rundir.read_jsonl, rundir.repair_jsonl):
        with pytest.raises(UserError, match=r"rows\.jsonl:2:"):
            call(path)


def test_missing_jsonl(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        rundir.read_jsonl(tmp_path / "none.jsonl")
    assert rundir.repair_jsonl(tmp_path / "none.jsonl") == 0


def test_new_runs_and_latest(tmp_path: Path) -> None:
    first = rundir.RunDir.create(tmp_path, "exp", now=NOW)
    second = rundir.RunDir.create(tmp_path, "exp", now=NOW)
    assert first.path == tmp_path / "exp" / "20260203-040506"
    assert second.path == tmp_path / "exp" / "20260203-040506-2"
    assert rundir.RunDir.open(tmp_path / "exp" / "latest") == second
    assert os.readlink(tmp_path / "exp" / "latest") == second.path.name
    for directory in (first.checkpoints, first.samples, first.viz):
        assert directory.is_dir()
    assert first.metrics.name == "metrics.jsonl"
    assert first.config.parent == first.path


def test_workdir_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = rundir.RunDir.create("runs", "exp", workdir="mine")
    run.metrics.write_text('{"iteration": 0}\n')
    again = rundir.RunDir.create("runs", "exp", workdir="mine")
    assert run == again and again.path == tmp_path / "mine"
    assert again.metrics.exists()
    assert not (tmp_path / "runs").exists()


def test_run_directory_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the run directory .*file"):
        rundir.RunDir.create(tmp_path, "exp", workdir=tmp_path / "file")
    for name in ("", "a/b", ".."):
        with pytest.raises(UserError, match="one path component"):
            rundir.RunDir.create(tmp_path, name)
    with pytest.raises(UserError, match="no such run directory"):
        rundir.RunDir.open(tmp_path / "none")


HOLDER = """
import sys
from common.rundir import RunDir
with RunDir.open(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    run = rundir.RunDir.create(tmp_path, "exp", workdir=tmp_path / "w")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"being written by process {holder.pid} on"),
            run.lock(),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    # The lock died with its process.
    with run.lock(), pytest.raises(UserError, match=f"process {os.getpid()}"), run.lock():
        pass
    with run.lock():
        pass


@pytest.mark.parametrize(
    ("last", "torn"),
    [
        (b'{"i": 1', True),
        (b"{", True),
        (b"\0\0\0\0", True),  # blocks a crash left unwritten
        (b'{"i": 1\n', True),
        (b"PK\x03\x04 an archive", False),
        (b"[1", False),
    ],
)
def test_only_what_a_crash_leaves_is_cut(tmp_path: Path, last: bytes, torn: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"i": 0}\n' + last)
    if torn:
        assert rundir.read_jsonl(path) == [{"i": 0}]
        assert rundir.repair_jsonl(path) == len(last)
        assert path.read_bytes() == b'{"i": 0}\n'
        return
    for call in (rundir.read_jsonl, rundir.repair_jsonl):
        with pytest.raises(UserError, match=r"rows\.jsonl:2:.*remove or mend"):
            call(path)
    assert path.read_bytes() == b'{"i": 0}\n' + last


def test_rows_must_hold_their_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"i": 0}\n{"i": "1"}\n')
    assert len(rundir.read_jsonl(path)) == 2
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the row 'i' is a text"):
        rundir.read_jsonl(path, {"i": int})
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the row lacks 'j'"):
        rundir.read_jsonl(path, {"j": int})


def test_a_directory_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        rundir.read_jsonl(tmp_path / "rows.jsonl")
