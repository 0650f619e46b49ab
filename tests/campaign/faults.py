"""What can happen to a run: faults while it works, and damage to what it left behind."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.campaign.mains import Main

WHILE_IT_RUNS = ("kill -9", "SIGTERM", "full disk", "clock jump")
BETWEEN_RUNS = ("torn last line", "damaged checkpoint")
FAULTS = (*WHILE_IT_RUNS, *BETWEEN_RUNS)
DISK_MIB = 24  # of the small disk; a whole run needs a few


def progress(main: Main, workdir: Path) -> int:
    """Lines of all records so far, and files of all checkpoints: grows as the run proceeds."""
    count = 0
    for pattern in main.records:
        for path in workdir.glob(pattern):
            with contextlib.suppress(OSError):
                count += path.read_bytes().count(b"\n")
    for pattern in main.checkpoints:
        # Steps are renamed and pruned while they are counted.
        with contextlib.suppress(OSError):
            count += sum(1 for _ in workdir.glob(pattern))
    return count


def wait_for_progress(
    process: subprocess.Popen[bytes], main: Main, workdir: Path, target: int, limit_s: float
) -> bool:
    """Waits until `progress` reaches a target; False when the process ended before."""
    end = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < end:
        if progress(main, workdir) >= target:
            return True
        time.sleep(0.002)
    return process.poll() is None


def tear(main: Main, workdir: Path, rng: random.Random) -> bool:
    """Cuts the last line of a file of records at a random byte, as a crash of the machine does."""
    found = [p for pattern in main.records for p in workdir.glob(pattern) if p.stat().st_size > 2]
    if not found:
        return False
    path = rng.choice(sorted(found))
    raw = path.read_bytes()
    start = raw.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(raw[: rng.randrange(start, len(raw))])
    return True


def damage(main: Main, workdir: Path, rng: random.Random) -> bool:
    """Changes, empties or removes a random file of the newest checkpoint."""
    steps = [p for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
    if not steps:
        return False
    newest = max(steps, key=lambda p: int(p.name))
    files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size]
    # The only step there is cannot be replaced by an older one; starting again is then right.
    if not files:
        return False
    path = rng.choice(sorted(files))
    kind = rng.choice(("flip", "cut", "remove"))
    if kind == "remove":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        raw = bytearray(path.read_bytes())
        place = rng.randrange(len(raw))
        raw[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(raw))
    return True


def shift_times(workdir: Path, rng: random.Random) -> None:
    """Gives every file a time of another day, as after the clock was set."""
    for path in workdir.rglob("*"):
        if path.is_file():
            stamp = time.time() + rng.choice((-1, 1)) * rng.uniform(3600, 400 * 24 * 3600)
            os.utime(path, (stamp, stamp))


CLOCK = '''
"""Makes time.time() jump by hours, forwards and back, while the process runs."""
import random, time
_true, _start, _rng = time.time, time.monotonic(), random.Random(SEED)
_jumps = [(_rng.uniform(0.0, 30.0), _rng.uniform(-1.0, 1.0) * 90000.0) for _ in range(8)]
def _jumping():
    past = time.monotonic() - _start
    return _true() + sum(size for when, size in _jumps if past > when)
time.time = _jumping
'''


def clock(directory: Path, seed: int) -> dict[str, str]:
    """Variables under which a Python process sees a clock that jumps."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text(CLOCK.replace("SEED", str(seed)))
    paths = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """A tmpfs of DISK_MIB at a directory; False where one cannot be mounted (no such right)."""
    directory.mkdir(parents=True, exist_ok=True)
    options = f"size={DISK_MIB}m"
    mounted = (
        shutil.which("mount") is not None
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)],
            capture_output=True,
            check=False,
        ).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], capture_output=True, check=False)


def fill(directory: Path, left: int) -> Path:
    """Fills the disk of a directory but for `left` bytes; returns the file to remove again."""
    path = directory / ".filler"
    state = os.statvfs(directory)
    size = max(state.f_bavail * state.f_frsize - left, 0)
    block = b"\0" * (1 << 20)
    # A disk that is full already has no room for the file's name either.
    with contextlib.suppress(OSError), path.open("wb") as file:
        while size > 0:
            size -= file.write(block[: min(size, len(block))])
    return path


def leftovers(marker: str) -> list[int]:
    """Processes that carry a variable of the campaign and should have ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"CAMPAIGN_ID={marker}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def wait_for_no_leftovers(marker: str, limit_s: float = 15) -> list[int]:
    """Those that are still there after a while; they are then ended, so that a campaign goes on."""
    end = time.monotonic() + limit_s
    while (found := leftovers(marker)) and time.monotonic() < end:
        time.sleep(0.1)
    for number in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return found
