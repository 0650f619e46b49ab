"""Per-sample statistics of per-token diagnostics."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def sample_record(
    sample_idx: int,
    per_token: Mapping[str, np.ndarray],
    n_forced: int,
    finish_reason: str,
) -> dict[str, Any]:
    """The diagnostics line of one sample.

    Means and standard deviations (n - 1 in the denominator; 0 for one token) over the tokens after
    the first `n_forced`; None where there is nothing to average. A value that is not defined for a
    token (no common support) is left out.

    Args:
        sample_idx: row of the data set.
        per_token: [n] arrays alpha, ess_theta, ess_t, kl_theta, kl_t of the real tokens, end of
            text included; log_ess_theta and log_ess_t where available.
        n_forced: leading tokens that were forced.
        finish_reason: "stop" or "length".
    """
    real = {name: np.asarray(values, np.float64)[n_forced:] for name, values in per_token.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        log_theta = real.get("log_ess_theta", np.log(real["ess_theta"]))
        log_t = real.get("log_ess_t", np.log(real["ess_t"]))
        log_ratio = log_theta - log_t
        ratio = real.get("ess_ratio", real["ess_theta"] / real["ess_t"])
    alpha_mean, alpha_std = _mean_std(real["alpha"])
    ratio_mean, ratio_std = _mean_std(ratio)
    theta_mean, theta_std = _mean_std(real["kl_theta"])
    t_mean, t_std = _mean_std(real["kl_t"])
    return {
        "sample_idx": sample_idx,
        "alpha_mean": alpha_mean,
        "alpha_std": alpha_std,
        "ess_ratio_mean": ratio_mean,
        "ess_ratio_std": ratio_std,
        "kl_theta_mean": theta_mean,
        "kl_theta_std": theta_std,
        "kl_t_mean": t_mean,
        "kl_t_std": t_std,
        "log_ess_ratio_mean": _mean_std(log_ratio)[0],
        "n_tokens": len(per_token["alpha"]),
        "n_forced": n_forced,
        "finish_reason": finish_reason,
    }


def _mean_std(values: np.ndarray) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the finite values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None, None
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
