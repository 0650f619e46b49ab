"""REOAC on MATH from end to end: training, evaluation by subject and level, preparation."""

import json
from pathlib import Path

import pytest

from tests.e2e.commands import SMALL, metrics, run

MATH = ("--config=configs/math.py:tiny", *SMALL, "--config.num_iterations=1")


@pytest.mark.slow
def test_train_and_evaluate_by_subject_and_level(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    done = run(f"--workdir={workdir}", *MATH, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((workdir / "eval_math.json").read_text())
    assert report["n"] == 5 and report["grading_timeouts"] == 0
    assert sum(row["n"] for row in report["by_subject"].values()) == 5
    assert sum(row["n"] for row in report["by_level"].values()) == 5
    assert metrics(workdir)[0]["grading_timeouts"] == 0
    output = tmp_path / "eval.json"
    again = run("--mode=eval", f"--checkpoint={workdir}", f"--output={output}", *MATH, timeout=900)
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads(output.read_text())["by_subject"] == report["by_subject"]


def test_prep_writes_records_of_both_splits(tmp_path: Path) -> None:
    rows = [
        {"problem": "1+1?", "solution": "\\boxed{2}", "level": "Level 1", "type": "Algebra"},
        {"problem": "", "solution": "\\boxed{2}", "level": "Level 1", "type": "Algebra"},
        {"problem": "2+1?", "solution": "\\boxed{3}", "level": "Level 2", "type": "Geometry"},
    ]
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(
        "--mode=prep",
        "--config=configs/math.py:e2d2",
        f"--config.dataset.raw_train_path={raw}",
        f"--config.dataset.raw_eval_path={raw}",
        REOAC_DATA_ROOT=str(tmp_path / "data"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "data/dataset/processed/math_test.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert [record["prompt"] for record in records] == ["1+1?", "2+1?"]
    assert {record["task"] for record in records} == {"math"}
    assert [record["metadata"]["level"] for record in records] == ["Level 1", "Level 2"]
    missing = run(
        "--config=configs/math.py:e2d2",
        "--config.eval.math_parser=maple",
        REOAC_DATA_ROOT=str(tmp_path),
    )
    assert missing.returncode == 2 and "maple" in missing.stderr
    assert "Traceback" not in missing.stderr
