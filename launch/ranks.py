"""The processes of one command: what each is given, how they are shown, run, and stopped."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from common import startup
from common.errors import UserError

INTERRUPTED = 3  # exit status of a main: stopped, the same command continues
GRACE_S = 30.0  # for the others to end by themselves once one has failed
# What env.sh sets and a rank depends on; shown by --dry_run.
SHOWN = (
    "JAX_COMPILATION_CACHE_DIR",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "OMP_NUM_THREADS",
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "PYTHONPATH",
)


@dataclasses.dataclass(frozen=True)
class Rank:
    """One process.

    Attributes:
        number: among all ranks.
        host: where it runs.
        environment: variables beside those of the launcher.
        command: program and arguments.
    """

    number: int
    host: str
    environment: Mapping[str, str]
    command: tuple[str, ...]

    def shown(self, environ: Mapping[str, str]) -> str:
        """One line that a shell would run: every variable that matters, then the command."""
        kept = {name: environ[name] for name in SHOWN if environ.get(name)}
        words = [f"{name}={value}" for name, value in {**kept, **self.environment}.items()]
        line = shlex.join([*words, *self.command])
        return f"rank {self.number} on {self.host}: {line}"


def take_dry_run(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Splits `--dry_run` off; everything else is passed on unread."""
    rest = [word for word in arguments if word not in ("--dry_run", "--dry-run")]
    return len(rest) != len(arguments), rest


def module_command(arguments: Sequence[str], usage: str) -> tuple[str, ...]:
    """`python -m MODULE FLAGS`, unbuffered so that a log is complete when a rank is killed.

    Raises:
        UserError: no module was named.
    """
    if not arguments or arguments[0].startswith("-"):
        found = f", got {arguments[0]!r}" if arguments else ""
        raise UserError(f"the module comes first{found}; usage: {usage}")
    python = os.environ.get("LAUNCH_PYTHON") or sys.executable
    return (python, "-u", "-m", *arguments)


def group(count: int, coordinator: str, number: int) -> dict[str, str]:
    """The variables that make a process a member of a group; see `common.startup`."""
    if count == 1:
        return {}
    return {
        startup.COORDINATOR: coordinator,
        startup.NUM_PROCESSES: str(count),
        startup.PROCESS_ID: str(number),
    }


def run_all(ranks: Sequence[Rank]) -> int:
    """Runs the ranks here, passes signals on, and waits; one that fails takes the others along.

    Returns:
        0 if all ended well; 3 if the run was interrupted and continues with the same command; else
        the status of the first rank that failed.
    """
    running = [
        subprocess.Popen(rank.command, env={**os.environ, **rank.environment}) for rank in ranks
    ]

    stopped: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        stopped.append(number)
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    previous = {
        number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    # Ctrl-C reaches the whole foreground group by itself.
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return _wait(running, stopped)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(running: Sequence[subprocess.Popen[bytes]], stopped: Sequence[int]) -> int:
    def good(status: int) -> bool:
        # Asked to stop before its handlers stood: nothing was done yet, the command continues.
        return status in (0, INTERRUPTED) or (bool(stopped) and -status in stopped)

    failed: int | None = None
    deadline = float("inf")
    while None in (ended := [process.poll() for process in running]):
        bad = [status for status in ended if status is not None and not good(status)]
        if bad and failed is None:
            failed = bad[0]
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            _end(running)
        time.sleep(0.05)
    statuses = [process.returncode for process in running]
    bad = [status for status in statuses if not good(status)]
    if failed is not None or bad:
        status = failed if failed is not None else bad[0]
        return 128 - status if status < 0 else status
    return INTERRUPTED if any(statuses) else 0


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, a moment to obey it (a save may be under way), then SIGKILL."""
    for process in running:
        if process.poll() is None:
            process.terminate()
    limit = time.monotonic() + GRACE_S
    while time.monotonic() < limit and None in [process.poll() for process in running]:
        time.sleep(0.05)
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()
