"""The journal: commits, crashes, locks, shards, manifests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.rundir import read_jsonl
from qstar.writer import (
    VERSION,
    Journal,
    all_data_files,
    check_manifest,
    data_row,
    done_samples,
    output_paths,
    refuse_foreign,
    semantic_config,
    sort_output,
)


def row(idx: int, repeat: int = 0) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"q{idx} Löse\n"}]
    return data_row(messages, "answer", {"sample_idx": idx, "original_x": 1}, {"repeat": repeat})


def fill(output: Path, indices: list[int], **options: Any) -> None:
    with Journal(output, **options) as journal:
        for idx in indices:
            if (idx, 0) not in journal.done:
                journal.write(row(idx), {"sample_idx": idx, "alpha_mean": float("nan")})


def test_lines_and_resume(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    fill(output, [3, 1])
    fill(output, [1, 2, 3])
    rows = read_jsonl(output)
    assert [r["sample_idx"] for r in rows] == [3, 1, 2]
    assert rows[0]["messages"][-1] == {"role": "assistant", "content": "answer"}
    assert list(rows[0]) == ["messages", "sample_idx", "original_x", "repeat"]
    assert "Löse" in output.read_text(encoding="utf-8")
    diagnostics = read_jsonl(tmp_path / "out.diagnostics.jsonl")
    assert len(diagnostics) == 3 and diagnostics[0]["alpha_mean"] is None
    sort_output(output)
    assert [r["sample_idx"] for r in read_jsonl(output)] == [1, 2, 3]
    fill(output, [9], overwrite=True)
    assert done_samples(output) == {(9, 0)}


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_line_is_generated_again(tmp_path: Path, cut: int) -> None:
    output = tmp_path / "out.jsonl"
    fill(output, [0, 1])
    whole = output.read_bytes()
    output.write_bytes(whole[:-cut])
    with Journal(output) as journal:
        # A line that only lacks its newline is whole; anything shorter is cut.
        assert journal.done == ({(0, 0), (1, 0)} if cut == 1 else {(0, 0)})
        known = {r["sample_idx"] for r in read_jsonl(tmp_path / "out.diagnostics.jsonl")}
        assert known == {idx for idx, _ in journal.done}
    fill(output, [0, 1])
    assert output.read_bytes() == whole
    assert len(read_jsonl(tmp_path / "out.diagnostics.jsonl")) == 2


def test_diagnostics_without_their_sample_are_dropped(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    fill(output, [0])
    with open(tmp_path / "out.diagnostics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"sample_idx": 5, "alpha_mean": 0.1}\n{"sample_idx": 7, "al')
    fill(output, [5])
    found = read_jsonl(tmp_path / "out.diagnostics.jsonl")
    assert [(r["sample_idx"], r["alpha_mean"]) for r in found] == [(0, None), (5, None)]


def test_a_sample_whose_diagnostics_were_torn_is_generated_again(tmp_path: Path) -> None:
    # The machine died: the disk kept the data line, not the line that was written before it.
    output, beside = tmp_path / "out.jsonl", tmp_path / "out.diagnostics.jsonl"
    fill(output, [4, 0, 2])
    whole = output.read_bytes(), beside.read_bytes()
    beside.write_bytes(whole[1][:-5])
    with Journal(output) as journal:
        assert journal.done == {(4, 0), (0, 0)}
    fill(output, [4, 0, 2])
    assert (output.read_bytes(), beside.read_bytes()) == whole


def test_errors_are_tried_again(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(output) as journal:
        journal.write_error((4, 0), "prompt", "empty")
    path = output_paths(output)["errors"]
    assert read_jsonl(path) == [{"sample_idx": 4, "stage": "prompt", "message": "empty"}]
    with Journal(output) as journal:
        assert not path.exists() and (4, 0) not in journal.done


def test_shards_count_for_each_other(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    fill(output, [0, 2], shard=(0, 2))
    fill(output, [1], shard=(1, 2))
    assert len(all_data_files(output)) == 3
    with Journal(output, shard=(0, 3)) as journal:
        assert journal.done == {(0, 0), (1, 0), (2, 0)}


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(output), pytest.raises(UserError, match="another process"):
        Journal(output)
    Journal(output).close()


def test_a_killed_process_leaves_no_lock_and_no_half_line(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    program = (
        "import sys, os, signal; from qstar.writer import Journal, data_row;"
        "j = Journal(sys.argv[1]);"
        "[j.write(data_row([], 'x' * 9, {'sample_idx': i}), {'sample_idx': i}) for i in range(5)];"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(output)], check=False)
    assert done.returncode == -9
    with Journal(output) as journal:
        assert journal.done == {(i, 0) for i in range(5)}


def test_a_damaged_file_is_refused_and_the_lock_let_go(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("nonsense\n" + json.dumps(row(0)) + "\n")
    for _ in range(2):
        with pytest.raises(UserError, match="out.jsonl:1"):
            Journal(output)


def test_manifest(tmp_path: Path) -> None:
    path = tmp_path / "out.manifest.json"
    config = {"alpha": {"method": "entropy"}, "run": {"slots": 4, "repeats": 1}}
    check_manifest(path, {"config": semantic_config(config), "seed": 0})
    freely = {"alpha": {"method": "entropy"}, "run": {"slots": 8, "repeats": 1}}
    check_manifest(path, {"config": semantic_config(freely), "seed": 0})
    other = {"alpha": {"method": "fixed"}, "run": {"slots": 4, "repeats": 2}}
    with pytest.raises(UserError, match=r"config.alpha.method .*config.run.repeats"):
        check_manifest(path, {"config": semantic_config(other), "seed": 0})
    check_manifest(path, {"config": semantic_config(other), "seed": 0}, overwrite=True)
    check_manifest(path, {"config": semantic_config(other), "seed": 0})
    path.write_text("{")
    with pytest.raises(UserError, match="manifest"):
        check_manifest(path, {})


def test_an_output_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    refuse_foreign(output, (0, 1), {"seed": 0})  # nothing is there
    output.write_text('{"mine": 1}\n{"mi')
    with pytest.raises(UserError, match=r"out\.manifest\.json.*run\.output.*run\.overwrite"):
        refuse_foreign(output, (0, 1), {"seed": 0})
    check_manifest(tmp_path / "out.manifest.json", {"seed": 0})
    refuse_foreign(output, (0, 1), {"seed": 0})
    with pytest.raises(UserError, match="seed"):
        refuse_foreign(output, (0, 1), {"seed": 1})


def test_a_manifest_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.manifest.json"
    check_manifest(path, {"version": VERSION + 1})
    with pytest.raises(UserError, match=rf"format {VERSION + 1}, this version reads up to"):
        check_manifest(path, {"version": VERSION})


@pytest.mark.parametrize("left", ["", '{"sample_idx": 0}\n'])
def test_samples_whose_diagnostics_were_lost_are_made_again(tmp_path: Path, left: str) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(output) as journal:
        for index in range(3):
            journal.write(row(index), {"sample_idx": index})
    (tmp_path / "out.diagnostics.jsonl").write_text(left)  # cut between two lines
    with Journal(output) as journal:
        assert len(journal.done) == 3  # nobody asked for them
    with Journal(output, complete=("diagnostics",)) as journal:
        assert journal.done == ({(0, 0)} if left else set())
    assert len(read_jsonl(output)) == len(left.splitlines())
    (tmp_path / "out.diagnostics.jsonl").unlink()
    with Journal(output, complete=("diagnostics",)) as journal:
        assert len(journal.done) == len(left.splitlines())  # taken away by someone
