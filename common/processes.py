"""What the processes of one command say to each other: who writes, what was decided, who waits.

All calls but `is_main` are collective: every process makes them, in the same order. They are free
of cost in a command of one process. Small objects travel as JSON through the coordinator, so they
need no device and have a time limit.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar

from common import startup
from common.errors import Interrupted, UserError

TIMEOUT_S = 600.0  # a checkpoint of a large model may keep the others waiting for minutes

_started: startup.Start | None = None
_numbers = itertools.count()

T = TypeVar("T")


def started(how: startup.Start) -> None:
    """Records how this process was started (`common.dist.initialize` calls it)."""
    global _started
    _started = how


def this() -> startup.Start:
    """How this process was started; before the start, what the environment says."""
    if _started is not None:
        return _started
    try:
        return startup.decide(address_of=lambda name: name)
    except UserError:
        return startup.Start("single")


def is_main() -> bool:
    """Tells whether this process writes logs, samples, metrics and results."""
    return this().process_id == 0


def barrier(name: str, timeout_s: float = TIMEOUT_S) -> None:
    """Waits until every process is here.

    Raises:
        Interrupted: not all came within `timeout_s` seconds; one of them has died or is stuck.
    """
    if this().num_processes == 1:
        return
    _wait(f"{name}-{next(_numbers)}", timeout_s, name)


def on_main(work: Callable[[], T], timeout_s: float = TIMEOUT_S) -> T:
    """Does something on the main process alone and tells all of them the result.

    Args:
        work: returns a JSON value; its UserError and Interrupted are raised by every process.
        timeout_s: longest wait for it, in seconds.

    Returns:
        What `work` returned, after a round through JSON (tuples become lists) on the others.

    Raises:
        Interrupted: the main process did not answer in time.
    """
    if this().num_processes == 1:
        return work()
    number = next(_numbers)
    if is_main():
        try:
            value = work()
        except (UserError, Interrupted) as error:
            answer = json.dumps({"error": type(error).__name__, "message": str(error)})
            _client().key_value_set(f"on_main/{number}", answer)
            _wait(f"read-{number}", timeout_s, "on_main")
            raise
        _client().key_value_set(f"on_main/{number}", json.dumps({"value": value}))
        # Kept until all have read it; without this the coordinator's memory would grow.
        _wait(f"read-{number}", timeout_s, "on_main")
        _client().key_value_delete(f"on_main/{number}")
        return value
    try:
        text = _client().blocking_key_value_get(f"on_main/{number}", int(timeout_s * 1000))
    except Exception as error:
        raise _lost("the answer of the main process", timeout_s, error) from error
    _wait(f"read-{number}", timeout_s, "on_main")
    answer = json.loads(text)
    if "error" in answer:
        kind = UserError if answer["error"] == "UserError" else Interrupted
        raise kind(answer["message"])
    value_: T = answer["value"]
    return value_


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; the same answer everywhere.

    For decisions that must fall at the same step on all of them, such as stopping on a signal.
    """
    if this().num_processes == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _wait(key: str, timeout_s: float, name: str) -> None:
    try:
        _client().wait_at_barrier(key, int(timeout_s * 1000))
    except Exception as error:
        raise _lost(f"the others at {name!r}", timeout_s, error) from error


def _lost(what: str, timeout_s: float, error: Exception) -> Interrupted:
    start = this()
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return Interrupted(
        f"process {start.process_id} of {start.num_processes} waited for {what} in vain (limit "
        f"{timeout_s:.0f} s: {reason}); a process has died or hangs: see its own output, then run "
        "the same command again"
    )


def _client() -> Any:
    # No public name exists for the coordinator's store; Orbax takes the same way.
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("common.dist.initialize() has not been called")
    return client
