"""Test-wide settings; JAX reads them when it is first imported, hence at the top of the run."""

import gc
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of a test's time is compilation: without optimisation it takes half of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Subprocesses of tests import the packages from the repository root too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def _missing(mark: str) -> str:
    """Returns why tests with this mark cannot run here, or nothing."""
    if mark in ("torch", "vllm"):
        return "" if importlib.util.find_spec(mark) else f"{mark} is not installed"
    if mark == "slurm":
        return "" if shutil.which("sbatch") else "no SLURM client"
    import jax

    try:
        jax.devices("gpu")
    except RuntimeError:
        return "JAX sees no GPU (JAX_PLATFORMS=cpu,cuda shows one where there is a driver)"
    return ""


# Modules with few tests that take long each.
LONG = ("tests/bench/", "tests/campaign/", "tests/e2e/", "tests/common/test_dist_group.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, with the reason; slow tests get more time.

    Long modules come first: the last one keeps one worker busy while the others have nothing left.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))
    for mark in ("gpu", "torch", "vllm", "slurm"):
        marked = [item for item in items if item.get_closest_marker(mark)]
        reason = _missing(mark) if marked else ""
        for item in marked:
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


# Every compiled program maps memory, and a process may have some 65,000 mappings: beyond them the
# compiler aborts. A worker that has run most of the suite comes near.
MAPPINGS = 35_000


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between modules, drops compiled programs once they have become many."""
    jax = sys.modules.get("jax")
    if jax is None or (nextitem is not None and nextitem.path == item.path):
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()
