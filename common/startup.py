"""Which processes belong to this command: the decision table of the start, from variables alone.

| what stands in the environment | decision |
|---|---|
| `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID` (or their flags) | that group |
| `JAX_COORDINATOR_ADDRESS` inside a SLURM step | number and count from SLURM |
| only a part of the three | refused, with the name of the missing one |
| a SLURM step of several tasks, complete | its tasks; coordinator = first node of the step |
| a SLURM step of several tasks, a variable missing | refused, with the name of the missing one |
| a SLURM step of one task, a batch or interactive shell | one process |
| several ranks of another launcher (mpirun) | refused: they would not know of each other |
| nothing | one process |

Nothing here touches a device, so the table can be tested and shown (`launch/*.sh --dry_run`).
"""

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, MutableMapping

from common.errors import UserError

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
NUM_PROCESSES = "JAX_NUM_PROCESSES"
PROCESS_ID = "JAX_PROCESS_ID"
LOCAL_DEVICES = "JAX_LOCAL_DEVICE_IDS"
_EXPLICIT = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
_FOREIGN = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_CURE = f"start it with srun, or set {', '.join(_EXPLICIT)}"


@dataclasses.dataclass(frozen=True)
class Start:
    """How this process starts.

    Attributes:
        source: `single`, `explicit` or `slurm`: the row of the table that decided.
        num_processes: of the whole command.
        process_id: 0 is the main process.
        coordinator: `host:port` of the main process; "" for one process.
        local_devices: numbers of the accelerators of this host that this process takes; None: all.
    """

    source: str
    num_processes: int = 1
    process_id: int = 0
    coordinator: str = ""
    local_devices: tuple[int, ...] | None = None


def decide(
    environ: Mapping[str, str] | None = None,
    address_of: Callable[[str], str] | None = None,
) -> Start:
    """Applies the decision table.

    Args:
        environ: variables; default: those of this process. Empty ones count as unset.
        address_of: node name -> address that resolves everywhere; default: `node_address`.

    Raises:
        UserError: the variables are incomplete or contradict each other; names the variable.
    """
    given = {k: v for k, v in (os.environ if environ is None else environ).items() if v.strip()}
    in_step = "SLURM_STEP_ID" in given or "SLURM_STEP_NUM_TASKS" in given
    if any(name in given for name in _EXPLICIT):
        return _explicit(given, in_step)
    if in_step:
        return _slurm(given, address_of or node_address)
    for name in _FOREIGN:
        if _integer(given, name, default=1) > 1:
            raise UserError(
                f"{name}={given[name]}: several ranks were started, but nothing tells them of each "
                f"other: {_CURE}"
            )
    return Start("single")


def require_single(program: str, instead: str) -> None:
    """Refuses several processes for a program that knows only itself.

    Args:
        program: as the user calls it.
        instead: how its work is spread.

    Raises:
        UserError: the environment or flags name several processes, or only a part of a group.
    """
    how = decide(address_of=lambda name: name)
    if how.num_processes > 1:
        raise UserError(
            f"{program} runs as one process, but {how.num_processes} were started "
            f"({'a SLURM step' if how.source == 'slurm' else COORDINATOR}): they would do the same "
            f"work and write the same files; start one, and {instead}"
        )


def take_devices(how: Start, environ: MutableMapping[str, str] | None = None) -> None:
    """Leaves this process only the accelerators of its own, before any library looks for them.

    Args:
        how: its start; nothing is done where it may take all.
        environ: changed; default: the variables of this process.
    """
    if how.local_devices is None:
        return
    variables = os.environ if environ is None else environ
    visible = [v for v in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    own = [visible[n] if n < len(visible) else str(n) for n in how.local_devices]
    variables["CUDA_VISIBLE_DEVICES"] = ",".join(own)


def _explicit(given: Mapping[str, str], in_step: bool) -> Start:
    found = {name: given[name] for name in _EXPLICIT if name in given}
    if in_step and COORDINATOR in found:
        # The launcher chose the coordinator; the step knows the rest.
        for name, slurm in ((NUM_PROCESSES, "SLURM_STEP_NUM_TASKS"), (PROCESS_ID, "SLURM_PROCID")):
            if name not in found and slurm in given:
                found[name] = given[slurm]
    if _integer(found, NUM_PROCESSES, default=0) == 1:
        return Start("explicit", local_devices=_local_devices(given, 1))
    missing = [name for name in _EXPLICIT if name not in found]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing beside {', '.join(found)}: set all of "
            f"{', '.join(_EXPLICIT)}, or none to run as one process"
        )
    count, number = _integer(found, NUM_PROCESSES), _integer(found, PROCESS_ID)
    if count < 1 or not 0 <= number < count:
        raise UserError(
            f"{PROCESS_ID}={number} of {NUM_PROCESSES}={count}: processes are numbered from 0 to "
            f"{NUM_PROCESSES}-1"
        )
    if not re.fullmatch(r".+:\d{1,5}", found[COORDINATOR]):
        raise UserError(f"{COORDINATOR}={found[COORDINATOR]!r} is not HOST:PORT")
    return Start(
        "explicit", count, number, found[COORDINATOR], _local_devices(given, _tasks_here(given))
    )


def _slurm(given: Mapping[str, str], address_of: Callable[[str], str]) -> Start:
    count_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in given else "SLURM_NTASKS"
    if _integer(given, count_name, default=0) == 1:
        return Start("single")
    nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in given else "SLURM_JOB_NODELIST"
    needed = ("SLURM_JOB_ID", count_name, "SLURM_PROCID", nodes)
    missing = [name for name in needed if name not in given]
    if missing:
        raise UserError(
            f"this is a SLURM step, but {' and '.join(missing)} is not set: it cannot be known "
            f"which of the processes this is; {_CURE}"
        )
    count, number = _integer(given, count_name), _integer(given, "SLURM_PROCID")
    if not 0 <= number < count:
        raise UserError(f"SLURM_PROCID={number} of {count_name}={count}: {_CURE}")
    port = port_of(_integer(given, "SLURM_JOB_ID"), _integer(given, "SLURM_STEP_ID", default=0))
    address = address_of(first_host(given[nodes]))
    return Start(
        "slurm", count, number, f"{address}:{port}", _local_devices(given, _tasks_here(given))
    )


def _tasks_here(given: Mapping[str, str]) -> int:
    """Tasks on this node: the node's entry of a list such as `4(x2),1`."""
    text = given.get("SLURM_STEP_TASKS_PER_NODE") or given.get("SLURM_TASKS_PER_NODE") or "1"
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            return 1
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    node = _integer(given, "SLURM_NODEID", default=0)
    return counts[node] if node < len(counts) else 1


def _local_devices(given: Mapping[str, str], tasks_here: int) -> tuple[int, ...] | None:
    """Explicit numbers, or one accelerator per task where a node runs several tasks."""
    if LOCAL_DEVICES in given:
        try:
            return tuple(int(word) for word in given[LOCAL_DEVICES].split(","))
        except ValueError:
            raise UserError(
                f"{LOCAL_DEVICES}={given[LOCAL_DEVICES]!r} is no list of numbers such as 0,1"
            ) from None
    if tasks_here <= 1 or "SLURM_LOCALID" not in given:
        return None
    visible = [v for v in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    # With --gpus-per-task each task sees only its own accelerator, which is then number 0.
    return (0,) if len(visible) == 1 else (_integer(given, "SLURM_LOCALID"),)


def port_of(job: int, step: int = 0) -> int:
    """The coordinator's port of a step: the same on every node, apart for neighbouring jobs."""
    return 20000 + (job + 101 * step) % 10000


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list: `gpu[03-05,9],x1` -> `gpu03`."""
    match = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodelist.strip())
    assert match is not None
    return "".join(part or "" for part in match.groups())


def node_address(name: str) -> str:
    """The address SLURM itself uses for a node (its name need not resolve), else the name."""
    if shutil.which("scontrol") is None:
        return name
    shown = subprocess.run(
        ["scontrol", "-o", "show", "node", name], capture_output=True, text=True, timeout=60
    )
    match = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
    return match.group(1) if match else name


def _integer(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in given and default is not None:
        return default
    try:
        return int(given[name])
    except ValueError:
        raise UserError(f"{name}={given[name]!r} is not a whole number") from None
