"""Grading in isolated worker processes with a hard time limit for every item."""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError

Item = tuple[str | None, str | None, Mapping[str, Any]]

START_LIMIT_S = 120.0
# How many workers in a row may end before one of them has taken an item.
TAKING_ATTEMPTS = 3
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class Verdict(NamedTuple):
    """What came of one item.

    Attributes:
        score: what the grading function returned; 0 if it did not return a finite number.
        timed_out: the function exceeded the time limit.
        crashed: the function raised, ended its process, or returned no finite number, or the item
            ended each worker before it reached the function.
    """

    score: float
    timed_out: bool = False
    crashed: bool = False


class GradingHandle:
    """One submitted batch; `result` waits for its verdicts."""

    def __init__(self, size: int) -> None:
        self._verdicts: list[Verdict | None] = [None] * size
        self._missing = size
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def done(self) -> bool:
        """Tells whether `result` returns (or raises) at once."""
        with self._changed:
            return self._missing == 0 or self._error is not None

    def result(self, timeout_s: float | None = None) -> list[Verdict]:
        """Waits for the batch.

        Args:
            timeout_s: the longest to wait, None for as long as it takes.

        Returns:
            One verdict per item, in the order of submission.

        Raises:
            TimeoutError: if the batch is not complete after `timeout_s`.
            UserError: if workers cannot be started.
            RuntimeError: if the pool was closed before the batch was complete.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._error or not self._missing, timeout_s):
                raise TimeoutError(f"{self._missing} items were not graded in {timeout_s} s")
            if self._error is not None:
                raise self._error
            return [verdict for verdict in self._verdicts if verdict is not None]

    def _set(self, index: int, verdict: Verdict) -> None:
        with self._changed:
            self._verdicts[index] = verdict
            self._missing -= 1
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


class _Task(NamedTuple):
    handle: GradingHandle
    position: int
    line: bytes


class GradingPool:
    """A fixed number of grading processes that share one queue of items.

    `submit` returns at once, so that a batch is graded while the accelerator works on the next
    one. Every item is graded alone: one that exceeds the limit costs its worker, which is killed
    and replaced, and nothing else. Workers are fresh interpreters (no fork of a process that holds
    device memory), see no accelerator, and end by themselves when this process dies.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        num_workers: int = 2,
        time_limit_s: float = 5.0,
        grader: str = "common.answers.gsm8k:grade_gsm8k",
        memory_limit_mb: int = 4096,
    ) -> None:
        """Starts the workers and waits until the first one is ready.

        Args:
            num_workers: how many processes grade at the same time.
            time_limit_s: wall-clock limit of one item.
            grader: "module:function"; called as function(prediction, gold, **kwargs) -> float.
            memory_limit_mb: address space of one worker, 0 for no limit.

        Raises:
            UserError: if an argument is out of range or the function cannot be loaded.
        """
        if num_workers < 1:
            raise UserError(f"a grading pool needs at least one worker, got {num_workers}")
        if not 0 < time_limit_s < float("inf"):
            raise UserError(f"the grading time limit must be positive, got {time_limit_s}")
        module, separator, function = grader.partition(":")
        if not (module and separator and function.isidentifier()):
            raise UserError(f"the grader must be given as module:function, got {grader!r}")
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        arguments = [grader, str(time_limit_s), str(memory_limit_mb)]
        self._slots = [_Slot(self._tasks, arguments, time_limit_s) for _ in range(num_workers)]
        # Ends the workers of a pool that was dropped without `close`; holds no reference to it.
        self._finalizer = weakref.finalize(self, _stop, self._tasks, self._slots)
        self._slots[0].ready.wait()
        if self._slots[0].failure is not None:
            self.close()
            raise self._slots[0].failure

    def submit(self, items: Sequence[Item]) -> GradingHandle:
        """Queues a batch.

        Args:
            items: (prediction, gold, keyword arguments of the grading function) triples; what
                they hold must be JSON values.

        Returns:
            A handle; its `result` gives the verdicts in the order of `items`.

        Raises:
            TypeError: if an item cannot be sent as JSON.
            RuntimeError: if the pool is closed.
        """
        lines = [json.dumps(list(item)).encode() + b"\n" for item in items]
        handle = GradingHandle(len(lines))
        with self._lock:
            if self._closed:
                raise RuntimeError("the grading pool is closed")
            for index, line in enumerate(lines):
                self._tasks.put(_Task(handle, index, line))
        return handle

    def worker_pids(self) -> list[int]:
        """Returns the process ids of the workers that are alive now."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]

    def close(self) -> None:
        """Ends all workers; batches that are not complete raise from `result`."""
        with self._lock:
            self._closed = True
        self._finalizer()

    def __enter__(self) -> "GradingPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Slot:
    """One worker process and the thread that feeds, times and replaces it."""

    def __init__(
        self, tasks: "queue.SimpleQueue[_Task | None]", arguments: list[str], time_limit_s: float
    ) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = threading.Event()
        self.failure: UserError | None = None
        self.stopping = False
        self._tasks = tasks
        self._arguments = arguments
        self._time_limit_s = time_limit_s
        self._buffer = b""
        self._start_lock = threading.Lock()
        self.thread = threading.Thread(target=self._serve, name="grading", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Makes the thread return; its pending item fails with its batch."""
        with self._start_lock:
            self.stopping = True
            if self.process is not None:
                _kill(self.process)

    def _serve(self) -> None:
        try:
            self._start()
            self.ready.set()
            while (task := self._tasks.get()) is not None:
                self._grade(task)
        finally:
            self.ready.set()
            self._discard()

    def _grade(self, task: _Task) -> None:
        verdict = None
        # A worker that ended while idle (for example by the kernel, for want of memory) is not the
        # item's doing: the next one has it. An item that none lives to take is a crash.
        for _ in range(TAKING_ATTEMPTS):
            if self.process is None:
                self._start()
            if self.stopping:
                task.handle._fail(RuntimeError("the grading pool was closed before grading"))
                return
            if self.failure is not None:
                task.handle._fail(self.failure)
                return
            verdict = self._exchange(task.line)
            if verdict is not None:
                break
        if self.stopping:
            # Killed by `stop`, not by the item.
            task.handle._fail(RuntimeError("the grading pool was closed during grading"))
        else:
            task.handle._set(task.position, verdict or Verdict(0.0, crashed=True))

    def _exchange(self, line: bytes) -> Verdict | None:
        """Has one item graded; a worker that is late or gone is discarded.

        Returns:
            The verdict, or None if the worker ended before it took the item.
        """
        deadline = time.monotonic() + self._time_limit_s
        try:
            taken = self._send(line) and self._receive(deadline) is not None
            reply = self._receive(deadline) if taken else None
        except TimeoutError:
            self._discard()
            return Verdict(0.0, timed_out=True)
        if reply is None:
            self._discard()
            return Verdict(0.0, crashed=True) if taken else None
        score = reply["score"]
        return Verdict(0.0, crashed=True) if score is None else Verdict(score)

    def _send(self, line: bytes) -> bool:
        """Writes one line to the worker; tells whether it was there to take it."""
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            return False
        return True

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """Returns the next reply, None if the worker is gone; raises TimeoutError if late."""
        assert self.process is not None and self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        while b"\n" not in self._buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poller.poll(remaining * 1000):
                raise TimeoutError
            data = os.read(pipe, 1 << 16)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError:
            return None

    def _start(self) -> None:
        # The lock closes the gap between "not stopping" and "there is a process to kill".
        with self._start_lock:
            if self.stopping:
                return
            command = [sys.executable, "-m", "common.answers.worker", *self._arguments]
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=_environment(),
                    start_new_session=True,
                )
            except OSError as error:
                self.failure = UserError(f"cannot start a grading worker: {error.strerror}")
                return
        self._buffer = b""
        try:
            reply = self._receive(time.monotonic() + START_LIMIT_S)
        except TimeoutError:
            reply = {"error": f"not ready after {START_LIMIT_S:.0f} s"}
        if reply is None or "error" in reply:
            reason = reply["error"] if reply else "the process ended while it started"
            self.failure = UserError(f"cannot load the grader {self._arguments[0]}: {reason}")
            self._discard()
        else:
            self.failure = None

    def _discard(self) -> None:
        with self._start_lock:
            process, self.process = self.process, None
        if process is None:
            return
        _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _stop(tasks: "queue.SimpleQueue[_Task | None]", slots: list[_Slot]) -> None:
    for slot in slots:
        slot.stop()
    for _ in slots:
        tasks.put(None)
    for slot in slots:
        slot.thread.join()
    with contextlib.suppress(queue.Empty):
        while True:
            task = tasks.get_nowait()
            if task is not None:
                task.handle._fail(RuntimeError("the grading pool is closed"))


def _kill(process: "subprocess.Popen[bytes]") -> None:
    # The worker leads its own process group: what it started goes with it. `poll` first: the id
    # of a process that was already reaped can belong to someone else.
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    path = [str(_PACKAGE_ROOT), *(os.path.abspath(entry) for entry in sys.path)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        "PYTHONSAFEPATH": "1",
        # A grader that imports an array library by accident must not take device memory.
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
    }
