"""q* with alpha = H(pi_theta) / (H(pi_theta) + H(pi_t)): a heuristic, quick to compute.

    python -m qstar.main --config=configs/qstar_entropy.py       # minutes on two cores
    python -m qstar.main --config=configs/qstar_entropy.py:tiny  # seconds

It is no close approximation of the KL-symmetric alpha, least of all where one model is peaked.
Models and data as in configs/qstar.py; writes runs/qstar_entropy.jsonl.
"""

from ml_collections import ConfigDict

from configs.qstar import VARIANTS, get_config_for

__all__ = ["VARIANTS", "get_config"]


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    c = get_config_for(variant, "qstar_entropy")
    c.alpha.method = "entropy"
    return c
