"""From the name of an engine to an engine; each imports its packages when it is built."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.engines.base import CAPABILITIES, Engine, require_capabilities
from common.errors import require

# Known without importing anything, so that work can be refused before a model is loaded.
ENGINES: Mapping[str, frozenset[str]] = {
    "jax": frozenset(CAPABILITIES),
    "hf": frozenset(CAPABILITIES),
    "vllm": frozenset(CAPABILITIES),
}


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How a model is run.

    Attributes:
        dtype: Of weights and activations; "auto" = float32 on a CPU, bfloat16 on a GPU.
        devices: The model is split over so many.
        sample_slots: Rows sampled side by side by `jax` and `hf`; 0 = the engine's choice.
        vllm: Further keyword arguments of `VllmEngine`.
    """

    dtype: str = "auto"
    devices: int = 1
    sample_slots: int = 0
    vllm: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_engine(name: str, needed: Sequence[str] = ()) -> None:
    """Refuses an unknown engine, or one that lacks something, without importing it.

    Args:
        name: A key of ENGINES.
        needed: Entries of `base.CAPABILITIES`.

    Raises:
        UserError: Names what is missing.
    """
    require(name in ENGINES, f"backend '{name}' is none of {', '.join(ENGINES)}")
    require_capabilities(name, ENGINES[name], needed)
    if name == "vllm":
        from common.engines.vllm_version import require_vllm

        require_vllm()


def make_engine(
    name: str,
    directory: str | Path,
    token_bytes: Sequence[bytes],
    options: EngineOptions | None = None,
    needed: Sequence[str] = (),
) -> Engine:
    """Loads a model into an engine.

    Args:
        name: A key of ENGINES.
        directory: Model in hub layout.
        token_bytes: What each token adds to a text; b"" for special tokens.
        options: How it is run.
        needed: What the engine must be capable of; checked before weights are loaded.

    Returns:
        The engine.

    Raises:
        UserError: The engine or the model cannot be used.
    """
    check_engine(name, needed)
    builders: dict[str, Callable[[Path, Sequence[bytes], EngineOptions], Engine]] = {
        "jax": _make_jax,
        "hf": _make_hf,
        "vllm": _make_vllm,
    }
    return builders[name](Path(directory), token_bytes, options or EngineOptions())


def _make_jax(path: Path, token_bytes: Sequence[bytes], options: EngineOptions) -> Engine:
    import jax

    from common.engines.jax_engine import JaxEngine
    from common.lm.sharding import make_model_mesh
    from common.lm.weights import load_model

    mesh = make_model_mesh(options.devices) if options.devices > 1 else None
    on_cpu = jax.default_backend() == "cpu"
    model = load_model(path, _dtype(options, on_cpu), mesh)
    return JaxEngine(model, token_bytes, mesh=mesh, sample_slots=options.sample_slots or None)


def _make_hf(path: Path, token_bytes: Sequence[bytes], options: EngineOptions) -> Engine:
    import torch

    from common.engines.hf_engine import SAMPLE_SLOTS, HfEngine

    require(options.devices == 1, "backend=hf runs on one device: use jax or vllm for more")
    on_cpu = not torch.cuda.is_available()
    return HfEngine(
        path,
        token_bytes,
        dtype=_dtype(options, on_cpu),
        device="cpu" if on_cpu else "cuda",
        sample_slots=options.sample_slots or SAMPLE_SLOTS,
    )


def _make_vllm(path: Path, token_bytes: Sequence[bytes], options: EngineOptions) -> Engine:
    from common.engines.vllm_engine import VllmEngine
    from common.engines.vllm_version import on_cpu

    return VllmEngine(
        path,
        token_bytes,
        dtype=_dtype(options, on_cpu()),
        tensor_parallel_size=options.devices,
        **options.vllm,
    )


def _dtype(options: EngineOptions, on_cpu: bool) -> str:
    if options.dtype != "auto":
        return options.dtype
    return "float32" if on_cpu else "bfloat16"
