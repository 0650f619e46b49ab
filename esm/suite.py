"""The stage suite: many data sets, one process per GPU or CPU slot, and tables of what came out.

A job that fails is reported and the others go on; the tables hold what exists, and the command ends
with status 1. Run again with the same `suite.id`, every job continues where it stopped.
"""

import collections
import dataclasses
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_flags

from common import flags, log
from common.errors import Interrupted, UserError, require
from common.rundir import atomic_write_json
from common.signals import StopRequest
from esm import tables

POLL_S = 0.2
_TAIL_BYTES = 4000


@dataclasses.dataclass(frozen=True)
class Job:
    """One data set.

    Attributes:
        name: of the data set, or what the config calls it where one is used twice.
        run_name: directory of its runs.
        overrides: dotted config keys.
    """

    name: str
    run_name: str
    overrides: dict[str, Any]


@dataclasses.dataclass
class Outcome:
    """How a job ended.

    Attributes:
        job: the job.
        status: exit status of the stage that ended it; 0 = all stages done.
        stage: the last stage that ran.
        message: its last error line.
    """

    job: Job
    status: int
    stage: str
    message: str = ""


def run_suite(config: ConfigDict, given: Any) -> int:
    """Runs the jobs of the section `suite` and merges their tables.

    Returns:
        0, or 1 where a job failed.

    Raises:
        UserError: there are no jobs, or a job is not well formed.
        Interrupted: stopped on request; the same command continues.
    """
    jobs = make_jobs(config)
    stages = _words(given.stages) or list(config.suite.stages)
    from esm.main import STAGES

    unknown = [stage for stage in stages if stage not in STAGES or stage == "suite"]
    require(not unknown, f"--stages: {', '.join(unknown)} are no stages")
    gpus = [int(word) for word in _words(given.gpus)] or list(config.suite.gpus)
    suite_id = config.suite.id or config.outputs.run_id
    suite_id = suite_id or datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    root = Path(config.outputs.root_dir).expanduser().resolve()
    home = root / "_suite" / suite_id
    (home / "logs").mkdir(parents=True, exist_ok=True)
    base = config_flags.get_config_filename(flags.FLAGS["config"])
    shared = config_flags.get_override_values(flags.FLAGS["config"])
    commands = {
        job.run_name: [_command(base, shared, job, stage, root, suite_id) for stage in stages]
        for job in jobs
    }
    for job in jobs:
        atomic_write_json(home / "configs" / f"{job.run_name}.json", dataclasses.asdict(job))
    slots: list[int | None] = list(gpus) or [None] * config.suite.slots
    log.info("suite %s: %d jobs on %d %s", suite_id, len(jobs), len(slots),
             "GPUs" if gpus else "slots")  # fmt: skip
    outcomes = _run_jobs(jobs, commands, stages, slots, home)
    merge_tables(root, suite_id, [outcome.job for outcome in outcomes], home / "tables")
    failed = [outcome for outcome in outcomes if outcome.status]
    atomic_write_json(
        home / "status.json",
        [{**dataclasses.asdict(o), "job": o.job.run_name} for o in outcomes],
    )
    for outcome in failed:
        log.warning(
            "job %s failed in stage %s (status %d): %s",
            outcome.job.run_name,
            outcome.stage,
            outcome.status,
            outcome.message or f"see {home / 'logs' / outcome.job.run_name}.log",
        )
    log.info("suite: %d of %d jobs done; tables in %s", len(outcomes) - len(failed), len(jobs),
             home / "tables")  # fmt: skip
    return 1 if failed else 0


def make_jobs(config: ConfigDict) -> list[Job]:
    """The jobs of a config.

    Raises:
        UserError: there are none, one lacks a name, or two share one.
    """
    known = flags.flatten(config)
    jobs: list[Job] = []
    for entry in config.suite.datasets:
        entry = dict(entry)
        require("name" in entry, f"suite.datasets: {entry} has no name")
        name = str(entry["name"])
        label = str(entry.pop("run_name", name))
        overrides: dict[str, Any] = {"task.dataset": name}
        for key, value in entry.items():
            if key == "prompt_template":
                overrides["prompt.template"] = value
            elif key != "name":
                dotted = key if "." in key else f"task.{key}"
                if dotted not in known:
                    raise UserError(
                        f"suite.datasets: {name} sets the unknown key {dotted}"
                        f"{flags.nearest(dotted, known)}"
                    )
                overrides[dotted] = value
        jobs.append(Job(label, f"{config.suite.run_name_prefix}_{sanitize(label)}", overrides))
    require(
        bool(jobs),
        "suite.datasets is empty; use a config that lists some: configs/esm_suite_tiny.py",
    )
    twice = [n for n, c in collections.Counter(job.run_name for job in jobs).items() if c > 1]
    require(not twice, f"suite.datasets: {', '.join(twice)} is listed twice")
    return jobs


def sanitize(name: str) -> str:
    """Lower case, runs of other characters than letters and digits as one underscore."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def merge_tables(root: Path, suite_id: str, jobs: Sequence[Job], target: Path) -> None:
    """Joins the tables of all jobs that have some."""
    main: list[dict[str, Any]] = []
    ablation: list[dict[str, Any]] = []
    diagnostics: list[dict[str, Any]] = []
    for job in jobs:
        found = root / job.run_name / suite_id / "tables"
        if (found / "main_results_single.csv").is_file():
            rows = tables.read_csv(found / "main_results_single.csv")
            main += [{**row, "dataset": job.name} for row in rows]
        if (found / "ablation.csv").is_file():
            rows = tables.read_csv(found / "ablation.csv")
            ablation += [{"dataset": job.name, **row} for row in rows]
        for path in sorted(found.glob("diagnostics_T*.csv")):
            diagnostics += [{"dataset": job.name, **row} for row in tables.read_csv(path)]
    if main:
        # The columns of the first result: every job runs the same methods.
        tables.write_csv(target / "suite_main_results.csv", main)
    tables.write_csv(target / "suite_ablation_long.csv", ablation)
    tables.write_csv(target / "suite_diagnostics.csv", diagnostics)


def _run_jobs(
    jobs: Sequence[Job],
    commands: Mapping[str, list[list[str]]],
    stages: Sequence[str],
    slots: Sequence[int | None],
    home: Path,
) -> list[Outcome]:
    """A queue of jobs over slots; each job's stages run one after the other."""
    waiting = collections.deque(jobs)
    free = collections.deque(range(len(slots)))
    running: dict[int, tuple[Job, int, subprocess.Popen[bytes]]] = {}
    outcomes: list[Outcome] = []
    with StopRequest() as stop:
        try:
            while waiting or running:
                while waiting and free and not stop.requested:
                    slot, job = free.popleft(), waiting.popleft()
                    running[slot] = (job, 0, _start(job, commands, 0, slots[slot], home))
                for slot, (job, place, process) in list(running.items()):
                    status = process.poll()
                    if status is None:
                        continue
                    if status == 0 and place + 1 < len(stages) and not stop.requested:
                        nxt = _start(job, commands, place + 1, slots[slot], home)
                        running[slot] = (job, place + 1, nxt)
                        continue
                    del running[slot]
                    free.append(slot)
                    message = _last_error(home, job) if status else ""
                    outcomes.append(Outcome(job, status, stages[place], message))
                    log.info(
                        "job %s: %s", job.run_name, "done" if status == 0 else f"ended {status}"
                    )
                if stop.requested:
                    for _, _, process in running.values():
                        process.send_signal(signal.SIGTERM)
                    for _, _, process in running.values():
                        process.wait()
                    raise Interrupted(
                        "every finished row is saved; run the same command again with "
                        f"--config.suite.id={home.name} to continue"
                    )
                time.sleep(POLL_S)
        finally:
            for _, _, process in running.values():
                if process.poll() is None:
                    process.terminate()
    order = {job.run_name: place for place, job in enumerate(jobs)}
    return sorted(outcomes, key=lambda outcome: order[outcome.job.run_name])


def _start(
    job: Job,
    commands: Mapping[str, list[list[str]]],
    place: int,
    gpu: int | None,
    home: Path,
) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    with open(home / "logs" / f"{job.run_name}.log", "ab") as file:
        return subprocess.Popen(
            commands[job.run_name][place],
            cwd=Path(__file__).resolve().parent.parent,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Its own group: Ctrl-C reaches the suite, which passes a stop on.
            start_new_session=True,
        )


def _command(
    base: str, shared: Mapping[str, Any], job: Job, stage: str, root: Path, suite_id: str
) -> list[str]:
    settings = {**shared, **job.overrides}
    settings |= {
        "outputs.root_dir": str(root),
        "outputs.run_name": job.run_name,
        "outputs.run_id": suite_id,
    }
    path = Path(base.partition(":")[0])
    variant = base.partition(":")[2]
    spec = str(path.resolve()) if path.is_file() else str(path)
    command = [sys.executable, "-m", "esm.main"]
    command.append(f"--config={spec}" + (f":{variant}" if variant else ""))
    command.append(f"--stage={stage}")
    for key, value in settings.items():
        if not key.startswith("suite."):
            command.append(f"--config.{key}={_flag(value)}")
    return command


def _flag(value: Any) -> str:
    return repr(tuple(value)) if isinstance(value, (list, tuple)) else str(value)


def _last_error(home: Path, job: Job) -> str:
    path = home / "logs" / f"{job.run_name}.log"
    text = path.read_bytes()[-_TAIL_BYTES:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "interrupted:"))]
    return (errors or lines or [""])[-1]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
