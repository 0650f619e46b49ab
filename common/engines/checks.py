"""What every engine refuses, in the same words."""

from collections.abc import Sequence

import numpy as np

from common.engines.base import StreamSettings, Toolbox
from common.errors import require


def check_stream(
    settings: StreamSettings, tools: Toolbox, num_layers: int, hidden_size: int, positions: int
) -> None:
    """Raises UserError where settings or tools do not fit a model.

    Args:
        settings: Of a stream.
        tools: Of the same stream.
        num_layers: Blocks of the model.
        hidden_size: Width of its residual stream.
        positions: Most tokens of a sequence.
    """
    wanted = [*settings.layers, *tools.layers.tolist()]
    require(
        all(0 <= layer < num_layers for layer in wanted),
        f"layers {wanted} are not all among the model's 0..{num_layers - 1}",
    )
    require(
        not tools.names or tools.vectors.shape[1] == hidden_size,
        f"steering vectors have {tools.vectors.shape[-1]} entries, the model's states "
        f"{hidden_size}: were they made with this model?",
    )
    require(
        settings.capacity <= positions,
        f"{settings.capacity} tokens per row exceed the {positions} positions of the model",
    )


def check_budgets(tokens: Sequence[Sequence[int]], budgets: np.ndarray, capacity: int) -> None:
    """Raises UserError where a row has no room for its budget, or a slot has no row."""
    for ids, budget in zip(tokens, budgets.tolist(), strict=True):
        require(
            budget == 0 or bool(ids),
            "a slot without a row was asked to go on: refill it first",
        )
        require(
            len(ids) + budget <= capacity or budget == 0,
            f"a row of at most {capacity} tokens cannot hold {len(ids)} + {budget}",
        )
