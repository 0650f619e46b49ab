"""The REOAC command from end to end: what a run leaves, resuming, evaluation, the other modes."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import Interrupted
from reoac_jax.types import OPERATORS
from tests.e2e.commands import (
    MEASURED,
    PAPER,
    PLUS,
    SMALL,
    assert_same_run,
    contents,
    metrics,
    run,
    stop_at_step,
)
from tests.e2e.conftest import Main

NAMED = ("iteration", "critic_loss", "actor_loss", "backbone_loss", "total_loss", "episodes")
SAMPLE_KEYS = {
    "prompt", "final_text", "reward", "cost", "operator_id", "feature_vector", "relation"
}  # fmt: skip
QUESTIONS = [
    {"question": "Tom has 3 pens and buys 4 more. How many pens?", "answer": "3+4=7\n#### 7"},
    {"question": "Ann has 9 nuts and eats 2. How many nuts?", "answer": "9-2=<<9-2=7>>7\n#### 7"},
    {"question": "  ", "answer": "#### 1"},
    {"question": "Each of 2 boxes holds 5 balls. How many balls?", "answer": "10\n#### 10"},
]


def _write_lines(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _check_run(workdir: Path, printed: str, iterations: int) -> None:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, iterations + 1))
    for row in rows:
        assert all(isinstance(row[name], (int, float)) for name in NAMED)
        assert 0.0 <= row["reward"] <= 1.0 and row["cost"] > 0
        assert sum(row[f"operator/{name}"] for name in OPERATORS) == pytest.approx(1.0, abs=1e-5)
        assert row["time/step"] > 0 and row["speed/episodes_per_second"] > 0
    report = json.loads((workdir / "eval_gsm8k.json").read_text())
    assert report["n"] == 5 and 0.0 <= report["accuracy"] <= 1.0
    low, high = report["accuracy_interval"]
    assert low <= report["accuracy"] <= high
    assert {"avg_cost", "avg_steps", "avg_return", "samples"} <= report.keys()
    assert len(report["samples"]) == 5
    assert "untrained policy" in printed and "trained policy" in printed and "5 problems" in printed
    assert (workdir / "DONE").exists()
    saved = json.loads((workdir / "config_resolved.json").read_text())
    assert saved["config"]["rollout"]["gen_len"] == 6 and saved["overrides"]["rollout.gen_len"] == 6
    samples = sorted((workdir / "samples").glob("iter*_step*.json"))
    assert samples
    for file in samples:
        sample = json.loads(file.read_text())
        assert sample.keys() >= SAMPLE_KEYS
        assert sample["operator_id"] in OPERATORS and len(sample["operators"]) == sample["steps"]
        assert len(sample["relation"]) > 0 and len(sample["relation"][0]) == 6


def test_train_leaves_a_whole_run(finished: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workdir, printed = finished
    _check_run(workdir, printed, iterations=6)
    steps = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    # The newest three, and the best one where that is older.
    assert {4, 5, 6} <= steps and len(steps) <= 4
    assert all(row["episodes"] == 8 for row in metrics(workdir))
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for row in metrics(workdir)[:1]:
        for tag in row:
            values = events.Scalars(tag) if tag != "iteration" else []
            if tag != "iteration":
                assert [v.step for v in values] == [1, 2, 3, 4, 5, 6]
                assert values[0].value == pytest.approx(row[tag], rel=1e-6, abs=1e-30)


def test_a_killed_run_continues_bit_for_bit(finished: tuple[Path, str], tmp_path: Path) -> None:
    workdir = tmp_path / "killed"
    assert stop_at_step(workdir, 1, signal.SIGKILL, *PLUS) == -signal.SIGKILL
    assert not (workdir / "DONE").exists()
    again = run(f"--workdir={workdir}", *PLUS)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "resuming at iteration" in again.stderr
    assert_same_run(workdir, finished[0])


def test_paper_stops_on_request_and_continues(
    main: Main,
    tmp_path: Path,
    terminate_before_save: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(f"--workdir={whole}", *PAPER) == 0
    _check_run(whole, capsys.readouterr().out, iterations=4)
    # The buffer holds 12 episodes, 8 come in per iteration.
    assert [row["episodes"] for row in metrics(whole)] == [8, 12, 12, 12]
    terminate_before_save(2)
    with pytest.raises(Interrupted, match="iteration 2 saved; run the same command again"):
        main(f"--workdir={stopped}", *PAPER)
    assert len(metrics(stopped)) == 2
    assert main(f"--workdir={stopped}", *PAPER) == 0
    assert_same_run(stopped, whole)


def test_evaluation_repeats_the_runs_own(
    main: Main, finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = finished[0]
    before = contents(workdir)
    output = tmp_path / "sub" / "eval.json"
    args = (*PLUS, "--mode=eval", f"--checkpoint={workdir}", f"--output={output}")
    # Other data settings, another seed of the data and another batch size do not matter here.
    assert main(*args, "--config.dataset.train_size=9", "--config.eval.batch_size=2") == 0
    report = json.loads(output.read_text())
    own = json.loads((workdir / "eval_gsm8k.json").read_text())
    assert {k: report[k] for k in own} == own
    assert report["iteration"] == 6 and "iteration 6" in capsys.readouterr().out
    assert main(*args, "--limit=2") == 0
    short = json.loads(output.read_text())
    assert short["n"] == 2 and short["samples"] == own["samples"][:2]
    assert contents(workdir) == before


def test_pictures_of_a_run(main: Main, copied: Path) -> None:
    assert main("--mode=viz", f"--run_dir={copied}") == 0
    made = {p.name for p in (copied / "viz").iterdir()}
    assert {"energy_map.csv", "features.json", "embedding_proj.csv", "operator_usage.json"} <= made
    table = (copied / "viz" / "energy_map.csv").read_text().splitlines()
    assert len(table[0].split(",")) == 6


def test_prepared_data_can_be_trained_on(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REOAC_DATA_ROOT", str(tmp_path))
    raw = _write_lines(tmp_path / "mine.jsonl", QUESTIONS)
    assert (
        main(
            *PLUS,
            "--mode=prep",
            f"--config.dataset.raw_train_path={raw}",
            f"--config.dataset.raw_eval_path={raw}",
        )
        == 0
    )
    assert "train: 3 records, 1 rows dropped" in capsys.readouterr().out
    processed = tmp_path / "dataset" / "processed"
    run_path = tmp_path / "run"
    assert (
        main(
            *PLUS,
            f"--workdir={run_path}",
            "--config.num_iterations=1",
            f"--config.dataset.train_path={processed / 'gsm8k_train.jsonl'}",
            "--config.dataset.eval_path=dataset/processed/gsm8k_test.jsonl",
        )
        == 0
    )
    samples = json.loads((run_path / "eval_gsm8k.json").read_text())["samples"]
    assert [s["prompt"] for s in samples] == [QUESTIONS[i]["question"] for i in (0, 1, 3)]
    assert [s["gold"] for s in samples] == [QUESTIONS[i]["answer"] for i in (0, 1, 3)]


@pytest.mark.slow
def test_pretraining_continues_and_its_model_trains(
    main: Main, tmp_path: Path, terminate_before_save: Callable[[int], None]
) -> None:
    settings = (
        "--config=configs/gsm8k.py:pretrain",
        "--mode=pretrain",
        *(word for word in SMALL if "backbone.name" not in word),
        "--config.model.hidden_size=8",
        "--config.model.intermediate_size=16",
        "--config.model.num_encoder_layers=1",
        "--config.model.num_decoder_layers=1",
        "--config.model.num_heads=2",
        "--config.model.num_kv_heads=1",
        "--config.model.head_dim=4",
        "--config.pretrain.stage_steps=(2,)",
        "--config.pretrain.stage_max_ops=(1,)",
        "--config.pretrain.batch_size=4",
        "--config.pretrain.corpus_size=8",
        "--config.pretrain.warmup=1",
        "--config.pretrain.steps_per_dispatch=1",
        "--config.pretrain.checkpoint_interval=1",
        "--config.pretrain.eval_steps=(2,)",
        "--config.pretrain.eval_thresholds=()",
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(*settings, f"--workdir={whole}") == 0
    terminate_before_save(1)
    with pytest.raises(Interrupted, match="update 1 saved"):
        main(*settings, f"--workdir={stopped}")
    assert main(*settings, f"--workdir={stopped}") == 0
    assert metrics(stopped) == metrics(whole) and (stopped / "DONE").exists()
    assert contents(stopped / "model") == contents(whole / "model")
    report = json.loads((whole / "pretrain.json").read_text())
    assert [row["forwards"] for row in report["curve"]] == [2.0]
    # The exported directory is a backbone like any other.
    trained = tmp_path / "trained"
    assert (
        main(
            *PLUS,
            f"--workdir={trained}",
            "--config.backbone.name=e2d2",
            f"--config.backbone.model_name_or_path={whole / 'model'}",
            "--config.num_iterations=1",
        )
        == 0
    )
    assert json.loads((trained / "backbone.json").read_text())["family"] == "e2d2"


@pytest.mark.slow
def test_commands_stop_with_status_3_and_find_their_run(tmp_path: Path) -> None:
    """Without --workdir: SIGTERM, continued by the same command; the next one starts anew."""
    where = f"--config.logging.output_dir={tmp_path}"
    root = tmp_path / "gsm8k_tiny"
    process_dir = tmp_path / "named"
    assert stop_at_step(process_dir, 1, signal.SIGTERM, *PLUS) == 3
    first = run(*PLUS, where, "--config.num_iterations=2")
    assert first.returncode == 0
    only = [p for p in root.iterdir() if not p.is_symlink()]
    assert len(only) == 1 and (root / "latest").resolve() == only[0].resolve()
    (only[0] / "DONE").unlink()
    again = run(*PLUS, where, "--config.num_iterations=2")
    assert again.returncode == 0 and "continuing the unfinished run" in again.stderr
    assert len([p for p in root.iterdir() if not p.is_symlink()]) == 1
    new = run(*PLUS, where, "--config.num_iterations=2")
    assert new.returncode == 0
    assert len([p for p in root.iterdir() if not p.is_symlink()]) == 2


@pytest.mark.slow
def test_a_killed_paper_run_continues_bit_for_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(f"--workdir={whole}", *PAPER).returncode == 0
    assert stop_at_step(killed, 1, signal.SIGKILL, *PAPER) == -signal.SIGKILL
    assert run(f"--workdir={killed}", *PAPER).returncode == 0
    assert_same_run(killed, whole)


def test_measured_fields_are_named_as_such(finished: tuple[Path, str]) -> None:
    row = json.loads((finished[0] / "metrics.jsonl").read_text().splitlines()[0])
    assert any(key.startswith(MEASURED) for key in row)
