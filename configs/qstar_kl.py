"""q* with the KL-symmetric alpha: the same distance from both models at every token.

    python -m qstar.main --config=configs/qstar_kl.py            # minutes on two cores
    python -m qstar.main --config=configs/qstar_kl.py:tiny       # seconds

Models and data as in configs/qstar.py; writes runs/qstar_kl.jsonl.
"""

from ml_collections import ConfigDict

from configs.qstar import VARIANTS, get_config_for

__all__ = ["VARIANTS", "get_config"]


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    c = get_config_for(variant, "qstar_kl")
    c.alpha.method = "kl_symmetry"
    return c
