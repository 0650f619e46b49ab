"""Rows and events with the same tags; a resumed run has one row per step."""

import math
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from common.metrics import MetricWriter, StepTimer, peak_memory
from common.rundir import read_jsonl


def read_events(workdir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_rows_and_events_agree(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        for step in range(3):
            writer.write(step, {"loss": jnp.float32(step / 2), "group/count": step})
            # The row is on disk at once.
            assert len(read_jsonl(tmp_path / "metrics.jsonl")) == step + 1
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows == [{"iteration": i, "loss": i / 2, "group/count": i} for i in range(3)]
    assert read_events(tmp_path) == {
        "loss": [(0, 0.0), (1, 0.5), (2, 1.0)],
        "group/count": [(0, 0.0), (1, 1.0), (2, 2.0)],
    }


def test_non_finite_values(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {"loss": float("nan")})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"iteration": 0, "loss": None}]
    assert math.isnan(read_events(tmp_path)["loss"][0][1])


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with MetricWriter(whole) as writer:
        for step in range(6):
            writer.write(step, {"loss": step * 1.5})
    with MetricWriter(broken) as writer:
        for step in range(5):  # the checkpoint was made at step 2
            writer.write(step, {"loss": step * 1.5})
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 5, "lo')  # killed here
    with MetricWriter(broken) as writer:
        writer.truncate_after(2)
        for step in range(3, 6):
            writer.write(step, {"loss": step * 1.5})
    assert (broken / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert read_events(broken) == read_events(whole)


@pytest.mark.parametrize("counter", [9, 99])
def test_event_files_of_one_second_are_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counter: int
) -> None:
    from tensorboard.summary.writer import event_file_writer

    # The library numbers the files of a process; as text, 10 comes before 9.
    uid = event_file_writer.AtomicCounter(counter)
    monkeypatch.setattr(event_file_writer, "_global_uid", uid)
    time.sleep(1.0 - time.time() % 1.0)
    with MetricWriter(tmp_path) as writer:
        for step in range(4):
            writer.write(step, {"loss": step})
    with MetricWriter(tmp_path) as writer:
        writer.truncate_after(1)
        for step in range(2, 4):
            writer.write(step, {"loss": step + 10})
    assert read_events(tmp_path) == {"loss": [(0, 0.0), (1, 1.0), (2, 12.0), (3, 13.0)]}


def test_start_afresh_drops_everything(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"a": 1})
        writer.truncate_after(-1)
        assert read_jsonl(tmp_path / "metrics.jsonl") == []
    assert not (tmp_path / "tensorboard").exists()


def test_disabled_writer_touches_nothing(tmp_path: Path) -> None:
    with MetricWriter(tmp_path / "x", enabled=False) as writer:
        writer.truncate_after(0)
        writer.write(0, {"a": 1})
        writer.flush()
    assert list(tmp_path.iterdir()) == []


def test_step_timer() -> None:
    times = iter([0.0, 1.0, 3.0, 3.0, 3.5, 4.0, 10.0])
    timer = StepTimer(clock=lambda: next(times))
    with timer.part("rollout"):
        pass
    with timer.part("rollout"):
        pass
    first = timer.finish({"tokens": 100})
    assert first == {"time/step": 4.0, "time/rollout": 2.5, "speed/tokens_per_second": 25.0}
    assert timer.finish() == {"time/step": 6.0}


def test_peak_memory_is_plausible() -> None:
    memory = peak_memory()
    assert 0.01 < memory["memory/host_peak"] < 10_000
    assert memory.get("memory/device_peak", 1.0) == pytest.approx(1.0, abs=1000)


def test_rows_that_a_crash_tore_off_come_back_from_the_checkpoint(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 2.0})
        assert writer.take_recent() == [{"iteration": 1, "loss": 2.0}]
        writer.write(2, {"loss": float("nan")})
        writer.write(3, {"loss": 0.5})
        saved = writer.take_recent()
        writer.write(4, {"loss": 0.25})
    path = tmp_path / "metrics.jsonl"
    whole = read_jsonl(path)[:3]
    # The checkpoint of step 3 is there; of the file only the first row and a part are.
    path.write_bytes(path.read_bytes()[:40])
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.truncate_after(3, saved)
    assert read_jsonl(path) == whole
    path.unlink()
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.truncate_after(3, saved)
    assert read_jsonl(path) == whole[1:]
