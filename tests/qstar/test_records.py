"""Per-sample statistics."""

import json

import numpy as np

from qstar.records import sample_record


def test_undefined_tokens_are_left_out_and_the_line_is_json() -> None:
    per_token = {
        "alpha": np.array([0.2, 0.0, 0.6], np.float32),
        "kl_theta": np.array([0.1, np.nan, 0.3], np.float32),
        "kl_t": np.array([0.1, 0.0, 0.2], np.float32),
        "ess_theta": np.array([0.5, 0.0, 0.9], np.float32),
        "ess_t": np.array([0.5, 1.0, 0.3], np.float32),
        "log_ess_theta": np.array([-0.7, -np.inf, -0.1], np.float32),
        "log_ess_t": np.array([-0.7, 0.0, -1.2], np.float32),
    }
    record = sample_record(3, per_token, 0, "stop")
    assert abs(record["kl_theta_mean"] - 0.2) < 1e-6 and record["n_tokens"] == 3
    assert abs(record["log_ess_ratio_mean"] - 0.55) < 1e-6
    assert abs(record["alpha_std"] - np.std([0.2, 0.0, 0.6], ddof=1)) < 1e-6
    json.loads(json.dumps(record, allow_nan=False))


def test_everything_forced_leaves_nothing_to_average() -> None:
    one = np.array([0.5])
    per_token = dict.fromkeys(("alpha", "kl_theta", "kl_t", "ess_theta", "ess_t"), one)
    record = sample_record(0, per_token, 1, "length")
    assert record["alpha_mean"] is None and record["n_tokens"] == 1 and record["n_forced"] == 1
