"""Which vLLM the engines work with and how its environment is set; importing it loads no vLLM."""

import importlib.metadata
import importlib.util
import os

from common.errors import require

SUPPORTED = ((0, 18), (0, 32))
"""First and last minor version whose V1 worker, scheduler and logits processors are known."""
CPU_DISTRIBUTION = "vllm-cpu"

# In-process, so that vectors, states and logits need no serialisation; V1 runner, whose batch the
# hooks read and which alone has V1 logits processors; no usage statistics.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_ENVIRONMENT_CPU = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def installed_version() -> tuple[str, str]:
    """Distribution and version of the vLLM that would be imported; empty where there is none."""
    if importlib.util.find_spec("vllm") is None:
        return "", ""
    for name in ("vllm", CPU_DISTRIBUTION):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm", "0"


def require_vllm() -> str:
    """The installed distribution's name.

    Raises:
        UserError: vLLM is missing, or its interface is another one; names what is supported.
    """
    name, version = installed_version()
    require_supported(name, version, others="jax or hf")
    return name


def require_supported(name: str, version: str, others: str) -> None:
    """Refuses what `installed_version` has found.

    Args:
        name: Distribution; empty where there is none.
        version: Its version.
        others: Backends that can be chosen instead.

    Raises:
        UserError: vLLM is missing, or its interface is another one; names what is supported.
    """
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    supported = f"supported are vLLM {low} to {high}"
    cure = f"install one ({CPU_DISTRIBUTION}=={high}.0 on a CPU) or use backend={others}"
    require(bool(name), f"backend=vllm: vLLM is not installed; {supported}: {cure}")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    require(
        SUPPORTED[0] <= numbers <= SUPPORTED[1],
        f"backend=vllm: {name} {version} is not supported; {supported}: {cure}",
    )


def on_cpu() -> bool:
    """Whether the installed vLLM is its CPU build."""
    return installed_version()[0] == CPU_DISTRIBUTION


def prepare_environment() -> None:
    """Settings vLLM reads when it is imported; what the user has set stays."""
    values = dict(_ENVIRONMENT)
    if on_cpu():
        values |= _ENVIRONMENT_CPU | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    for key, value in values.items():
        os.environ.setdefault(key, value)
