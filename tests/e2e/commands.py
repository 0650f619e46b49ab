"""Commands of the end-to-end tests: the smallest runs there are, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
# No transformer and no bundled weights: an embedding and a head behind the real tokenizer.
SMALL = (
    "--config.backbone.name=simple",
    "--config.backbone.hidden_size=8",
    "--config.backbone.max_length=48",
    "--config.rollout.gen_len=6",
    "--config.rollout.max_steps=3",
    "--config.rollout.batch_size=4",
    "--config.episodes_per_iter=8",
    "--config.dataset.max_ops=1",
    "--config.dataset.train_size=8",
    "--config.dataset.eval_size=5",
    "--config.eval.batch_size=4",
    "--config.actor.hidden_size=8",
    "--config.critic.hidden_size=8",
)
PLUS = ("--config=configs/gsm8k.py:tiny", *SMALL, "--config.num_iterations=6")
PAPER = (
    "--config=configs/gsm8k.py:paper",
    *SMALL,
    "--config.num_iterations=4",
    "--config.buffer_size=12",
    "--config.updates.backbone_batch=12",
    "--config.logging.checkpoint_interval=1",
    "--config.logging.sample_interval=1",
    "--config.rollout.save_relation=True",
)
# What a task of `srun -n 2` finds in its environment, without a scheduler.
SECOND_OF_TWO = {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "here",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
PATIENCE = 900.0  # seconds until a slow test gives a command up, on a machine that is busy
MEASURED = ("time/", "speed/", "memory/")


def start(
    *args: str, cwd: Path | None = None, module: str = "reoac_jax.main", **env: str
) -> subprocess.Popen[str]:
    """`python -m module args` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        cwd=cwd or REPOSITORY,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    *args: str,
    cwd: Path | None = None,
    module: str = "reoac_jax.main",
    timeout: float = 280,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """The same, to its end; killed after `timeout` seconds."""
    process = start(*args, cwd=cwd, module=module, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def stop_at_step(
    workdir: Path,
    step: int,
    number: signal.Signals,
    *args: str,
    module: str = "reoac_jax.main",
) -> int:
    """Start a run, send it a signal once checkpoint `step` is there, and return its status."""
    process = start(f"--workdir={workdir}", *args, module=module)
    limit = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < limit:
        if (workdir / "checkpoints" / str(step) / "summary.json").exists():
            process.send_signal(number)
            break
        time.sleep(0.002)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0, f"the run ended before checkpoint {step} was seen: {err[-500:]}"
    return process.returncode


def kill_after(workdir: Path, seconds: float, *args: str, module: str = "reoac_jax.main") -> int:
    """Start a run, kill it so long after it took its first step, and return its status.

    A run that ends before is let be.
    """

    def lines() -> int:
        path = workdir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    process = start(f"--workdir={workdir}", *args, module=module)
    limit, before = time.monotonic() + PATIENCE, lines()
    while process.poll() is None and time.monotonic() < limit and lines() <= before:
        before = min(before, lines())  # lines behind the checkpoint are cut off when it starts
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.communicate(timeout=120)
    return process.returncode


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what is measured."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Arrays of the last checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a target it looks shardings up in a file
        tree = checkpointer.restore(workdir / "checkpoints" / str(step) / "state")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for path, leaf in leaves
    }


def assert_same_run(actual: Path, expected: Path) -> None:
    """The two runs went the same way, bit for bit."""
    assert metrics(actual) == metrics(expected)
    left, right = arrays(actual), arrays(expected)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)
    for name in ("eval_gsm8k.json", "eval_untrained.json"):
        assert (actual / name).read_text() == (expected / name).read_text()
    samples = sorted(p.name for p in (expected / "samples").iterdir())
    assert sorted(p.name for p in (actual / "samples").iterdir()) == samples
    for name in samples:
        assert (actual / "samples" / name).read_text() == (expected / "samples" / name).read_text()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, the lock apart."""
    files = (p for p in directory.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}
