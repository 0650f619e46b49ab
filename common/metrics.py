"""Scalars of a run: `metrics.jsonl` and TensorBoard with the same tags, timing, memory."""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.rundir import append_jsonl, atomic_write, json_text, read_jsonl

STEP_KEY = "iteration"
METRICS_FILE = "metrics.jsonl"
GIB = 2.0**30


class MetricWriter:
    """Writes one row of scalars per step to `metrics.jsonl` and to TensorBoard.

    `metrics.jsonl` is the record: a row stands in the file before `write` returns.
    """

    def __init__(self, workdir: str | Path, enabled: bool = True, tensorboard: bool = True) -> None:
        """Opens the writer; files are made at the first row.

        Args:
            workdir: the run directory; event files go to its `tensorboard/`.
            enabled: False on every process but the first: all methods then do nothing.
            tensorboard: False writes the rows only.
        """
        self._workdir = Path(workdir)
        self._path = self._workdir / METRICS_FILE
        self._enabled = enabled
        self._tensorboard = enabled and tensorboard
        self._events: Any = None
        self._purge_from: int | None = None
        self._recent: list[dict[str, Any]] = []

    def truncate_after(self, step: int, saved: Sequence[Mapping[str, Any]] = ()) -> None:
        """Drops the rows of later steps, so that a resumed run has one row per step.

        Args:
            step: the step the run resumes from; -1 drops everything.
            saved: rows that a checkpoint of that step holds (`take_recent`); those that a crash of
                the machine tore off the file are put back.
        """
        if not self._enabled:
            return
        self._purge_from = step + 1
        if not self._path.exists() and not saved:
            return
        rows = read_jsonl(self._path) if self._path.exists() else []
        kept = [row for row in rows if row.get(STEP_KEY, step + 1) <= step]
        known = {row[STEP_KEY] for row in kept}
        kept += [dict(row) for row in saved if row[STEP_KEY] not in known]
        kept.sort(key=lambda row: row[STEP_KEY])
        atomic_write(self._path, "".join(json_text(row) + "\n" for row in kept))

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one row `{"iteration": step, tag: value, ...}`.

        Args:
            step: the iteration.
            scalars: tag -> number (scalar arrays are converted; non-finite ones become null in
                the JSON and stay as they are in TensorBoard).
        """
        if not self._enabled:
            return
        values = {tag: _number(value) for tag, value in scalars.items()}
        row = {STEP_KEY: int(step), **values}
        append_jsonl(self._path, row)
        self._recent.append(json.loads(json_text(row)))
        if self._tensorboard:
            self._write_events(int(step), values)

    def take_recent(self) -> list[dict[str, Any]]:
        """The rows written since the last call, as JSON values; they belong into a checkpoint."""
        recent, self._recent = self._recent, []
        return recent

    def flush(self) -> None:
        """Pushes queued TensorBoard events to disk."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_events(self, step: int, values: Mapping[str, float | int]) -> None:
        # The tensorboard package's own writer: needs neither TensorFlow nor torch, and its
        # scalars are read back as scalars (the newer Writer stores tensors).
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._events is None:
            folder = self._workdir / "tensorboard"
            _wait_for_a_later_name(folder)
            self._events = EventFileWriter(str(folder), flush_secs=10)
            if self._purge_from is not None:
                # Tells readers to forget what earlier files say about these steps.
                start = SessionLog(status=SessionLog.START)
                self._events.add_event(
                    Event(wall_time=time.time(), step=self._purge_from, session_log=start)
                )
                self._purge_from = None
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))


class StepTimer:
    """Wall time of a step and of its named parts, and throughput.

    The caller makes sure that device work is finished (for example by reading a result) before a
    part ends; otherwise its time falls into the part that waits.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts the first step.

        Args:
            clock: seconds, for tests.
        """
        self._clock = clock
        self._start = clock()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the part `name` of this step."""
        begin = self._clock()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + self._clock() - begin

    def finish(self, units: Mapping[str, float] | None = None) -> dict[str, float]:
        """Ends the step and starts the next one.

        Args:
            units: what the step processed, for example `{"tokens": 2048}`.

        Returns:
            `time/step`, `time/<part>` in seconds and `speed/<unit>_per_second`.
        """
        now = self._clock()
        total = now - self._start
        result = {"time/step": total}
        result.update({f"time/{name}": seconds for name, seconds in self._parts.items()})
        for name, amount in (units or {}).items():
            result[f"speed/{name}_per_second"] = amount / total if total > 0 else 0.0
        self._start = now
        self._parts = {}
        return result


def peak_memory() -> dict[str, float]:
    """Returns the peak memory so far in GiB: `memory/host_peak`, `memory/device_peak`.

    The second is the largest over the local devices; backends without a count (CPU) have none.
    """
    import jax

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    result = {"memory/host_peak": peak * unit / GIB}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    if peaks:
        result["memory/device_peak"] = max(peaks) / GIB
    return result


def _wait_for_a_later_name(folder: Path) -> None:
    """Waits, for less than a second, until a new event file's name sorts after those there are.

    TensorBoard reads a folder's event files in the order of their names. A name begins with the
    whole second of its making; within one second host, process and a counter follow, as text, so
    that the tenth file of a process would be read before the ninth, and what a resumed run
    withdraws after what it wrote anew.
    """
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(1.0 - time.time() % 1.0)


def _number(value: Any) -> float | int:
    if isinstance(value, (bool, int)):
        return int(value)
    return float(value)
