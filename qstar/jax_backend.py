"""Weights for the JAX engine, and how many slots the memory holds."""

import os
from pathlib import Path
from typing import Any

import jax

from common.errors import require
from common.lm.weights import Model, load_model
from qstar.engine import JaxBackend, Plan
from qstar.networks import DecoderNetwork
from qstar.system import System

MAX_SLOTS = 256
MAX_SLOTS_CPU = 16  # enough rows to keep a few cores busy; each more only takes memory
_SHARE = 0.8  # of the free memory that is used
GIB = 2.0**30


def load(system: System, role: str, models: dict[Any, Model]) -> Model:
    """The model of a role, read once.

    Args:
        system: the pair.
        role: "theta" or "t".
        models: what is loaded already, by directory and dtype; gets what is loaded now.

    Raises:
        UserError: it cannot be loaded.
    """
    key = system.sources[role].path, system.dtype()
    if key not in models:
        models[key] = load_model(*key)
    return models[key]


def open_jax(
    system: System,
    slots: int | None,
    prompt_tokens: int,
    models: dict[Any, Any] | None = None,
) -> JaxBackend:
    """Loads the models, one parameter set where both are the same, and makes the engine.

    Args:
        system: the pair.
        slots: S; None = as many as memory holds, at most `MAX_SLOTS`.
        prompt_tokens: longest prompt that will come.
        models: weights that are loaded already, see `load`; gets the compiled programs as well.

    Raises:
        UserError: a model cannot be loaded, or not even one slot fits.
    """
    cache = {} if models is None else models
    roles = system.roles[:1] if system.shared else system.roles
    used = [load(system, role, cache) for role in roles]
    networks = tuple(DecoderNetwork(model.cfg) for model in used)
    plan = Plan(networks, system.decoding)
    config = system.config
    run = config.run
    if slots is None:
        longest = prompt_tokens + system.decoding.max_new_tokens - 1
        slots = fitting_slots(plan, longest)
    backend = JaxBackend(
        plan,
        [model.params for model in used],
        system.columns(),
        slots,
        config.seed,
        prompt_tokens,
        run.deterministic,
        run.burst,
        run.prefill_rows,
    )
    cache[plan] = backend.programs
    return backend


def slot_bytes(plan: Plan, longest: int) -> int:
    """Memory of one slot: caches and its share of the logits, their copies and the outputs."""
    cache = plan.rows_per_slot * sum(network.token_bytes for network in plan.networks) * longest
    # Raw and common logits of both models, log weights and what filters and draws keep.
    work = 12 * 4 * plan.decoding.size
    return cache + work


def fitting_slots(plan: Plan, longest: int, free: float | None = None) -> int:
    """As many slots as the free memory holds, at most `MAX_SLOTS` (CPUs: `MAX_SLOTS_CPU`).

    Args:
        plan: networks; their weights are loaded already.
        longest: tokens of the longest sequence.
        free: bytes; None = what the device has left.

    Raises:
        UserError: if not even one fits, with the numbers.
    """
    each = slot_bytes(plan, longest)
    free = free_memory() if free is None else free
    count = int(_SHARE * free // each)
    require(
        count >= 1,
        f"not even one sequence of {longest} tokens fits: it takes {each / GIB:.2f} GiB of the "
        f"{free / GIB:.2f} GiB that are free; lower data.max_prompt_tokens or "
        "sampling.max_new_tokens",
    )
    return min(count, MAX_SLOTS_CPU if jax.default_backend() == "cpu" else MAX_SLOTS)


def free_memory() -> float:
    """Bytes left on the first device; on CPUs, available memory of the machine or container."""
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        available = min(available, int(limit[0]) - int(used[0]))
    return float(available)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
