"""q* with a fixed alpha; 1 and 0 are the pure baselines, which load one model only.

    python -m qstar.main --config=configs/qstar_fixed.py         # alpha = 0.5
    python -m qstar.main --config=configs/qstar_fixed.py:theta   # pi_theta alone
    python -m qstar.main --config=configs/qstar_fixed.py:t       # pi_t alone
    python -m qstar.main --config=configs/qstar_fixed.py:tiny    # seconds

Models and data as in configs/qstar.py; writes runs/qstar_fixed.jsonl, runs/qstar_theta.jsonl and
runs/qstar_t.jsonl.
"""

from ml_collections import ConfigDict

from configs.qstar import get_config_for

VARIANTS = ("", "theta", "t", "tiny")
_ALPHA = {"": 0.5, "tiny": 0.5, "theta": 1.0, "t": 0.0}


def get_config(variant: str = "") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {', '.join(v for v in VARIANTS if v)}")
    pure = variant in ("theta", "t")
    c = get_config_for("" if pure else variant, f"qstar_{variant}" if pure else "qstar_fixed")
    c.alpha.method = "fixed"
    c.alpha.fixed = _ALPHA[variant]
    return c
