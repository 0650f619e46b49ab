#!/usr/bin/env python3
"""A config's sweep(add) as a SLURM job array, or as one process per local GPU.

    python launch/array.py CONFIG MODULE [FLAGS]                       one process per local GPU
    python launch/array.py --workers=2 CONFIG MODULE [FLAGS]           so many at a time
    python launch/array.py --slurm="--gres=gpu:1 --time=8:00:00" CONFIG MODULE [FLAGS]
    python launch/array.py --dry_run ...                               shows, starts nothing

Every run gets a directory of its own under --workdir (default runs/sweep_NAME); the same command
continues what is unfinished and leaves what is done. Unknown flags go to the module.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from common import flags  # noqa: E402
from common.errors import UserError  # noqa: E402
from launch.local import local_gpus  # noqa: E402
from launch.ranks import INTERRUPTED, Rank, module_command, take_dry_run  # noqa: E402
from launch.sweep import SWEEP_FLAG, runs_of, settings  # noqa: E402

USAGE = "launch/array.py [--slurm=OPTIONS | --workers=N] CONFIG MODULE [FLAGS]"


def main(arguments: list[str]) -> int:
    """Submits the array, or works through the runs here."""
    dry_run, rest = take_dry_run(arguments)
    slurm: str | None = None
    workers = 0
    while rest and rest[0].startswith("--"):
        word = rest.pop(0)
        name, _, value = word.partition("=")
        if name == "--slurm":
            slurm = value
        elif name == "--workers" and value.isdigit() and int(value):
            workers = int(value)
        else:
            raise UserError(f"{word}: unknown here; usage: {USAGE}")
    if len(rest) < 2:
        raise UserError(f"config and module are needed; usage: {USAGE}")
    config, module, *given = rest
    passed = [module, f"--config={config}", *given]
    count = len(runs_of(config))
    if slurm is not None:
        script = str(REPOSITORY / "launch" / "slurm_train.sbatch")
        command = [
            "sbatch",
            f"--array=0-{count - 1}",
            f"--job-name={Path(config.partition(':')[0]).stem}",
            *shlex.split(slurm),
            script,
            *passed,
            SWEEP_FLAG,
        ]
        if dry_run:
            print(shlex.join(command))
            for index in range(count):
                line = shlex.join(module_command(settings(passed, index), USAGE))
                print(f"task {index}: {line}")
            return 0
        return subprocess.run(command, check=False).returncode
    gpus = local_gpus()
    ranks = [
        Rank(index, "this machine", {}, module_command(settings(passed, index), USAGE))
        for index in range(count)
    ]
    slots: list[dict[str, str]] = [{"CUDA_VISIBLE_DEVICES": str(g)} for g in range(gpus)]
    slots = slots or [{"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}]
    slots = [slots[i % len(slots)] for i in range(workers or len(slots))]
    if dry_run:
        for rank in ranks:
            slot = slots[rank.number % len(slots)]
            print(Rank(rank.number, rank.host, slot, rank.command).shown(os.environ))
        return 0
    return work_through(ranks, slots)


def work_through(ranks: list[Rank], slots: list[dict[str, str]]) -> int:
    """Runs every rank once, as many at a time as there are slots; prints a table at the end.

    Returns:
        0 if all are done, 3 if some were interrupted, else the status of the first that failed.
    """
    waiting, statuses = list(ranks), {}
    running: dict[int, tuple[Rank, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for index, slot in enumerate(slots):
                if index not in running and waiting:
                    rank = waiting.pop(0)
                    environ = {**os.environ, **slot}
                    running[index] = rank, subprocess.Popen(rank.command, env=environ)
            for index, (rank, process) in list(running.items()):
                if process.poll() is not None:
                    statuses[rank.number] = process.returncode
                    del running[index]
            time.sleep(0.05)
    except KeyboardInterrupt:
        for _, process in running.values():
            process.wait()
        raise
    words = {0: "done", INTERRUPTED: "interrupted", 2: "refused"}
    for rank in ranks:
        status = statuses[rank.number]
        print(f"run {rank.number:3d}  {words.get(status, f'failed ({status})'):12}", end="  ")
        print(next((w for w in rank.command if w.startswith("--workdir=")), ""))
    bad = [s for s in statuses.values() if s not in (0, INTERRUPTED)]
    return bad[0] if bad else max(statuses.values(), default=0)


if __name__ == "__main__":
    flags.guard(lambda: main(sys.argv[1:]))
