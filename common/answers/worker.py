"""The process behind `GradingPool`: reads one item a line, answers "taken", then the score.

Started as `python -m common.answers.worker module:function limit_s memory_mb`; never imports JAX or
PyTorch, and ends by itself when the process that started it is gone.
"""

import contextlib
import importlib
import json
import math
import os
import queue
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

# How much longer than the pool's own limit the kernel waits before it ends a stuck worker: the
# pool, when alive, must always be the first to notice.
ALARM_GRACE_S = 5.0
PARENT_CHECK_S = 1.0


def main() -> None:
    """Serves items from standard input until it is closed."""
    grader, limit, memory_mb = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    parent = os.getppid()
    items, replies = _claim_pipes()
    # Even code that never releases the interpreter lock, with the parent gone, meets the alarm.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_mb:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(parent, items, lines), daemon=True).start()
    try:
        function = _load(grader)
    except Exception as error:
        _send(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    _send(replies, {"ready": True})
    while True:
        item = json.loads(lines.get())
        # An end before this line is not held against the item: another worker gets it.
        _send(replies, {"taken": True})
        signal.setitimer(signal.ITIMER_REAL, limit + ALARM_GRACE_S)
        reply = _grade(function, item)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply)


def _grade(function: Callable[..., Any], item: list[Any]) -> dict[str, float | None]:
    prediction, gold, kwargs = item
    try:
        score = float(function(prediction, gold, **kwargs))
    except (Exception, SystemExit, KeyboardInterrupt):
        return {"score": None}
    return {"score": score if math.isfinite(score) else None}


def _load(grader: str) -> Callable[..., Any]:
    module_name, _, name = grader.partition(":")
    module = importlib.import_module(module_name)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{grader} is not a function")
    # Slow imports and first calls belong to the start, not to the time of the first item.
    prepare = getattr(module, "prepare", None)
    if prepare is not None:
        prepare()
    return function


def _claim_pipes() -> tuple[int, int]:
    """Takes both pipes away from the grading function, which may read or print as it likes."""
    items, replies = os.dup(0), os.dup(1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    return items, replies


def _send(replies: int, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode() + b"\n"
    while data:
        data = data[os.write(replies, data) :]


def _read(parent: int, items: int, lines: "queue.SimpleQueue[bytes]") -> None:
    # A closed pipe is how a dead parent shows. A sibling that inherited the other end could hold
    # it open, so the parent's id is looked at as well.
    pending = b""
    try:
        while os.getppid() == parent:
            if not select.select([items], [], [], PARENT_CHECK_S)[0]:
                continue
            data = os.read(items, 1 << 16)
            if not data:
                break
            *complete, pending = (pending + data).split(b"\n")
            for line in complete:
                lines.put(line)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
