"""From the name of a backend to an engine; each imports its packages when it is built."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from common.engines.base import CAPABILITIES as ALL
from common.engines.base import Engine

Built = tuple[Engine, tuple[int, ...]]
"""An engine and the ids that end an answer, as the model's files declare them."""

# Known without importing anything, so that a stage can be refused before a model is loaded.
CAPABILITIES = {"jax": frozenset(ALL), "hf": frozenset(ALL), "vllm": frozenset(ALL)}


def build_engine(
    backend: str, directory: Path, token_bytes: Sequence[bytes], config: ConfigDict
) -> Built:
    """Loads a model into an engine.

    Args:
        backend: a key of CAPABILITIES.
        directory: the model in hub layout.
        token_bytes: what each token adds to a text.
        config: sections `model` and `jax`.

    Raises:
        UserError: the model or the backend's packages cannot be loaded.
    """
    builders: dict[str, Callable[[Path, Sequence[bytes], ConfigDict], Built]] = {
        "jax": _build_jax,
        "hf": _build_hf,
        "vllm": _build_vllm,
    }
    return builders[backend](directory, token_bytes, config)


def _build_jax(directory: Path, token_bytes: Sequence[bytes], config: ConfigDict) -> Built:
    from common.engines.jax_engine import JaxEngine
    from common.lm.sharding import make_model_mesh
    from common.lm.weights import load_model

    devices = config.jax.mesh or config.model.tensor_parallel_size
    mesh = make_model_mesh(devices) if devices > 1 else None
    model = load_model(directory, config.model.params_dtype or config.model.dtype, mesh)
    slots = config.jax.sample_slots or None
    return JaxEngine(model, token_bytes, mesh=mesh, sample_slots=slots), model.stop_ids


def _build_hf(directory: Path, token_bytes: Sequence[bytes], config: ConfigDict) -> Built:
    import torch

    from common.engines.hf_engine import SAMPLE_SLOTS, HfEngine
    from common.lm.config import read_stop_ids

    engine = HfEngine(
        directory,
        token_bytes,
        dtype=config.model.dtype,
        device="cuda" if torch.cuda.is_available() else "cpu",
        sample_slots=config.jax.sample_slots or SAMPLE_SLOTS,
    )
    return engine, read_stop_ids(directory)


def _build_vllm(directory: Path, token_bytes: Sequence[bytes], config: ConfigDict) -> Built:
    from common.engines.vllm_engine import VllmEngine
    from common.lm.config import read_stop_ids

    model = config.model
    engine = VllmEngine(
        directory,
        token_bytes,
        dtype=model.dtype,
        tensor_parallel_size=model.tensor_parallel_size,
        enforce_eager=model.enforce_eager,
        enable_chunked_prefill=model.enable_chunked_prefill,
        gpu_memory_utilization=model.gpu_memory_utilization,
        max_model_len=model.max_model_len,
        max_num_seqs=model.max_num_seqs,
        seed=config.seed,
    )
    return engine, read_stop_ids(directory)
