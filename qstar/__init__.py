"""q*: data sampled from the geometric mixture of a current and a target language model.

q_alpha is proportional to pi_theta^alpha * pi_t^(1-alpha); alpha is the weight of pi_theta
everywhere in this package. The Python API is imported when it is first asked for:

    from qstar import DataGenerator, DatasetAdapter, create_optimal_sampling_model
"""

from typing import Any

__all__ = [
    "DataGenerator",
    "DatasetAdapter",
    "Generation",
    "OptimalSamplingModel",
    "RowError",
    "create_optimal_sampling_model",
]


def __getattr__(name: str) -> Any:
    """Names of `qstar.api`; submodules stay cheap to import on their own."""
    if name in __all__:
        from qstar import api

        return getattr(api, name)
    raise AttributeError(f"module 'qstar' has no attribute {name!r}")
