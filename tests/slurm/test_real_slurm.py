"""The launch scripts under a real SLURM: a private controller with two virtual nodes.

Run with `make test-slurm`. Skipped, with the reason, where such a controller cannot run.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.launch.runs import REPOSITORY, arrays, metrics
from tests.slurm.cluster import Cluster, private_cluster, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "possible"),
]
TRAIN = str(REPOSITORY / "launch" / "slurm_train.sbatch")
# A row per step and a checkpoint every fourth: a minute or two on two idle cores, whatever the
# speed of the steps themselves.
STEPS = int(os.environ.get("SLURM_TEST_STEPS", "1000"))
RUN = (
    "halting_jax.main",
    "--config=configs/halting_parity.py:tiny",
    "--config.train.log_every=1",
    f"--config.train.max_steps={STEPS}",
    "--config.eval.every=4",
    "--config.eval.val_size=8",
    "--config.eval.batch_size=8",
    "--config.logging.tensorboard=False",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes for the tests of this module."""
    with private_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


def wait_for(what: Any, limit_s: float, describe: Any) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, describe()
        time.sleep(0.5)


def test_two_nodes_join_by_the_variables_of_srun(cluster: Cluster, tmp_path: Path) -> None:
    # No launcher: the decision table alone, with the address that SLURM uses for the node.
    program = (
        "from common import dist; import jax, numpy as np; dist.initialize(); "
        "n = dist.gather_rows(np.array([jax.process_index()])); "
        "print(jax.process_index(), jax.process_count(), n.tolist(), "
        "dist.on_main(lambda: 'agreed'))"
    )
    python = str(REPOSITORY / ".venv/bin/python")
    printed = cluster.run(
        "srun", "-N2", "-n2", python, "-c", program, JAX_PLATFORMS="cpu", PYTHONPATH=str(REPOSITORY)
    )
    lines = sorted(line for line in printed.splitlines() if "agreed" in line)
    assert lines == ["0 2 [0, 1] agreed", "1 2 [0, 1] agreed"]


def test_a_step_that_lacks_a_variable_is_refused(cluster: Cluster) -> None:
    python = str(REPOSITORY / ".venv/bin/python")
    command = (
        f"unset SLURM_JOB_ID SLURM_JOBID; {python} -m halting_jax.main "
        "--config=configs/halting_parity.py:tiny; echo status $?"
    )
    printed = cluster.run(
        "srun", "-N2", "-n2", "bash", "-c", f"exec 2>&1; {command}", JAX_PLATFORMS="cpu"
    )
    assert printed.count("SLURM_JOB_ID is not set") == 2 and printed.count("status 2") == 2


def test_eval_script(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    module, config = "halting_jax.main", "--config=configs/halting_parity.py:tiny"
    cluster.run(
        "sbatch", "--wait", "-n1", f"--output={tmp_path}/train.txt", TRAIN, module, config,
        "--config.train.max_steps=20", f"--workdir={run}", JAX_PLATFORMS="cpu",
    )  # fmt: skip
    assert (run / "DONE").exists(), (tmp_path / "train.txt").read_text()
    cluster.run(
        "sbatch", "--wait", "-n1", f"--output={tmp_path}/eval.txt",
        str(REPOSITORY / "launch" / "slurm_eval.sbatch"), "configs/halting_parity.py:tiny",
        str(run), f"--output={tmp_path}/eval.json", JAX_PLATFORMS="cpu",
    )  # fmt: skip
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["step"] == 20, (tmp_path / "eval.txt").read_text()


def test_a_job_that_meets_its_time_limit_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """Two tasks on two nodes; SIGTERM ahead of the limit, save, requeue, finish."""
    log, stopped = tmp_path / "log.txt", tmp_path / "stopped"
    number = cluster.run(
        "sbatch", "--parsable", "-N2", "--ntasks-per-node=1", "--time=60", "--signal=TERM@90",
        f"--output={log}", TRAIN, *RUN, f"--workdir={stopped}", JAX_PLATFORMS="cpu",
    ).strip()  # fmt: skip
    begun = time.monotonic()

    def said() -> str:
        return (log.read_text(errors="replace") if log.exists() else "no log") + cluster.logs()

    rows = stopped / "metrics.jsonl"
    wait_for(lambda: rows.exists() and rows.read_text().count("\n") > 20, 600, said)
    # The limit moves to one or two minutes from now, so the warning comes within half a minute.
    minutes = math.ceil((time.monotonic() - begun + 5) / 60) + 1
    cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")
    wait_for(lambda: "queueing job" in said(), 300, said)
    reached = metrics(stopped)[-1]["iteration"]
    assert 20 < reached < STEPS, said()
    # SLURM keeps the time limit of a requeued job, and holds it back for two minutes.
    wait_for(lambda: cluster.job(number).get("JobState") == "PENDING", 120, said)
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    wait_for(lambda: (stopped / "DONE").exists(), 900, said)
    wait_for(lambda: cluster.job(number).get("JobState") == "COMPLETED", 60, said)
    assert cluster.job(number)["Restarts"] == "1"
    text = log.read_text(errors="replace")
    assert text.count(f"resuming at step {reached}") == 1 and "Traceback" not in text, text

    whole = tmp_path / "whole"
    cluster.run(
        "sbatch", "--wait", "-N2", "--ntasks-per-node=1", f"--output={tmp_path}/whole.txt",
        TRAIN, *RUN, f"--workdir={whole}", JAX_PLATFORMS="cpu",
    )  # fmt: skip
    # The norm of the gradient is the one value that XLA's CPU threads may add in another order.
    norm = "debug/grad_norm"
    for row, want in zip(metrics(stopped), metrics(whole), strict=True):
        assert row[norm] == pytest.approx(want[norm], rel=1e-6)
        assert row | {norm: 0} == want | {norm: 0}
    left, right = arrays(stopped), arrays(whole)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)
    assert len(metrics(whole)) == STEPS
    seconds = time.monotonic() - begun
    print(f"\nstopped at step {reached} of {STEPS}, restarted once, equal; {seconds:.0f} s")


def test_an_array_runs_a_sweep(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "sweep.py"
    config.write_text(
        "from configs.halting_parity import get_config\n"
        "def sweep(add):\n    for seed in range(2):\n        add({'seed': seed})\n"
    )
    cluster.run(
        str(REPOSITORY / ".venv/bin/python"), str(REPOSITORY / "launch" / "array.py"),
        f"--slurm=--wait --output={tmp_path}/%a.txt", f"{config}:tiny", "halting_jax.main",
        "--config.train.max_steps=20", f"--workdir={tmp_path}/runs", JAX_PLATFORMS="cpu",
    )  # fmt: skip
    made = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert made == ["000,seed=0", "001,seed=1"], (tmp_path / "0.txt").read_text()
    losses = [metrics(tmp_path / "runs" / name)[-1]["train/loss_total"] for name in made]
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    assert all((tmp_path / "runs" / name / "DONE").exists() for name in made)
