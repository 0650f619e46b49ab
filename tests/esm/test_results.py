"""Journals, run directories, memories and tables: what is kept, found and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from esm import runs
from esm.compare import bootstrap_interval, compare, diagnose, mcnemar
from esm.datasets import TaskExample
from esm.grading import Grader
from esm.layers import resolve_layers
from esm.memory import load_memory, save_memory
from esm.methods import _elect
from esm.results import Results, read_rows
from esm.runs import Run, create, find_latest, point_latest
from esm.tiny import tiny_model


def _examples(count: int) -> list[TaskExample]:
    return [TaskExample("gsm8k", str(i), "?", f"#### {i}", {"split": "test"}) for i in range(count)]


def _row(number: int, correct: bool = True) -> dict[str, Any]:
    return {
        "task": "gsm8k",
        "example_id": str(number),
        "correct": correct,
        "pred": "1",
        "gold": "1",
        "tokens_used": 3 + number,
        "finish_reason": "stop",
        "text": "x",
    }


def test_a_journal_is_sorted_when_it_is_complete(tmp_path: Path) -> None:
    settings = {"a": 1}
    results = Results(tmp_path, settings, _examples(3))
    results.start()
    for number in (2, 0):
        results.add(_row(number))
    assert [example.id for example in results.missing] == ["1"]
    # A kill in the middle of a line loses that line only.
    with open(results.path, "a") as file:
        file.write('{"example_id": "1", "corr')
    again = Results(tmp_path, settings, _examples(3))
    assert [example.id for example in again.missing] == ["1"]
    again.add(_row(1, correct=False))
    summary = again.finish(max_tokens=9)
    assert [row["example_id"] for row in read_rows(tmp_path)] == ["0", "1", "2"]
    assert summary["n"] == 3 and summary["acc"] == pytest.approx(2 / 3)


def test_fewer_questions_do_not_lose_rows(tmp_path: Path) -> None:
    results = Results(tmp_path, {}, _examples(3))
    results.start()
    for number in range(3):
        results.add(_row(number))
    few = Results(tmp_path, {}, _examples(1))
    assert few.finish(9)["n"] == 1
    assert len(read_rows(tmp_path)) == 3


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    Results(tmp_path, {"online.k_scale": 0.5}, _examples(1)).start()
    with pytest.raises(UserError, match=r"online.k_scale: saved 0.5, now 0.7.*eval.tag"):
        Results(tmp_path, {"online.k_scale": 0.7}, _examples(1))


def _made(parent: Path, name: str, *parts: str) -> Run:
    run = Run(parent / name)
    create(run)
    note = json.loads((run.path / "run.json").read_text())
    note["created"] = name
    (run.path / "run.json").write_text(json.dumps(note))
    for part in parts:
        (run.path / part).mkdir()
        (run.path / part / "manifest.json").write_text("{}")
    return run


def test_latest_is_the_newest_run_that_has_what_is_needed(tmp_path: Path) -> None:
    _made(tmp_path, "1", "mine", "library", "memory")
    second = _made(tmp_path, "2", "mine")
    _made(tmp_path, "3")
    assert find_latest(tmp_path, "memory").path.name == "1"
    assert find_latest(tmp_path, "mine").path.name == "2"
    assert find_latest(tmp_path, None).path.name == "3"
    point_latest(second)
    assert find_latest(tmp_path, None).path.name == "2"
    assert find_latest(tmp_path, "memory").path.name == "1"
    with pytest.raises(UserError, match="--stage=select"):
        find_latest(tmp_path / "other", "library")
    assert runs.read_latest(tmp_path) == "2"


def _stored(directory: Path, normalize: bool = True, count: int = 3) -> np.ndarray:
    keys = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    rows = [
        {"tool_id": i, "tool_name": f"t{i}", "layer": 1, "control_point_m": 1, "quality": 1.0,
         "has_vector": i > 0, "entry_type": "wrong" if i else "right", "pair_id": i // 2,
         "reward_gap": 1.0, "r_pos_mean": 1.0, "r_neg_mean": 0.0, "n_pos": 1, "n_neg": 1}
        for i in range(count)
    ]  # fmt: skip
    manifest = {
        "digest": "d", "layers": [1], "num_layers": 2, "M": 2, "mined": [], "delimiter": "\n",
        "model": {"name": "m", "digest": "d"}, "prompt": {"hash": "h", "template": "t"},
    }  # fmt: skip
    save_memory(directory, keys, np.ones((count, 4), np.float32), rows, manifest, normalize)
    return keys


def test_a_memory_is_normalised_however_it_is_stored(tmp_path: Path) -> None:
    keys = _stored(tmp_path, normalize=False)
    np.testing.assert_array_equal(np.load(tmp_path / "keys.npy"), keys)
    memory, manifest = load_memory(tmp_path)
    np.testing.assert_allclose(np.linalg.norm(memory.keys, axis=1), 1, atol=1e-6)
    assert manifest["digest"] == "d" and memory.is_null.tolist() == [True, False, False]


def test_an_empty_memory_is_stored(tmp_path: Path) -> None:
    _stored(tmp_path)
    _stored(tmp_path, count=0)
    memory, manifest = load_memory(tmp_path)
    assert memory.keys.shape == (0, 4) and manifest["entries"] == 0
    assert not (tmp_path / "checkpoint").exists()  # that of the three before


def test_damaged_memories_are_refused(tmp_path: Path) -> None:
    _stored(tmp_path)
    np.save(tmp_path / "keys.npy", np.ones((2, 4), np.float32))
    with pytest.raises(UserError, match="3 entries and keys"):
        load_memory(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 0}))
    with pytest.raises(UserError, match="format 0"):
        load_memory(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(UserError, match=r"format 2, this version reads up to 1.*--stage=memory"):
        load_memory(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="--stage=memory"):
        load_memory(tmp_path)


def test_intervals_and_mcnemar() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(1, 1) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(600, 400) == pytest.approx(mcnemar(599, 400), rel=0.2)
    values = np.random.default_rng(0).normal(0.3, 1.0, 400)
    low, high = bootstrap_interval(values, 2000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap_interval(np.asarray([]), 10) == (0.0, 0.0)


def test_tables_of_nothing() -> None:
    assert compare([], [], 8)["acc_diff"] == 0.0
    assert diagnose("greedy", [])["n"] == 0


def test_the_majority_decides_and_ties_go_to_the_first() -> None:
    [example] = _examples(1)
    texts = ["#### 7", "#### 0", "no idea", "#### 0", "#### 7"]
    with Grader("gsm8k_0shot", "strict", 2) as grader:
        for number, text in enumerate(texts):
            row = {**_row(0), "sample": number, "text": text, "truncated": False}
            grader.submit({**row, "prefill_tokens": 5}, example, text, "length")
        ballot = [(r.pop("sample"), r, v) for r, v in grader.done(wait=True)]
    elected = _elect(list(reversed(ballot)))
    assert elected["pred"] == "7" and elected["correct"] is False
    assert elected["votes"] == {"7": 2, "0": 2} and elected["tokens_used"] == 15


def test_layers_say_what_is_wrong() -> None:
    with pytest.raises(UserError, match="layer 1.5 is no layer of a model with 28 layers"):
        resolve_layers([1.5], 28)


def test_the_tiny_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from common.lm.tokenizers import load_tokenizer, token_bytes

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tiny_model()
    assert tiny_model() == path and path.is_relative_to(tmp_path)
    pieces = token_bytes(load_tokenizer(path))
    assert b"\n\n" in pieces and len(pieces) == 260
