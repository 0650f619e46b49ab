"""From the section `model` of a config to an engine."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from common.engines.base import Engine
from common.engines.factory import EngineOptions, make_engine


def build_engine(
    backend: str, directory: Path, token_bytes: Sequence[bytes], config: ConfigDict
) -> Engine:
    """Loads a model into an engine.

    Args:
        backend: a name of `common.engines.factory.ENGINES`.
        directory: the model in hub layout.
        token_bytes: what each token adds to a text.
        config: sections `model` and `jax`.

    Raises:
        UserError: the model or the backend's packages cannot be loaded.
    """
    model = config.model
    dtype, devices = str(model.dtype), int(model.tensor_parallel_size)
    if backend == "jax":
        dtype, devices = model.params_dtype or dtype, config.jax.mesh or devices
    options = EngineOptions(
        dtype=dtype,
        devices=devices,
        sample_slots=config.jax.sample_slots,
        vllm={
            "enforce_eager": model.enforce_eager,
            "enable_chunked_prefill": model.enable_chunked_prefill,
            "gpu_memory_utilization": model.gpu_memory_utilization,
            "max_model_len": model.max_model_len,
            "max_num_seqs": model.max_num_seqs,
            "seed": config.seed,
        },
    )
    return make_engine(backend, directory, token_bytes, options)
