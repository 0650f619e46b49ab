"""The run with a real model: what it asks, what it makes of the files, where it stops."""

import json
from pathlib import Path

import pytest

from bench import qstar_real
from bench.qstar_real import METHODS, file_name, format_table, questions, require_all, summarize
from common.errors import Interrupted, UserError


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_questions_and_hints_of_every_set(tmp_path: Path) -> None:
    own = questions("problems", None, 2)
    assert len(own) == 2 and "=" in own[0]["hint"] and "####" in own[0]["answer"]
    svamp = {"Body": "Ann has 3 pens.", "Question": "How many?", "Equation": "( 3.0 + 4.0 )"}
    write_lines(tmp_path / "svamp" / "test.jsonl", [svamp | {"Answer": 7.0}])
    (row,) = questions("svamp", tmp_path, 5)
    assert row["question"] == "Ann has 3 pens. How many?"
    assert row["hint"] == "3.0 + 4.0 = 7" and row["answer"] == "#### 7"
    write_lines(
        tmp_path / "gsm8k" / "test.jsonl", [{"question": "Why?", "answer": "1 + 1 = 2\n#### 2"}]
    )
    assert questions("gsm8k", tmp_path, 1)[0]["hint"] == "1 + 1 = 2"
    with pytest.raises(UserError, match="gsm8k"):
        questions("gsm8k", tmp_path / "absent", 1)
    qstar_real.write_rows(tmp_path / "rows.jsonl", own)
    first = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert first["messages"][-1]["content"] == own[0]["answer"] and first["hint"] == own[0]["hint"]


def test_a_run_is_summed_up_and_an_unfinished_one_is_told(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    answers = [("#### 7", "#### 7"), ("it is 8", "#### 7")]
    lines = [
        {"messages": [{"content": text}], "reference": gold, "n_tokens": 5, "sample_idx": i}
        for i, (text, gold) in enumerate(answers)
    ]
    write_lines(output, lines)
    record = {"alpha_mean": 0.4, "kl_theta_mean": 0.2, "kl_t_mean": None}
    write_lines(tmp_path / "a.diagnostics.jsonl", [record | {"log_ess_ratio_mean": 0.0}] * 2)
    write_lines(tmp_path / "a.metrics" / "metrics.jsonl", [{"speed/tokens_per_second": 3.0}])
    found = summarize(output)
    assert found["right"] == 1 and found["samples"] == 2 and found["tokens"] == 10
    assert found["ess_ratio_geometric"] == [1.0] * 3 and found["kl_t"] is None
    table = format_table({"problems/q*, entropy": found})
    assert "1/2 = 0.50" in table and "0.200 / " in table
    require_all(output, 2)
    with pytest.raises(Interrupted, match="2 of 3"):
        require_all(output, 3)
    assert file_name("q*, kl_symmetry") == "qstar_kl_symmetry" and len(METHODS) == 5


def test_bad_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bad in (["--sets", "none"], ["--questions", "0"], ["--sets", "svamp"]):
        with pytest.raises(SystemExit) as refused:
            qstar_real.main([*bad, "--work", str(tmp_path)])
        assert refused.value.code == 2
    assert "svamp/test.jsonl is missing" in capsys.readouterr().err
