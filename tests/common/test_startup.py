"""The decision table of the start, from variables alone."""

import pytest

from common.errors import UserError
from common.startup import Start, decide, first_host, port_of, require_single, take_devices

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
STEP = {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
# What a batch shell holds: the job's variables, but no step.
BATCH = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def address(name: str) -> str:
    return f"ip-of-{name}"


def start(environ: dict[str, str]) -> Start:
    return decide(environ, address)


@pytest.mark.parametrize(
    "environ, wanted",
    [
        pytest.param({}, Start("single"), id="nothing"),
        pytest.param({"JAX_NUM_PROCESSES": ""}, Start("single"), id="empty is unset"),
        pytest.param({"JAX_NUM_PROCESSES": "1"}, Start("explicit"), id="explicitly one"),
        pytest.param(EXPLICIT, Start("explicit", 4, 3, "10.0.0.1:1234"), id="explicit"),
        pytest.param(
            EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": "2,3"},
            Start("explicit", 4, 3, "10.0.0.1:1234", (2, 3)),
            id="own devices",
        ),
        pytest.param(BATCH, Start("single"), id="batch shell"),
        pytest.param(
            STEP, Start("slurm", 4, 2, f"ip-of-n1:{port_of(42)}", (0,)), id="slurm, task per device"
        ),
        pytest.param(
            STEP | {"SLURM_LOCALID": "1", "SLURM_PROCID": "3"},
            Start("slurm", 4, 3, f"ip-of-n1:{port_of(42)}", (1,)),
            id="second task of a node",
        ),
        pytest.param(
            STEP | {"SLURM_LOCALID": "1", "SLURM_PROCID": "3", "CUDA_VISIBLE_DEVICES": "5"},
            Start("slurm", 4, 3, f"ip-of-n1:{port_of(42)}", (0,)),
            id="one visible device",
        ),
        pytest.param(
            STEP
            | {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_PROCID": "1",
            },
            Start("slurm", 2, 1, f"ip-of-n1:{port_of(42)}"),
            id="slurm, task per node",
        ),
        pytest.param(STEP | {"SLURM_STEP_NUM_TASKS": "1"}, Start("single"), id="step of one task"),
        pytest.param(
            STEP | {"JAX_COORDINATOR_ADDRESS": "h:9"},
            Start("explicit", 4, 2, "h:9", (0,)),
            id="the launcher's coordinator, the rest from the step",
        ),
    ],
)
def test_decision(environ: dict[str, str], wanted: Start) -> None:
    assert start(environ) == wanted


def test_a_number_beyond_the_tasks() -> None:
    with pytest.raises(UserError, match="SLURM_PROCID=2 of SLURM_STEP_NUM_TASKS=2"):
        start(STEP | {"SLURM_STEP_NUM_TASKS": "2"})


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"])
def test_a_partial_step_names_what_is_missing(missing: str) -> None:
    environ = {k: v for k, v in STEP.items() if k != missing}
    named = "SLURM_JOB_NODELIST" if missing == "SLURM_STEP_NODELIST" else missing
    with pytest.raises(UserError, match=rf"{named} is not set.*srun.*JAX_COORDINATOR_ADDRESS"):
        start(environ)


def test_the_job_replaces_what_the_step_lacks() -> None:
    environ = {k: v for k, v in STEP.items() if k not in ("SLURM_STEP_NUM_TASKS",)}
    del environ["SLURM_STEP_NODELIST"]
    environ |= {"SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "x7,y"}
    assert start(environ) == Start("slurm", 4, 2, f"ip-of-x7:{port_of(42)}", (0,))


@pytest.mark.parametrize("missing", list(EXPLICIT))
def test_a_partial_group_names_what_is_missing(missing: str) -> None:
    environ = {k: v for k, v in EXPLICIT.items() if k != missing}
    with pytest.raises(UserError, match=f"^{missing} missing beside "):
        start(environ)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 of JAX_NUM_PROCESSES=4"),
        ({"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID='x' is not a whole number"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "HOST:PORT"),
        ({"JAX_LOCAL_DEVICE_IDS": "a"}, "JAX_LOCAL_DEVICE_IDS='a'"),
    ],
)
def test_bad_values(change: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        start(EXPLICIT | change)


def test_ranks_of_another_launcher_are_refused() -> None:
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_SIZE=2.*JAX_NUM_PROCESSES"):
        start({"OMPI_COMM_WORLD_SIZE": "2"})
    assert start({"OMPI_COMM_WORLD_SIZE": "1"}) == Start("single")


def test_host_names_and_ports() -> None:
    assert first_host("n[1-2]") == "n1"
    assert first_host("gpu[03-05,9],x1") == "gpu03"
    assert first_host("a,b") == "a"
    assert first_host("rack2-[7,9]-ib") == "rack2-7-ib"
    assert first_host("alone") == "alone"
    ports = {port_of(job, step) for job in range(1, 60) for step in (0, 1)}
    assert len(ports) == 118 and min(ports) >= 20000 and max(ports) < 30000


def test_flags_win_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    from absl import flags as absl_flags

    from common import flags

    for name in EXPLICIT:
        monkeypatch.setenv(name, "")
    values = absl_flags.FlagValues()
    flags.define_flags("configs/halting_parity.py:tiny", ("train",), values)
    flags.parse(["main", "--coordinator=h:1", "--num_processes=2", "--process_id=1"], values)
    assert decide() == Start("explicit", 2, 1, "h:1")


@pytest.mark.parametrize(
    ("environ", "word"),
    [(EXPLICIT, "JAX_COORDINATOR_ADDRESS"), (STEP, "a SLURM step")],
)
def test_a_program_of_one_process_refuses_several(
    environ: dict[str, str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"one process, but 4 were started .{word}.*do as told"):
        require_single("a program", "do as told")


def test_a_program_of_one_process_starts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in BATCH.items():
        monkeypatch.setenv(name, value)
    require_single("a program", "do as told")


@pytest.mark.parametrize(
    ("local", "visible", "wanted"),
    [
        (None, "2,5", "2,5"),
        ((1,), "2,5", "5"),
        ((0,), "5", "5"),
        ((3,), None, "3"),
        ((0, 1), "4,6,7", "4,6"),
    ],
)
def test_a_process_sees_its_own_devices(
    local: tuple[int, ...] | None, visible: str | None, wanted: str
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    take_devices(Start("slurm", 4, 3, "here:1", local), environ)
    assert environ.get("CUDA_VISIBLE_DEVICES") == wanted
