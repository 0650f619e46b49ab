"""The launch scripts: commands and environments, pass-through, signals, sweeps, a stub SLURM."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import Interrupted, UserError
from launch import local, ranks, slurm, sweep
from launch.ranks import Rank, run_all
from tests.launch.runs import REPOSITORY

SCRIPTS = REPOSITORY / "launch"
MODULE = ["halting_jax.main", "--config=configs/halting_parity.py:tiny", "--unknown=1"]


def shell(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """One of the scripts, without the variables of a group or a job."""
    environ = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_P", "JAX_C"))
    }
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        env={**environ, "LAUNCH_PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_local_dry_run_names_command_and_environment_of_every_rank() -> None:
    done = shell("local.sh", "--dry_run", "2", *MODULE, CUDA_VISIBLE_DEVICES="")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2
    for number, line in enumerate(lines):
        assert line.startswith(f"rank {number} on this machine: ")
        for word in (
            "JAX_NUM_PROCESSES=2",
            f"JAX_PROCESS_ID={number}",
            "JAX_COORDINATOR_ADDRESS=127.0.0.1:",
            "JAX_PLATFORMS=cpu",
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.90",
            f"{sys.executable} -u -m {' '.join(MODULE)}",
        ):
            assert word in line
    # Both name the same coordinator.
    assert len({line.split("JAX_COORDINATOR_ADDRESS=")[1].split()[0] for line in lines}) == 1


def test_settings_of_env_give_way_to_the_users() -> None:
    given = {"LAUNCH_GPU_SHARE": "0.45", "OMP_NUM_THREADS": "3", "JAX_COMPILATION_CACHE_DIR": "/c"}
    line = shell("local.sh", "--dry_run", "1", *MODULE, **given).stdout
    for word in ("MEM_FRACTION=0.45", "OMP_NUM_THREADS=3", "JAX_COMPILATION_CACHE_DIR=/c"):
        assert word in line
    assert "JAX_NUM_PROCESSES" not in line


def test_local_gives_each_rank_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    planned = local.plan(2, ("python",), 1234, gpus=4)
    assert [r.environment["JAX_LOCAL_DEVICE_IDS"] for r in planned] == ["0", "1"]
    assert all("JAX_PLATFORMS" not in r.environment for r in planned)
    assert local.plan(1, ("python",), 1234, gpus=4)[0].environment == {}
    with pytest.raises(UserError, match="5 processes, but 4 GPUs"):
        local.plan(5, ("python",), 1234, gpus=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert local.local_gpus() == 2


JOB = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "2",
}


def test_slurm_dry_run_inside_and_outside_a_job() -> None:
    done = shell("slurm_train.sbatch", "--dry_run", *MODULE, **JOB, PATH="/usr/bin:/bin")
    step, *lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 4, done.stderr
    assert step.startswith("step: srun --kill-on-bad-exit=1 --ntasks=4 --ntasks-per-node=2 ")
    assert step.endswith(" ".join(MODULE))
    for number, line in enumerate(lines):
        assert line.startswith(f"rank {number} on node {number // 2}: ")
        assert "JAX_COORDINATOR_ADDRESS=gpu07:22345" in line
        assert f"JAX_NUM_PROCESSES=4 JAX_PROCESS_ID={number}" in line
    outside = shell("slurm_train.sbatch", "--dry_run", *MODULE)
    assert outside.returncode == 0 and "JAX_" not in outside.stdout.replace("JAX_COMP", "")
    refused = shell("slurm_train.sbatch", *MODULE)
    assert refused.returncode == 2
    assert "SLURM_JOB_ID and SLURM_JOB_NODELIST is not set" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_restarted_job_takes_another_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.startup, "node_address", lambda name: f"ip-{name}")
    assert slurm.coordinator(JOB) == "ip-gpu07:22345"
    again = slurm.coordinator(JOB | {"SLURM_RESTART_COUNT": "1"})
    assert again.startswith("ip-gpu07:") and again != "ip-gpu07:22345"


def test_eval_script_takes_config_and_checkpoint() -> None:
    for config, module in (("gsm8k", "reoac_jax"), ("halting_maze_act", "halting_jax")):
        done = shell("slurm_eval.sbatch", "--dry_run", f"configs/{config}.py:x", "runs/r", "--l=3")
        words = f"-m {module}.main --mode=eval --config=configs/{config}.py:x --checkpoint=runs/r"
        assert f"{words} --l=3" in done.stdout
    assert shell("slurm_eval.sbatch", "configs/gsm8k.py").returncode == 2


def test_interactive_passes_options_on() -> None:
    done = shell("interactive.sh", "--dry_run", "--gres=gpu:2", "--time=2:00:00")
    assert (
        done.stdout.startswith("srun ") and "--gres=gpu:2 --time=2:00:00 --pty bash" in done.stdout
    )


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        ("local.sh", ["halting_jax.main"], "number of processes comes first"),
        ("local.sh", ["0", "halting_jax.main"], "number of processes comes first"),
        ("local.sh", ["2", "--config=x"], "module comes first"),
        ("slurm_train.sbatch", ["--config=x", "m"], "module comes first"),
    ],
)
def test_refusals_are_one_line(script: str, arguments: list[str], words: str) -> None:
    done = shell(script, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr


def rank(number: int, program: str) -> Rank:
    return Rank(number, "here", {}, (sys.executable, "-c", program))


def test_a_failing_rank_takes_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_S", 0.3)
    begun = time.monotonic()
    assert run_all([rank(0, "import time; time.sleep(60)"), rank(1, "raise SystemExit(7)")]) == 7
    assert time.monotonic() - begun < 20
    assert run_all([rank(0, ""), rank(1, "")]) == 0
    assert run_all([rank(0, "raise SystemExit(3)"), rank(1, "raise SystemExit(3)")]) == 3


@pytest.mark.parametrize("handled", [True, False])
def test_a_signal_reaches_the_ranks(tmp_path: Path, handled: bool) -> None:
    # Without a handler yet the rank dies of the signal; it had done nothing, so it may go on.
    ready = tmp_path / "ready"
    handler = "signal.signal(signal.SIGTERM, lambda *a: sys.exit(3))" if handled else ""
    program = (
        "import signal, sys, time, pathlib\n"
        f"{handler}\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)"
    )
    outer = (
        "import sys; from launch.ranks import Rank, run_all; "
        f"sys.exit(run_all([Rank(0, '', {{}}, (sys.executable, '-c', {program!r}))]))"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], cwd=REPOSITORY)
    try:
        limit = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 3
    finally:
        process.kill()


STUBS = {
    "srun": """#!/bin/bash
echo "srun $*" >> "$STUB_LOG"
echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES" >> "$STUB_LOG"
while [ "$1" != -m ]; do python=$1; shift; done
SLURM_PROCID=0 exec "$python" "$@"
""",
    "scontrol": """#!/bin/bash
echo "scontrol $*" >> "$STUB_LOG"
[ "$3" = node ] && echo "NodeName=$4 Arch=x NodeAddr=10.1.2.3 NodeHostName=x"
exit 0
""",
}


@pytest.mark.parametrize("status, again", [(0, False), (3, True), (5, False)])
def test_a_job_under_a_stub_slurm(tmp_path: Path, status: int, again: bool) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, text in STUBS.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755 | stat.S_IXUSR)
    (tmp_path / "ending.py").write_text(f"raise SystemExit({status})")
    log = tmp_path / "log"
    done = shell(
        "slurm_train.sbatch",
        "ending",
        "--flag",
        **JOB,
        STUB_LOG=str(log),
        PATH=f"{bin_}:{os.environ['PATH']}",
        PYTHONPATH=f"{tmp_path}:{REPOSITORY}",
        SLURM_SUBMIT_DIR=str(tmp_path),
    )
    text = log.read_text()
    assert "10.1.2.3:22345 4" in text and "srun --kill-on-bad-exit=1 --ntasks=4" in text
    assert ("scontrol requeue 12345" in text) == again
    assert done.returncode == status, done.stderr
    assert not list(tmp_path.glob(".launch-status-*"))


def test_restarts_have_an_end() -> None:
    with pytest.raises(Interrupted, match="restarted 2 times"):
        slurm.requeue(JOB | {"SLURM_RESTART_COUNT": "2", "LAUNCH_MAX_RESTARTS": "2"})


@pytest.fixture
def swept(tmp_path: Path) -> str:
    """A config with a sweep of three runs."""
    path = tmp_path / "swept.py"
    path.write_text(
        "from configs.halting_parity import get_config\n"
        "def sweep(add):\n"
        "    for lr in (1e-3, 3e-4):\n"
        "        add({'optim.lr': lr})\n"
        "    add({'optim.lr': 1e-3, 'seed': 5})\n"
    )
    return f"{path}:tiny"


def test_a_sweep_becomes_one_command_per_run(swept: str) -> None:
    runs = sweep.runs_of(swept)
    assert runs == [{"optim.lr": 1e-3}, {"optim.lr": 3e-4}, {"optim.lr": 1e-3, "seed": 5}]
    given = ["halting_jax.main", f"--config={swept}", "--workdir=root", "--more=1"]
    assert sweep.settings(given, 2) == [
        *(given[0], given[1], given[3]),
        "--config.optim.lr=0.001",
        "--config.seed=5",
        "--workdir=root/002,lr=0.001,seed=5",
    ]
    assert sweep.with_settings([*given, "--sweep"], {"SLURM_ARRAY_TASK_ID": "1"})[-1].endswith(
        "001,lr=0.0003"
    )
    assert sweep.with_settings(given, {}) == given
    for arguments, environ, words in (
        ([*given, "--sweep"], {}, "needs a job array"),
        ([*given, "--sweep"], {"SLURM_ARRAY_TASK_ID": "3"}, "run 3 of a sweep of 3 runs"),
        (["m", "--sweep"], {"SLURM_ARRAY_TASK_ID": "0"}, "needs --config"),
    ):
        with pytest.raises(UserError, match=words):
            sweep.with_settings(arguments, environ)


@pytest.mark.parametrize(
    "body, words",
    [
        ("", "no function sweep"),
        ("def sweep(add): pass", "adds no run"),
        ("def sweep(add): add({'optim.rl': 1})", r"run 0.*unknown config key optim.rl.*optim.lr"),
        ("def sweep(add):\n    add({'seed': 1})\n    add({'seed': 1})", "runs 0 and 1 .* equal"),
    ],
)
def test_bad_sweeps(tmp_path: Path, body: str, words: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(f"from configs.halting_parity import get_config\n{body}\n")
    with pytest.raises(UserError, match=words):
        sweep.runs_of(str(path))


def array(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "array.py"), *arguments],
        env={**os.environ, "LAUNCH_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_array_dry_run(swept: str) -> None:
    done = array("--slurm=--gres=gpu:1", "--dry_run", swept, "halting_jax.main", "--x=1")
    first, *tasks = done.stdout.splitlines()
    assert first.startswith("sbatch --array=0-2 --job-name=swept --gres=gpu:1 ")
    assert first.endswith(f"halting_jax.main --config={swept} --x=1 --sweep") and len(tasks) == 3
    here = array("--dry_run", "--workers=2", swept, "halting_jax.main")
    assert here.stdout.count("JAX_PLATFORMS=cpu") == 3
    gpus = array("--dry_run", swept, "halting_jax.main", CUDA_VISIBLE_DEVICES="0,1").stdout
    assert gpus.count("CUDA_VISIBLE_DEVICES=0") == 2 and gpus.count("CUDA_VISIBLE_DEVICES=1") == 1
    assert array("--what", swept, "m").returncode == 2 and array(swept).returncode == 2


def test_array_works_through_the_runs(swept: str, tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text(
        "import sys; raise SystemExit(3 if any('seed' in w for w in sys.argv) else 0)"
    )
    done = array("--workers=2", swept, "ending", PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert done.returncode == 3
    assert done.stdout.count("done") == 2 and done.stdout.count("interrupted") == 1
