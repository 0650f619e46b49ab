"""Trials of a campaign: one run, disturbed, continued, compared."""

import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.campaign import faults
from tests.campaign.mains import Main
from tests.launch.runs import REPOSITORY

RUN_LIMIT_S = 900.0
MOST_RUNS = 8  # of one command until it must be done
COLUMNS = ("trials", "injected", "survived", "lost", "orphans")


class Campaign:
    """Random trials over some mains, with counts per main and fault."""

    def __init__(
        self,
        mains: Mapping[str, Main],
        seed: int,
        directory: Path | None = None,
        kinds: Sequence[str] = faults.FAULTS,
    ) -> None:
        """Nothing runs yet.

        Args:
            mains: what is driven.
            seed: decides main, fault and moment of every trial.
            directory: kept afterwards; None takes a temporary one.
            kinds: the faults that are tried.
        """
        self.mains = mains
        self.seed = seed
        self.kinds = list(kinds)
        self.counts: dict[tuple[str, str], collections.Counter[str]] = {}
        self.problems: list[str] = []
        self._closing = contextlib.ExitStack()
        if directory is None:
            directory = Path(
                self._closing.enter_context(tempfile.TemporaryDirectory(prefix="campaign-"))
            )
        self.directory = directory
        self._references: dict[str, tuple[dict[str, Any], int]] = {}
        self._marker = f"{os.getpid()}-{seed}"
        self._orphans = 0  # of the current trial

    @property
    def lost(self) -> int:
        """Trials that did not end as an undisturbed run does."""
        return sum(counter["lost"] for counter in self.counts.values())

    def run(self, seconds: float, after: Callable[[], None] = lambda: None) -> None:
        """Trials until the time is over; each main and each fault comes in turn.

        Args:
            seconds: a trial that has begun is finished.
            after: called after every trial.
        """
        end = time.monotonic() + seconds
        number = 0
        with self._closing, self._nothing_left():
            while time.monotonic() < end or number == 0:
                rng = random.Random(f"{self.seed}-{number}")
                names = list(self.mains)
                name = names[number % len(names)]
                fault = self._fault_of(number, len(names))
                begun = time.monotonic()
                self._trial(name, fault, rng, self.directory / f"trial{number}")
                word = f"{time.monotonic() - begun:.0f} s"
                print(f"trial {number}: {name}, {fault} ({word})", file=sys.stderr, flush=True)
                number += 1
                after()

    @contextlib.contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """Whatever ends the campaign, no process of it goes on."""
        try:
            yield
        finally:
            faults.wait_for_no_leftovers(self._marker, limit_s=0)

    def _fault_of(self, number: int, num_mains: int) -> str:
        """Another fault for each main in every round, so that all pairs come in turn."""
        return self.kinds[(number // num_mains + number % num_mains) % len(self.kinds)]

    def table(self) -> str:
        """Counts per main and fault, and what went wrong."""
        head = f"{'main':10}{'fault':22}" + "".join(f"{name:>10}" for name in COLUMNS)
        lines = [head, "-" * len(head)]
        total: collections.Counter[str] = collections.Counter()
        for (name, fault), counter in sorted(self.counts.items()):
            total.update(counter)
            lines.append(f"{name:10}{fault:22}" + _cells(counter))
        lines.append(f"{'all':32}" + _cells(total))
        return "\n".join([*lines, *self.problems])

    def report(self) -> dict[str, Any]:
        """The table as JSON values."""
        rows = [
            {"main": name, "fault": fault, **{column: counter[column] for column in COLUMNS}}
            for (name, fault), counter in sorted(self.counts.items())
        ]
        return {"seed": self.seed, "rows": rows, "problems": self.problems}

    def _trial(self, name: str, fault: str, rng: random.Random, directory: Path) -> None:
        counter = self.counts.setdefault((name, fault), collections.Counter())
        counter["trials"] += 1
        main = self.mains[name]
        self._orphans = 0
        try:
            wanted, most = self._reference(name)
            with contextlib.ExitStack() as disk:
                if fault == "full disk" and not disk.enter_context(faults.small_disk(directory)):
                    counter["trials"] -= 1
                    return  # this machine does not let a test mount anything
                directory.mkdir(parents=True, exist_ok=True)
                counter["injected"] += self._disturb(main, fault, rng, directory, most)
                self._until_done(main, directory)
                found = main.outputs(directory / "run")
            differing = [k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)]
            if differing:
                raise AssertionError(f"differs from an undisturbed run in {sorted(differing)[:5]}")
            if self._orphans:
                raise AssertionError(f"{self._orphans} processes were left over")
            counter["survived"] += 1
            shutil.rmtree(directory, ignore_errors=True)
        except AssertionError as error:
            counter["lost"] += 1
            self.problems.append(f"LOST {name}, {fault}, {directory.name}: {error}")
            faults.wait_for_no_leftovers(self._marker, limit_s=1)
        counter["orphans"] += self._orphans

    def _reference(self, name: str) -> tuple[dict[str, Any], int]:
        """Outputs of an undisturbed run, and how far its progress goes; made once."""
        if name not in self._references:
            directory = self.directory / f"undisturbed_{name}"
            directory.mkdir(parents=True, exist_ok=True)
            self._until_done(self.mains[name], directory)
            run = directory / "run"
            outputs = self.mains[name].outputs(run)
            self._references[name] = outputs, faults.progress(self.mains[name], run)
        return self._references[name]

    def _disturb(
        self, main: Main, fault: str, rng: random.Random, directory: Path, most: int
    ) -> int:
        """Injects a fault one to three times; returns how often it really struck."""
        struck = 0
        for turn in range(rng.randint(1, 3)):
            target = rng.randint(0 if turn == 0 else 1, max(most - 2, 1))
            run = directory / "run"
            if fault == "full disk":
                struck += self._fill_up(main, rng, directory, target)
                continue
            extra = (
                faults.clock(directory / "clock", rng.randrange(10**6))
                if fault == ("clock jump")
                else {}
            )
            process = self._start(main, directory, extra)
            alive = faults.wait_for_progress(process, main, run, target, RUN_LIMIT_S)
            time.sleep(rng.uniform(0, 0.1))
            if not alive or process.poll() is not None:
                self._finish(process, directory, (0,))
                break
            soft = fault in ("SIGTERM", "clock jump") or rng.random() < 0.3
            process.send_signal(signal.SIGTERM if soft else signal.SIGKILL)
            # Before the handlers stand, a signal ends a process that has done nothing yet.
            allowed = (*main.stopped, 0, -signal.SIGTERM) if soft else (-signal.SIGKILL, 0)
            self._finish(process, directory, allowed)
            if fault == "torn last line":
                struck += faults.tear(main, run, rng)
            elif fault == "damaged checkpoint":
                struck += faults.damage(main, run, rng)
            else:
                struck += 1
            if fault == "clock jump":
                faults.shift_times(run, rng)
        return struck

    def _fill_up(self, main: Main, rng: random.Random, directory: Path, target: int) -> int:
        """The disk fills up while the run works; it must refuse in one line."""
        process = self._start(main, directory, {})
        alive = faults.wait_for_progress(process, main, directory / "run", target, RUN_LIMIT_S)
        filler = faults.fill(directory, rng.choice((0, 512, 4096, 100_000)))
        try:
            status = self._finish(process, directory, (0, *main.refused, *main.stopped))
        finally:
            filler.unlink(missing_ok=True)
        return int(alive and status != 0)

    def _until_done(self, main: Main, directory: Path) -> None:
        """The same command again, until it says it is done."""
        for _ in range(MOST_RUNS):
            if self._finish(self._start(main, directory, {}), directory, (0, *main.stopped)) == 0:
                return
        raise AssertionError(f"the command was not done after {MOST_RUNS} runs")

    def _start(self, main: Main, directory: Path, extra: Mapping[str, str]) -> Any:
        environ = {
            "JAX_PLATFORMS": "cpu",
            "CAMPAIGN_ID": self._marker,
            "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        # Beside the run, not in it: on a full disk the message must still have a place.
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _finish)
        process = subprocess.Popen(
            [sys.executable, "-m", main.module, *main.arguments(directory / "run")],
            cwd=REPOSITORY,
            env={**os.environ, **environ, **extra},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        process.log = log  # type: ignore[attr-defined]
        return process

    def _finish(self, process: Any, directory: Path, allowed: tuple[int, ...]) -> int:
        try:
            status = process.wait(RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the run hung ({directory.name})") from None
        # Whatever it started (grading workers) carries the marker and must end with it.
        self._orphans += len(faults.wait_for_no_leftovers(self._marker))
        process.log.seek(0)
        text = process.log.read().decode(errors="replace")
        process.log.close()
        if status not in allowed:
            last = [line for line in text.splitlines() if line.strip()][-1:] or ["nothing"]
            raise AssertionError(f"ended with {status}, wanted {allowed}: {last[0][:300]}")
        if "Traceback" in text and status >= 0:
            last = text.strip().splitlines()[-1]
            raise AssertionError(f"a traceback was printed: {last[:300]}")
        return int(status)


def _cells(counter: collections.Counter[str]) -> str:
    return "".join(f"{counter[column]:>10}" for column in COLUMNS)
