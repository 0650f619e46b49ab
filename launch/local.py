"""N processes of a module on this machine: one per GPU where there are that many, else on the CPU.

python -m launch.local [--dry_run] N MODULE [FLAGS]
"""

import os
import shutil
import socket
import subprocess
import sys

from common import flags, startup
from common.errors import UserError
from launch.ranks import Rank, group, module_command, run_all, take_dry_run

USAGE = "launch/local.sh [--dry_run] N MODULE [FLAGS]"


def local_gpus() -> int:
    """How many NVIDIA devices this machine shows to a process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name and name != "-1"])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def plan(count: int, command: tuple[str, ...], port: int, gpus: int) -> list[Rank]:
    """The ranks: a device each, all of them for a single process, or the CPU.

    Raises:
        UserError: more processes than GPUs.
    """
    if gpus and count > gpus and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise UserError(
            f"{count} processes, but {gpus} GPUs: start at most {gpus}, or set JAX_PLATFORMS=cpu"
        )
    ranks = []
    for number in range(count):
        environment = group(count, f"127.0.0.1:{port}", number)
        if not gpus:
            environment["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
        elif count > 1:
            environment[startup.LOCAL_DEVICES] = str(number)
        ranks.append(Rank(number, "this machine", environment, command))
    return ranks


def main(arguments: list[str]) -> int:
    """Shows or runs the ranks."""
    dry_run, rest = take_dry_run(arguments)
    if not rest or not rest[0].isdigit() or not int(rest[0]):
        found = f", got {rest[0]!r}" if rest else ""
        raise UserError(f"the number of processes comes first{found}; usage: {USAGE}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = plan(int(rest[0]), module_command(rest[1:], USAGE), port, local_gpus())
    if dry_run:
        print("\n".join(rank.shown(os.environ) for rank in ranks))
        return 0
    return run_all(ranks)


if __name__ == "__main__":
    flags.guard(lambda: main(sys.argv[1:]))
