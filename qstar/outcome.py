"""A finished sample as the lines that are written about it."""

from typing import Any

import numpy as np

from qstar.adapters import Sample
from qstar.backend import Request
from qstar.records import sample_record
from qstar.scheduler import Finished
from qstar.slots import FIELDS
from qstar.tilt import FORCED
from qstar.writer import data_row

MIN_OVERLAP = 0.9  # of the median token, where vocabularies are aligned


def problem(finished: Finished, aligned: bool) -> str | None:
    """Why an output is no sample, or None."""
    output = finished.output
    if output.failed:
        return (
            f"no usable logits for token {len(output.columns)}: a model gave NaN, +inf or nothing "
            "but -inf, or the rules left no token"
        )
    if aligned and len(output.columns):
        overlap = np.minimum(output.values["overlap_theta"], output.values["overlap_t"])
        median = float(np.median(overlap))
        if median < MIN_OVERLAP:
            return (
                f"the vocabularies share {median:.1%} of the median token's probability, less than "
                f"{MIN_OVERLAP:.0%}: these models cannot be mixed token by token"
            )
    return None


def per_token(finished: Finished) -> dict[str, np.ndarray]:
    """The arrays `sample_record` averages: ESS from their logarithms."""
    values = dict(finished.output.values)
    with np.errstate(over="ignore", invalid="ignore"):
        values["ess_theta"] = np.exp(values["log_ess_theta"])
        values["ess_t"] = np.exp(values["log_ess_t"])
        ratio = values["log_ess_theta"] - values["log_ess_t"]
        values["ess_ratio"] = np.exp(np.clip(ratio, -80.0, 80.0))
    return values


def diagnostics_line(finished: Finished, repeats: int) -> dict[str, Any]:
    """Means and deviations over the sample's tokens."""
    values = per_token(finished)
    forced = int(np.sum((values["flags"].astype(np.int64) & FORCED) != 0))
    request = finished.request
    record = sample_record(request.sample_idx, values, forced, finished.finish_reason)
    return record | ({"repeat": request.repeat} if repeats > 1 else {})


def sample_line(
    finished: Finished, sample: Sample, text: str, extra_fields: bool, repeats: int
) -> dict[str, Any]:
    """The data line."""
    extra: dict[str, Any] = {}
    if extra_fields:
        extra = {
            "reference": sample.response,
            "finish_reason": finished.finish_reason,
            "n_tokens": len(finished.output.columns),
        }
    if extra_fields or repeats > 1:
        extra["repeat"] = finished.request.repeat
    return data_row(sample.messages, text, sample.metadata, extra)


def tokens_line(finished: Finished, token_ids: list[int], repeats: int) -> dict[str, Any]:
    """Token ids of prompts and answer, and every per-token value."""
    request: Request = finished.request
    line: dict[str, Any] = {"sample_idx": request.sample_idx}
    if repeats > 1:
        line["repeat"] = request.repeat
    line |= {
        "prompt_ids_theta": list(request.prompt_theta),
        "prompt_ids_t": list(request.prompt_t),
        "token_ids": token_ids,
    }
    values = finished.output.values
    for name in FIELDS:
        array = values[name]
        line[name] = [int(v) for v in array] if name == "flags" else [float(v) for v in array]
    return line
