"""A private SLURM on this machine: munge, one controller, two virtual nodes; no init system needed.

Needs the programs of Debian's `slurmctld slurmd slurm-client munge` and root (a slurmd starts jobs
as their user). Nothing of the machine's own SLURM or munge is touched: keys, sockets, ports, state
and logs lie in one directory, and every client is pointed at it by SLURM_CONF.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("n1", "n2")
_SBIN = "/usr/sbin:/sbin"


def why_not() -> str:
    """Why no private controller can run here; "" if it can."""
    missing = [name for name in PROGRAMS if _which(name) is None]
    if missing:
        return (
            f"no {', '.join(missing)}: apt-get install -y slurmctld slurmd slurm-client munge "
            "(on a Debian machine) gives them"
        )
    if os.geteuid() != 0:
        return "a private SLURM needs root: slurmd starts jobs as their users"
    return ""


class Cluster:
    """A running controller with two nodes; every command goes through `run`."""

    def __init__(self, directory: Path) -> None:
        """Writes the configuration; `start` starts it."""
        self.directory = directory
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{_SBIN}",
        }
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, timeout_s: float = 90) -> None:
        """Starts munge, the controller and the nodes, and waits until both are idle."""
        self.directory.chmod(0o711)
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.directory / "slurm.conf").write_text(self._configuration())
        (self.directory / "gres.conf").write_text(
            f"NodeName=n[1-2] Name=gpu File={self.directory}/fakegpu[0-3]\n"
        )
        for index in range(4):
            device = self.directory / f"fakegpu{index}"
            if not device.exists():
                os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        files = {
            name: f"--{name}-file={self.directory}/munge.{name}" for name in ("pid", "log", "seed")
        }
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={self.directory}/munge.sock",
            *files.values(),
        )
        self._wait(lambda: (self.directory / "munge.sock").exists(), timeout_s, "munge")
        self._daemon("slurmctld", "-D", "-i")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(self._idle, timeout_s, "the nodes")

    def stop(self) -> None:
        """Cancels all jobs and ends every daemon that was started."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root", "--quiet", check=False)
            limit = time.monotonic() + 20
            while time.monotonic() < limit and self.jobs():
                time.sleep(0.5)
        for _, process in reversed(self._daemons):
            process.terminate()
        for _, process in self._daemons:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, *command: str, check: bool = True, **env: str) -> str:
        """Runs a client command and returns what it printed."""
        done = subprocess.run(
            command,
            env={**self.environment, **env},
            capture_output=True,
            text=True,
            timeout=900,
        )
        if check and done.returncode:
            raise AssertionError(f"{command[0]} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def jobs(self) -> list[str]:
        """Numbers of the jobs that have not ended."""
        return self.run("squeue", "--noheader", "--format=%i", check=False).split()

    def job(self, number: str) -> Mapping[str, str]:
        """`scontrol show job` as a dictionary; kept by the controller for MinJobAge seconds."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failing test."""
        parts = []
        for path in sorted(self.directory.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-15:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts)

    def _idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "-N", "--format=%N %t", check=False)
        return sorted(states.split("\n"))[1:] == [f"{node} idle" for node in NODES]

    def _daemon(self, name: str, *arguments: str) -> None:
        log = (self.directory / f"{name}{len(self._daemons)}.out").open("wb")
        program = _which(name)
        assert program is not None
        process = subprocess.Popen(
            [program, *arguments], env=self.environment, stdout=log, stderr=subprocess.STDOUT
        )
        self._daemons.append((name, process))

    def _wait(self, ready: Any, timeout_s: float, what: str) -> None:
        limit = time.monotonic() + timeout_s
        while not ready():
            for name, process in self._daemons:
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {process.returncode}\n{self.logs()}")
            if time.monotonic() > limit:
                raise RuntimeError(f"{what} did not start in {timeout_s:.0f} s\n{self.logs()}")
            time.sleep(0.2)

    def _configuration(self) -> str:
        host, here = socket.gethostname(), self.directory
        ports = [_free_port() for _ in range(2 + len(NODES))]
        cpus = max(os.cpu_count() or 1, 2)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
            "RealMemory=1000 Gres=gpu:4 State=UNKNOWN"
            for node, port in zip(NODES, ports[2:], strict=True)
        )
        return f"""\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={here}/munge.sock
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool.%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=5
ReturnToService=2
GresTypes=gpu
KillWait=15
MinJobAge=3600
OverTimeLimit=0
{nodes}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def private_cluster(directory: Path) -> Iterator[Cluster]:
    """A cluster for the time of a test."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (directory / name).mkdir()
    cluster = Cluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:{_SBIN}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
