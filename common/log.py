"""Messages to the person at the terminal: one line on stderr, from the main process only.

Libraries below (Orbax above all) write dozens of lines per save through absl's logger; that one is
kept at WARNING, so a run's own messages stay readable beside the progress bar.
"""

import logging
import sys

from absl import logging as absl_logging
from tqdm import tqdm

from common.processes import is_main


def quiet_libraries() -> None:
    """Let libraries report warnings only; call once at start-up."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Orbax writes in tasks: one of several that failed alike is raised, the others' tracebacks
    # would be printed when they are collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def info(message: str, *args: object) -> None:
    """Print a line without tearing a progress bar."""
    if is_main():
        tqdm.write(message % args if args else message, file=sys.stderr)


def warning(message: str, *args: object) -> None:
    """Print a line that starts with `warning:`."""
    info("warning: " + message, *args)
