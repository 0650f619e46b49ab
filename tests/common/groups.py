"""Starting several processes of one command on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

# JAX's own threads per process: many small groups share the cores of a test machine.
QUIET = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "1"}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_group(
    count: int, command: Sequence[str], devices: int = 1, **env: str
) -> list[subprocess.Popen[str]]:
    """Starts `python COMMAND` as `count` processes that know of each other.

    Args:
        count: processes.
        command: arguments of the interpreter.
        devices: CPU devices of each process.
        env: further variables.
    """
    group = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **QUIET, **group, "JAX_PROCESS_ID": str(number), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def finish(group: Sequence[subprocess.Popen[str]], timeout_s: float = 800) -> list[tuple[int, str]]:
    """Waits for a group: (status, output) of each; kills all of them when one hangs."""
    limit = time.monotonic() + timeout_s
    results = []
    try:
        for process in group:
            out, err = process.communicate(timeout=max(limit - time.monotonic(), 1))
            results.append((process.returncode, out + err))
    finally:
        for process in group:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
    return results


def run_group(count: int, command: Sequence[str], devices: int = 1, **env: str) -> list[str]:
    """Runs a group to its end and returns the outputs; all of them must succeed."""
    results = finish(start_group(count, command, devices, **env))
    for number, (status, output) in enumerate(results):
        assert status == 0, f"process {number} ended with {status}:\n{output[-3000:]}"
    return [output for _, output in results]
