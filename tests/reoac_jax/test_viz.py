"""Tables and pictures of a run, drawn from a small run directory made here."""

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.rundir import RunDir, append_jsonl, atomic_write_json
from reoac_jax.types import OPERATORS as ALL_OPERATORS
from reoac_jax.viz import (
    energy_map_csv,
    loss_curves,
    operator_usage,
    pca_project,
    run_viz,
    usage_curves,
)
from reoac_jax.viz_episode import episode_page

PNG = b"\x89PNG\r\n\x1a\n"
OPERATORS = ("O_NUM", "O_OP", "O_NUM", "O_FAST", "O_SCOPE", "O_NUM")


def _sample(index: int) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    return {
        "prompt": "p",
        "final_text": "t",
        "reward": 1.0,
        "cost": 2.0,
        "operator_id": OPERATORS[index],
        "feature_vector": rng.normal(size=11).tolist(),
        # The first sample has none, as under fast_critic.
        "relation": None if index == 0 else rng.uniform(0.1, 1.0, size=(9, 14)).tolist(),
    }


def _traced(index: int) -> dict[str, Any]:
    """A sample of two decisions: one writes `<b>` and a newline, one masks the first again."""
    trace = {
        "decisions": [
            {
                "operator": "O_FAST",
                "cost": 2.0,
                "canvas": [9, 9, 9],
                "written": [0, 2],
                "confidence": [0.25, 0.5, 1.0],
            },
            {
                "operator": "O_SCOPE",
                "cost": 1.0,
                "canvas": [3, 9, 4],
                "written": [],
                "confidence": [0.1, 0.2, 0.3],
            },
        ],
        "final": [9, 9, 4],
        "mask_id": 9,
        "pieces": {"3": "<b>", "4": "\n", "9": ""},
    }
    return {**_sample(index), "gold": "#### 1 & 2", "trace": trace}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path, "drawn", tmp_path / "run")
    for index in range(len(OPERATORS)):
        atomic_write_json(run.samples / f"iter0_step{index}.json", _sample(index))
    for iteration in range(8):
        row: dict[str, Any] = {
            "iteration": iteration,
            "critic_loss": 1 / (iteration + 1),
            "actor_loss": 1.5,
        }
        row["backbone_loss"] = None if iteration == 3 else 0.5 + 0.1 * iteration
        row["total_loss"] = 2.0 + 0.05 * iteration
        append_jsonl(run.metrics, {**row, "episodes": 8})
        append_jsonl(run.metrics, {"iteration": iteration, "eval/accuracy": 0.1})
    return run


def test_every_output_of_the_table(run: RunDir) -> None:
    written = run_viz(run.path)
    assert {path.name for path in written} == {
        *("energy_map.csv", "energy_map.png", "features.json", "embedding_proj.csv"),
        *("embedding_proj.png", "operator_usage.json", "operator_usage.png"),
        *("loss.csv", "loss.png"),
    }
    assert all(path.parent == run.viz for path in written)
    for path in run.viz.glob("*.png"):
        assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000
    cells = [line.split(",") for line in (run.viz / "energy_map.csv").read_text().splitlines()]
    assert all(len(cell.partition(".")[2]) == 6 for row in cells for cell in row)
    np.testing.assert_allclose(np.array(cells, float), _sample(1)["relation"], atol=5e-7)
    features = json.loads((run.viz / "features.json").read_text())["features"]
    assert features == [_sample(i)["feature_vector"] for i in range(6)]
    header, *points = csv.reader((run.viz / "embedding_proj.csv").open())
    assert header == ["principal_component_1", "principal_component_2"]
    np.testing.assert_allclose(np.array(points, float), pca_project(features), atol=5e-7)
    usage = json.loads((run.viz / "operator_usage.json").read_text())
    assert usage == {"O_NUM": 3, "O_OP": 1, "O_FAST": 1, "O_SCOPE": 1}
    header, *rows = csv.reader((run.viz / "loss.csv").open())
    assert header == ["iteration", "critic_loss", "actor_loss", "backbone_loss", "total_loss"]
    assert len(rows) == 8 and rows[3] == ["3", "0.25", "1.5", "", "2.15"]


def test_episode_page_shows_what_every_decision_did() -> None:
    page = episode_page(_traced(1), "Episode <1>")
    assert page.count("<li>") == 3 and "Episode &lt;1&gt;" in page and "#### 1 &amp; 2" in page
    start, first, second = page.split("<li>")[1:]
    assert start.count("t mask") == 3
    assert "O_FAST" in first and first.count('class="t new"') == 2 and first.count("t mask") == 1
    # Fuller the surer, with the number to hover; tokens are text, never markup.
    assert 'title="0.250"' in first and 'title="1.000"' in first
    assert first.index("0.18)") < first.index("0.50)")
    assert "&lt;b&gt;" in first and "<b>" not in page and "\\n</span>" in first
    assert "O_SCOPE" in second and second.count("mask undone") == 1 and "t new" not in second
    assert "http" not in page.replace("http-equiv", "")


def test_pages_and_operators_over_training(run: RunDir) -> None:
    atomic_write_json(run.samples / "iter5_step0.json", _traced(1))
    shares = dict(zip(ALL_OPERATORS, (0.1, 0.2, 0.3, 0.0, 0.4), strict=True))
    append_jsonl(run.metrics, {"iteration": 9, **{f"operator/{k}": v for k, v in shares.items()}})
    written = {str(path.relative_to(run.viz)) for path in run_viz(run.path)}
    assert {p for p in written if p.endswith("html")} == {"episodes/iter5_step0.html"}
    assert {"operator_training.csv", "operator_training.png"} <= written
    header, row = csv.reader((run.viz / "operator_training.csv").open())
    assert header == ["iteration", *ALL_OPERATORS]
    assert row == ["9", *(f"{share:.9g}" for share in shares.values())]
    assert usage_curves([{"iteration": 1}]) == {"iteration": [], **{n: [] for n in ALL_OPERATORS}}
    damaged = _traced(1)
    del damaged["trace"]["pieces"]["3"]
    atomic_write_json(run.samples / "iter5_step0.json", damaged)
    with pytest.raises(UserError, match="iter5_step0.json: its trace is damaged"):
        run_viz(run.path)


def test_chosen_sample_and_directory(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere"
    for sample in ("iter0_step2.json", run.samples / "iter0_step2.json"):
        run_viz(run.path, sample, out)
        assert (out / "energy_map.csv").read_text() == energy_map_csv(_sample(2)["relation"])
    assert not list(run.viz.iterdir())


def test_without_matplotlib_tables_only(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    names = {path.suffix for path in run_viz(run.path)}
    assert names == {".csv", ".json"}


def test_partial_runs(run: RunDir) -> None:
    run.metrics.unlink()
    assert not any(path.stem == "loss" for path in run_viz(run.path))
    for path in run.samples.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="nothing to draw"):
        run_viz(run.path)
    atomic_write_json(run.samples / "a.json", {**_sample(0), "feature_vector": [1.0]})
    assert {path.name for path in run_viz(run.path)} >= {"features.json", "operator_usage.json"}


def test_errors(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        run_viz(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--sample=missing.json"):
        run_viz(run.path, "missing.json")
    with pytest.raises(UserError, match="save_relation"):
        run_viz(run.path, "iter0_step0.json")
    broken = run.samples / "iter0_step1.json"
    for content, message in [
        ("{", "is damaged: not valid JSON"),
        ("[]", "a list, not an object"),
        (json.dumps({**_sample(1), "relation": [[1.0], [1.0, 2.0]]}), "rectangle"),
        (json.dumps({**_sample(1), "feature_vector": [1.0]}), "feature_vector"),
    ]:
        broken.write_text(content)
        with pytest.raises(UserError, match=message):
            run_viz(run.path)
    (tmp_path / "file").write_text("")
    broken.unlink()
    with pytest.raises(UserError, match="cannot write"):
        run_viz(run.path, out=tmp_path / "file" / "viz")


def test_projection_properties() -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(size=(50, 6)) @ np.diag([1, 9, 1, 4, 1, 1])
    points = pca_project(data)
    variances = np.sort(np.linalg.eigvalsh(np.cov(data.T)))[::-1]
    np.testing.assert_allclose(points.var(axis=0, ddof=1), variances[:2], rtol=1e-9)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(pca_project(data + 100.0), points, atol=1e-9)
    assert pca_project([[2.0], [5.0]]).tolist() == [[2.0, 0.0], [5.0, 0.0]]
    assert pca_project([]).shape == (0, 2)
    with pytest.raises(ValueError, match="finite"):
        pca_project([[1.0, float("nan")], [0.0, 0.0]])


def test_usage_and_curves_skip_what_says_nothing() -> None:
    assert operator_usage([{"operator_id": None}, {}]) == {}
    curves = loss_curves([{"x": 1}, {"iteration": 0}, {"iteration": 2, "total_loss": 1}])
    assert curves["iteration"] == [2.0] and curves["total_loss"] == [1.0]
    assert np.isnan(curves["critic_loss"]).all()
