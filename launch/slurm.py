"""Inside a SLURM job: one step of all ranks, and a new start after the wall-time limit.

    python -m launch.slurm [--dry_run] MODULE [FLAGS]          (called by the sbatch scripts)

The coordinator is chosen here, once, and handed to the ranks: the first node of the job, under the
address by which SLURM itself reaches it (node names need not resolve), at a port that follows from
the job's number. Ahead of the limit SLURM sends SIGTERM to every rank (`--signal=TERM@N`); they
agree on a step, save it and end, and this program queues the job again. A SIGTERM that reaches only
this program (preemption) is passed on to the ranks.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from common import flags, startup
from common.errors import Interrupted, UserError
from launch.ranks import INTERRUPTED, Rank, group, module_command, take_dry_run
from launch.sweep import with_settings

USAGE = "sbatch launch/slurm_train.sbatch MODULE [FLAGS]"
STATUS_FILE = "LAUNCH_STATUS_FILE"


def num_tasks(environ: Mapping[str, str]) -> int:
    """Ranks of the job: `--ntasks`, or `--ntasks-per-node` on every node.

    Raises:
        UserError: a variable is no number.
    """
    try:
        if environ.get("SLURM_NTASKS"):
            return int(environ["SLURM_NTASKS"])
        per_node = environ.get("SLURM_NTASKS_PER_NODE", "1") or "1"
        return int(per_node) * int(environ.get("SLURM_NNODES", "1") or "1")
    except ValueError:
        raise UserError(
            "SLURM_NTASKS, SLURM_NTASKS_PER_NODE or SLURM_NNODES is not a number"
        ) from None


def coordinator(environ: Mapping[str, str]) -> str:
    """`address:port` of the first node; another port after every restart of the job.

    Raises:
        UserError: a variable of the job is missing.
    """
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if not environ.get(name)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} is not set: this is no SLURM job; use {USAGE}, or "
            "launch/local.sh on one machine"
        )
    restart = int(environ.get("SLURM_RESTART_COUNT") or 0)
    port = startup.port_of(int(environ["SLURM_JOB_ID"]), restart)
    return f"{startup.node_address(startup.first_host(environ['SLURM_JOB_NODELIST']))}:{port}"


def srun_command(environ: Mapping[str, str], count: int, command: tuple[str, ...]) -> list[str]:
    """The job step: one dead rank ends it, instead of leaving the others in a collective."""
    options = ["--kill-on-bad-exit=1", f"--ntasks={count}"]
    if environ.get("SLURM_NTASKS_PER_NODE"):
        options.append(f"--ntasks-per-node={environ['SLURM_NTASKS_PER_NODE']}")
    if environ.get("SLURM_CPUS_PER_TASK"):
        options.append(f"--cpus-per-task={environ['SLURM_CPUS_PER_TASK']}")
    return ["srun", *options, command[0], "-m", "launch.slurm_rank", *command]


def shown(environ: Mapping[str, str], count: int, command: tuple[str, ...]) -> str:
    """What would run: the step, and each rank with its environment."""
    inside = bool(environ.get("SLURM_JOB_ID"))
    address = coordinator(environ) if inside else "FIRST_NODE:PORT"
    lines = [f"step: {shlex.join(srun_command(environ, count, command))}"]
    per_node = int(environ.get("SLURM_NTASKS_PER_NODE") or count)
    for number in range(count):
        host = f"node {number // per_node}"
        lines.append(Rank(number, host, group(count, address, number), command).shown(environ))
    return "\n".join(lines)


def run_step(count: int, command: tuple[str, ...]) -> int:
    """Runs the step; the status of the main, 3 when the run was stopped and continues."""
    environ = dict(os.environ)
    if count > 1:
        environ[startup.COORDINATOR] = coordinator(environ)
        environ[startup.NUM_PROCESSES] = str(count)
    # A directory that all nodes see: the one the job was submitted from.
    where = Path(environ.get("SLURM_SUBMIT_DIR") or ".")
    handle, name = tempfile.mkstemp(prefix=".launch-status-", dir=where)
    os.close(handle)
    environ[STATUS_FILE] = name
    step = subprocess.Popen(srun_command(environ, count, command), env=environ)

    def forward(number: int, frame: FrameType | None) -> None:
        del number, frame
        # Never a signal to srun itself: it would kill the ranks instead of asking them.
        job = environ["SLURM_JOB_ID"]
        subprocess.run(["scancel", "--signal=TERM", f"{job}.0"], check=False, timeout=60)

    previous = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        status = step.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    told = Path(name).read_text().strip()
    Path(name).unlink(missing_ok=True)
    if status == 0 and told.isdigit():
        return int(told)
    return 128 - status if status < 0 else status


def requeue(environ: Mapping[str, str]) -> None:
    """Puts the job back into the queue; it goes on from the step that was saved.

    Raises:
        Interrupted: it was restarted often enough, or SLURM refused.
    """
    job, count = environ["SLURM_JOB_ID"], int(environ.get("SLURM_RESTART_COUNT") or 0)
    most = int(environ.get("LAUNCH_MAX_RESTARTS") or 1000)
    if environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    if count >= most:
        raise Interrupted(
            f"job {job} was restarted {count} times (LAUNCH_MAX_RESTARTS); submit it again"
        )
    print(f"launch: the run was stopped; queueing job {job} again (restart {count + 1})")
    sys.stdout.flush()
    done = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise Interrupted(f"job {job} could not be queued again ({done.stderr.strip()})")


def main(arguments: list[str]) -> int:
    """Shows or runs the step, and queues the job again when the run was stopped."""
    dry_run, rest = take_dry_run(arguments)
    command = module_command(with_settings(rest, os.environ), USAGE)
    count = num_tasks(os.environ)
    if dry_run:
        print(shown(os.environ, count, command))
        return 0
    coordinator(os.environ)  # refuses outside a job
    status = run_step(count, command)
    if status == INTERRUPTED:
        requeue(os.environ)
    return status


if __name__ == "__main__":
    flags.guard(lambda: main(sys.argv[1:]))
