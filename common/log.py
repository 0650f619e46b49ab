"""Messages to the person at the terminal: one line on stderr, from the main process only.

Libraries below (Orbax above all) write dozens of lines per save through absl's logger; that one is
kept at WARNING, so a run's own messages stay readable beside the progress bar.
"""

import errno
import logging
import sys
import threading
from typing import Any

from absl import logging as absl_logging
from tqdm import tqdm

from common.processes import is_main

_FULL = (errno.ENOSPC, errno.EDQUOT)


def quiet_libraries() -> None:
    """Let libraries report warnings only; call once at start-up.

    On a full disk their threads print tracebacks of what is raised here as well, where it becomes
    one line: Orbax logs its own, TensorBoard's writer dies with it, and the storage library wakes
    event loops that are closed by then.
    """
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_logger().addFilter(_raised_anyway)
    # Orbax writes in tasks: one of several that failed alike is raised, the others' tracebacks
    # would be printed when they are collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.excepthook = _thread_ended
    sys.unraisablehook = _in_a_callback


def _raised_anyway(record: logging.LogRecord) -> bool:
    """Drops what Orbax logs with a traceback: it raises the same."""
    return not (record.exc_info and "orbax" in record.pathname)


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """A writer's thread that ran out of disk; whoever hands it more is told."""
    if not (isinstance(ended.exc_value, OSError) and ended.exc_value.errno in _FULL):
        threading.__excepthook__(ended)


def _in_a_callback(found: Any) -> None:
    """The storage library's callback into an event loop that a failed save has closed."""
    if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(found)


def info(message: str, *args: object) -> None:
    """Print a line without tearing a progress bar."""
    if is_main():
        tqdm.write(message % args if args else message, file=sys.stderr)


def warning(message: str, *args: object) -> None:
    """Print a line that starts with `warning:`."""
    info("warning: " + message, *args)
