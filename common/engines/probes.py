"""Probes of engines that run every branch as a row or request of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.engines.base import NO_TOOL, Probe, StreamSettings


class Branch(NamedTuple):
    """One continuation a probe asks for.

    Attributes:
        slot: whose row it continues.
        branch: its place in the probe; 0 = unsteered.
        tool: row of the toolbox, or NO_TOOL.
        strength: of the tool; 0 without one.
    """

    slot: int
    branch: int
    tool: int
    strength: float


def asked_branches(tools: np.ndarray, strengths: np.ndarray, active: np.ndarray) -> list[Branch]:
    """What `Stream.probe` is asked for: per active slot the unsteered branch, then its tools.

    Args:
        tools: [S, L] int32, NO_TOOL = none.
        strengths: [S, L] float32.
        active: [S] bool.
    """
    asked = []
    for slot in np.flatnonzero(active).tolist():
        asked.append(Branch(slot, 0, NO_TOOL, 0.0))
        for branch, tool in enumerate(tools[slot].tolist(), 1):
            if tool != NO_TOOL:
                asked.append(Branch(slot, branch, tool, float(strengths[slot, branch - 1])))
    return asked


def gather_probe(
    settings: StreamSettings,
    asked: Sequence[Branch],
    token_ids: Sequence[Sequence[int]],
    log_probs: Sequence[Sequence[float]],
) -> Probe:
    """Continuations as arrays.

    Args:
        settings: Of the stream.
        asked: The branches.
        token_ids: Per branch.
        log_probs: Per branch and token.
    """
    shape = (settings.slots, settings.probe_branches + 1)
    probe = Probe(
        np.zeros(shape, np.int32),
        np.zeros(shape, np.float32),
        np.zeros((*shape, settings.probe_tokens), np.int32),
    )
    for item, ids, values in zip(asked, token_ids, log_probs, strict=True):
        place = item.slot, item.branch
        probe.lengths[place] = len(ids)
        probe.mean_log_probs[place] = np.mean(values) if len(ids) else 0.0
        probe.token_ids[place][: len(ids)] = ids
    return probe
