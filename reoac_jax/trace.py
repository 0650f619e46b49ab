"""The step-by-step record of one episode, as it stands in a sample file."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reoac_jax.episodes import Episodes
from reoac_jax.types import OPERATORS


def episode_trace(
    episodes: Episodes, row: int, decode: Callable[[Sequence[int]], str], mask_id: int
) -> dict[str, Any]:
    """Everything needed to show how a canvas came about; JSON-ready.

    Args:
      episodes: on the host.
      row: which episode.
      decode: token ids to text.
      mask_id: id of a position that has not been written.

    Returns:
      decisions: per decision operator, cost, canvas (ids before it), written (positions) and
        confidence (of each position's best token, 3 decimals); final: ids at the end; mask_id;
        pieces: text of every id that occurs, by the id as a string.
    """
    steps, count = episodes.steps, int(episodes.num_steps[row])
    decisions = [
        {
            "operator": OPERATORS[int(steps.operator[row, t])],
            "cost": float(steps.cost[row, t]),
            "canvas": steps.gen_before[row, t].tolist(),
            "written": np.flatnonzero(steps.written[row, t]).tolist(),
            "confidence": [round(float(c), 3) for c in steps.confidence[row, t]],
        }
        for t in range(count)
    ]
    final = episodes.final_ids[row].tolist()
    used = {i for d in decisions for i in d["canvas"]} | set(final)
    return {
        "decisions": decisions,
        "final": final,
        "mask_id": mask_id,
        "pieces": {str(i): "" if i == mask_id else decode([i]) for i in sorted(used)},
    }
