"""The learning bench: real runs of the smallest config, tables, figures, and a file that grows."""

import json
from pathlib import Path

import pytest

from bench import halting_learning
from bench.halting_learning import Claim, is_met, main, merged

TINY = "configs/halting_copy.py:tiny"


@pytest.mark.slow
def test_a_run_is_made_once_and_its_figures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claims = {
        "one": Claim(TINY, "ood", "sequence_accuracy", bar=1.0),
        "other": Claim(TINY, "id", "char_accuracy", overrides=("--config.train.max_steps=10",)),
    }
    monkeypatch.setattr(halting_learning, "CLAIMS", claims)
    record, ponder, lengths = (tmp_path / name for name in ("r.json", "p.png", "l.png"))
    where = ["--runs", str(tmp_path / "runs"), "--seeds", "1"]
    outputs = ["--json", str(record), "--plot", str(ponder), "--lengths", str(lengths)]

    assert main(["--only", "one", *where, *outputs]) == 0
    assert "started one_seed0" in capsys.readouterr().out
    run = json.loads((tmp_path / "runs" / "one_seed0" / "eval.json").read_text())
    kept = json.loads(record.read_text())["claims"]["one"]
    assert kept["seeds"]["0"]["value"] == run["sets"]["ood"]["test/ood/sequence_accuracy"]
    assert kept["seeds"]["0"]["n"] == 16 and kept["seeds"]["0"]["steps"] == 20
    assert kept["met"] is False  # twenty steps teach nothing
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (ponder, lengths))

    assert main(["--only", "one,other", *where, *outputs]) == 0
    printed = capsys.readouterr().out
    assert "started other_seed0" in printed and "started one_seed0" not in printed
    both = json.loads(record.read_text())["claims"]
    assert both["one"] == kept and both["other"]["seeds"]["0"]["steps"] == 10
    assert both["other"]["seeds"]["0"]["recipe"] != kept["seeds"]["0"]["recipe"]


def test_seeds_of_an_older_recipe_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halting_learning, "CLAIMS", {"a": Claim(TINY, "id", "x", 0.5)})

    def claim(recipe: str, **values: float) -> dict[str, object]:
        seeds = {seed[1:]: {"value": value, "recipe": recipe} for seed, value in values.items()}
        return {"a": {"bar": 0.5, "seeds": seeds, "met": is_met(0.5, seeds)}}

    joined = merged(claim("old", s0=0.9, s1=0.9), claim("old", s2=0.8))["a"]
    assert list(joined["seeds"]) == ["0", "1", "2"] and joined["met"] is True
    replaced = merged(claim("old", s0=0.9, s1=0.9), claim("new", s2=0.8))["a"]
    assert list(replaced["seeds"]) == ["2"] and replaced["met"] is None
    assert merged(claim("old", s0=0.9), claim("old", s1=0.4))["a"]["met"] is False
