"""Attacks that must fail: pickles with code, archives with foreign paths, answers that compute."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.answers.pool import GradingPool
from common.errors import UserError


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory that exists only after code from a file was run."""
    return tmp_path / "was_run"


def malicious_zip(trap: Path) -> bytes:
    """A torch archive (a zip with a pickle in it) whose pickle runs code."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Payload(trap)}, protocol=2))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["legacy", "zip"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_a_malicious_pickle_is_refused(tmp_path: Path, trap: Path, kind: str, name: str) -> None:
    from common.torch_bridge import read_tensors

    path = tmp_path / name
    path.write_bytes(
        pickle.dumps({"weight": Payload(trap)}) if kind == "legacy" else malicious_zip(trap)
    )
    with pytest.raises(UserError) as error:
        read_tensors(path)
    assert "\n" not in str(error.value) and name in str(error.value)
    assert not trap.exists()


def test_the_payload_would_have_worked(trap: Path) -> None:
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.is_dir()


def test_arrays_with_objects_are_refused(tmp_path: Path, trap: Path) -> None:
    from halting_jax.datasets.maze_files import load_maze

    array = np.empty(1, object)
    array[0] = Payload(trap)
    folder = tmp_path / "train"
    folder.mkdir()
    np.save(folder / "all__inputs.npy", array, allow_pickle=True)
    (folder / "dataset.json").write_text('{"seq_len": 9, "vocab_size": 6, "sets": ["all"]}')
    with pytest.raises(UserError):
        load_maze(tmp_path, "train")
    with pytest.raises(ValueError):
        np.load(folder / "all__inputs.npy")  # the default of every call without the argument
    assert not trap.exists()


@pytest.mark.torch
def test_an_archive_with_foreign_paths_writes_nothing_outside(tmp_path: Path, trap: Path) -> None:
    # Archives (torch files, npz) are read by member and never unpacked.
    from common.torch_bridge import read_tensors

    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("pytorch_model.bin", "tables.npz"):
        with zipfile.ZipFile(inside / name, "w") as archive:
            for member in ("../was_run/evil.npy", f"{tmp_path}/was_run/evil.npy", "../data.pkl"):
                archive.writestr(member, b"x")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(UserError):
        read_tensors(inside / "pytorch_model.bin")
    with np.load(inside / "tables.npz") as stored:
        assert all(stored[member] == b"x" for member in stored.files)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before and not trap.exists()


ANSWERS = {
    "tower": "9**9**9**9",
    "power of powers": "\\boxed{10^{10^{10^{10}}}}",
    "factorial": "(((9!)!)!)!",
    "binomial": "\\boxed{\\binom{10^9}{5*10^8}}",
    "nesting": "(" * 20000 + "1" + ")" * 20000,
    "digits": "9" * 300_000,
    "code": "__import__('os').mkdir('TRAP')",
    "attribute": "().__class__.__base__.__subclasses__()",
    "format": "{0.__class__}%s%n" * 50,
    "pattern": "a" * 40000 + "!",
    "fraction": "\\frac{" * 3000 + "1",
}


@pytest.mark.parametrize("task", ["gsm8k", pytest.param("math500", marks=pytest.mark.slow)])
def test_answers_are_read_not_run(trap: Path, task: str) -> None:
    """Bombs end within their time limit, count as wrong, and the pool goes on grading."""
    texts = [text.replace("TRAP", str(trap)) for text in ANSWERS.values()]
    options = {"task": task}
    grader = "tests.security.graders:grade"
    with GradingPool(num_workers=1, time_limit_s=3.0, grader=grader) as pool:
        verdicts = pool.submit([(text, "42", options) for text in texts]).result()
        (good,) = pool.submit([("\\boxed{42}", "42", options)]).result()
    assert [v.score for v in verdicts] == [0.0] * len(texts)
    assert good.score == 1.0
    assert not trap.exists()
