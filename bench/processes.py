"""One training step, the global batch fixed, on 1, 2 and 4 processes of this machine.

    python -m bench.processes --output=results/processes.json

The processes share the cores of one machine, so wall time cannot show a speed-up by more cores than
there are; what the figures show is the price of the machinery: the processor seconds that all
processes together spend on a step, against one process (work that is repeated in every process, and
collectives over the loopback device). Every group is measured `rounds` times, in turn; the lowest
counts, since other load only adds.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common.rundir import atomic_write_json

CONFIG = "configs/halting_parity.py:cpu"
STEPS = 10
BATCH = 512
HIDDEN = 512  # about 0.2 s of one core per step: collectives must not be all there is


def work(output: Path, steps: int) -> None:
    """A process of a group: warm up, then time one call of many steps."""
    import jax
    import numpy as np

    from common import dist
    from common.flags import load_config
    from halting_jax.defaults import finalize
    from halting_jax.learner import compile_steps, make_step
    from halting_jax.train import fresh_state, make_source, optim_settings

    dist.initialize()
    config = load_config(CONFIG)
    with config.unlocked():
        config.data.batch_size = BATCH
        config.model.hidden_size = HIDDEN
    finalize(config)
    mesh = dist.make_mesh()
    source, built = make_source(config, Path())
    settings = optim_settings(config, config.train.max_steps, 0)
    state, layout = fresh_state(config, built, source, settings, mesh)
    step = make_step(built.task, built.model, built.objective, settings, layout)
    run = compile_steps(step, source.draw, mesh)
    rows: Any = dist.shard_batch(mesh, np.arange(BATCH, dtype=np.int32))
    state, _ = jax.block_until_ready(run(state, rows, (), 2))
    dist.barrier("start")
    begun, spent = time.perf_counter(), time.process_time()
    state, sums = jax.block_until_ready(run(state, rows, (), steps))
    seconds = np.array([[time.perf_counter() - begun, time.process_time() - spent]])
    measured = dist.gather_rows(seconds)
    loss = float(sums.means["classification"].total)
    if dist.is_main():
        atomic_write_json(
            output,
            {
                "wall_s": float(measured[:, 0].max()) / steps,
                "cpu_s": float(measured[:, 1].sum()) / steps,
                "loss": loss,
            },
        )


def measure(count: int, steps: int) -> dict[str, Any]:
    """Starts a group and returns what its main process measured."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        output = Path(directory) / "measured.json"
        group = []
        for number in range(count):
            environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
            if count > 1:
                environ |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(number),
                }
            command = [sys.executable, "-m", "bench.processes", f"--worker={output}"]
            group.append(subprocess.Popen([*command, f"--steps={steps}"], env=environ))
        if any([process.wait() for process in group]):
            raise RuntimeError(f"a group of {count} processes failed")
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def main() -> None:
    """Measures the groups in turn and writes the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/processes.json"))
    parser.add_argument("--counts", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--worker", type=Path, help="internal")
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.steps)
        return
    counts = [int(n) for n in given.counts.split(",")]
    best: dict[int, dict[str, Any]] = {}
    for _ in range(given.rounds):
        for count in counts:
            found = measure(count, given.steps)
            held = best.setdefault(count, found)
            for name in ("wall_s", "cpu_s"):
                held[name] = min(held[name], found[name])
    one = best[counts[0]]
    rows = [
        {
            "processes": count,
            **best[count],
            "cpu_ratio": best[count]["cpu_s"] / one["cpu_s"],
            "wall_ratio": best[count]["wall_s"] / one["wall_s"],
        }
        for count in counts
    ]
    report = {
        "config": CONFIG,
        "hidden_size": HIDDEN,
        "global_batch": BATCH,
        "steps": given.steps,
        "rounds": given.rounds,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[1],
        "rows": rows,
    }
    atomic_write_json(given.output, report)
    print("processes   cpu ms/step   ratio   wall ms/step   ratio   loss")
    for row in rows:
        print(
            f"{row['processes']:9d} {1e3 * row['cpu_s']:13.2f} {row['cpu_ratio']:7.2f} "
            f"{1e3 * row['wall_s']:14.2f} {row['wall_ratio']:7.2f}   {row['loss']:.4f}"
        )


if __name__ == "__main__":
    main()
