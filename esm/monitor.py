"""What a stage shows while it runs: log lines, a progress bar, TensorBoard, a stop on request."""

import contextlib
import datetime
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common import log
from common.rundir import append_jsonl
from common.signals import StopRequest


class Monitor:
    """Log file, metrics and progress of one command.

    Use as a context manager; inside it SIGTERM and Ctrl-C become a request that `check` obeys.
    """

    def __init__(self, directory: Path, tensorboard: bool = True) -> None:
        """Args: directory: of the run; tensorboard: whether to write event files."""
        self._directory = directory
        self._tensorboard = tensorboard
        self._events: Any = None
        self._stop = StopRequest()

    def __enter__(self) -> "Monitor":
        self._stop.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.__exit__(*exc_info)
        if self._events is not None:
            self._events.close()
            self._events = None

    def info(self, message: str) -> None:
        """A line for the terminal and `logs/run.log`."""
        log.info("%s", message)
        stamp = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        path = self._directory / "logs" / "run.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{stamp} {message}\n")

    def warning(self, message: str) -> None:
        """The same, marked."""
        self.info(f"warning: {message}")

    @contextlib.contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator["tqdm[Any]"]:
        """A progress bar over `total` items, `done` of which an earlier command finished."""
        bar = tqdm(total=total, initial=done, desc=what, dynamic_ncols=True, smoothing=0.1)
        try:
            yield bar
        finally:
            bar.close()

    @property
    def stopping(self) -> bool:
        """Whether the command was asked to stop."""
        return self._stop.requested

    def check(self, what: str) -> None:
        """Ends the command resumably if that was requested; call when everything is saved.

        Raises:
            Interrupted: with a line that says how to go on.
        """
        self._stop.check(what)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step, in `logs/metrics.jsonl` and TensorBoard."""
        append_jsonl(
            self._directory / "logs" / "metrics.jsonl",
            {"step": step, "time": round(time.time(), 3), **values},
        )
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(step, [Summary.Value(tag=t, simple_value=v) for t, v in values.items()])

    def histogram(self, step: int, tag: str, values: Sequence[float], bins: int = 30) -> None:
        """A distribution, for TensorBoard."""
        if not len(values):
            return
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

        array = np.asarray(values, np.float64)
        counts, edges = np.histogram(array, bins=bins)
        proto = HistogramProto(
            min=float(array.min()),
            max=float(array.max()),
            num=float(array.size),
            sum=float(array.sum()),
            sum_squares=float((array**2).sum()),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.astype(float).tolist(),
        )
        self._write(step, [Summary.Value(tag=tag, histo=proto)])

    def _write(self, step: int, values: list[Any]) -> None:
        if not self._tensorboard:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._events is None:
            # The package's own writer: needs neither TensorFlow nor torch.
            self._events = EventFileWriter(str(self._directory / "tb"), flush_secs=10)
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._events.add_event(event)
