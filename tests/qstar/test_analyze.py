"""The analysis survives what a killed run leaves, and draws its pictures."""

import json
from pathlib import Path

import pytest

from qstar.analyze import analyze, main


def make(path: Path, count: int, shift: float = 0.0) -> Path:
    rows = [
        {
            "sample_idx": i,
            "alpha_mean": 0.4 + 0.01 * i + shift,
            "ess_ratio_mean": 1.0 + 0.01 * i if i % 3 else None,
            "kl_theta_mean": 0.2,
            "kl_t_mean": 0.21,
            "finish_reason": "stop",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_nulls_missing_fields_and_torn_lines(tmp_path: Path) -> None:
    path = make(tmp_path / "a.diagnostics.jsonl", 5)
    with open(path, "a", encoding="utf-8") as file:
        file.write('[1]\n{"alpha_mean": NaN, "kl_t_mean": true}\n{"alpha_me')
    report = analyze(path)
    assert report["samples"] == 6
    assert abs(report["statistics"]["alpha_mean"]["mean"] - 0.42) < 1e-12
    assert report["statistics"]["ess_ratio_mean"]["max"] == 1.04
    assert "finish_reason" not in report["statistics"] and "sample_idx" not in report["statistics"]
    assert report["checks"]["kl_symmetry_ok"] and report["checks"]["alpha_ok"]
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert analyze(empty)["checks"]["alpha_ok"] is None


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [make(tmp_path / "a.diagnostics.jsonl", 5), make(tmp_path / "b.jsonl", 4, 0.5)]
    (tmp_path / "empty.jsonl").touch()
    files.append(tmp_path / "empty.jsonl")
    target = tmp_path / "summary.json"
    assert main([*map(str, files), "--no_plots", "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert out.index("ESS ratio") < out.index("a.diagnostics.jsonl: 5 samples")
    assert "outside the expected range" in out and "not recorded" in out
    assert [r["samples"] for r in json.loads(target.read_text())["files"]] == [5, 4, 0]
    assert main([str(tmp_path / "none.jsonl"), "--no_plots"]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = make(tmp_path / "a.diagnostics.jsonl", 6)
    folder = tmp_path / "pictures"
    assert main([str(path), "--output_dir", str(folder)]) == 0
    names = {p.name for p in folder.iterdir()}
    assert names == {"distributions.png", "evolution.png", "alpha_vs_ess.png"}
