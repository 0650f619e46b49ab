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
    check_layers([*settings.layers, *tools.layers.tolist()], num_layers)
    require(
        not tools.names or tools.vectors.shape[1] == hidden_size,
        f"steering vectors have {tools.vectors.shape[-1]} entries, the model's states "
        f"{hidden_size}: were they made with this model?",
    )
    require(
        settings.capacity <= positions,
        f"{settings.capacity} tokens per row exceed the {positions} positions of the model",
    )


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    """Raises UserError where the model has no such block."""
    require(
        all(0 <= layer < num_layers for layer in layers),
        f"layers {list(layers)} are not all among the model's 0..{num_layers - 1}",
    )


def check_positions(token_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> None:
    """Raises UserError where a position asked for lies outside its sequence."""
    for ids, where in zip(token_ids, positions, strict=True):
        require(
            all(0 <= position < len(ids) for position in where),
            f"positions {list(where)} are not all within a sequence of {len(ids)} tokens",
        )


def check_fit(prompts: Sequence[Sequence[int]], capacity: int) -> None:
    """Raises UserError where a prompt is empty or longer than a row."""
    for prompt in prompts:
        require(len(prompt) > 0, "empty prompt: there is no token to continue")
        require(
            len(prompt) <= capacity,
            f"a prompt of {len(prompt)} tokens exceeds the capacity {capacity} of a row",
        )


def check_held(tokens: Sequence[Sequence[int]]) -> None:
    """Raises UserError where one of the slots that are to go on has no row."""
    require(all(tokens), "a slot without a row was asked to go on: refill it first")


def check_budgets(tokens: Sequence[Sequence[int]], budgets: np.ndarray, capacity: int) -> None:
    """Raises UserError where a row has no room for its budget, or a slot has no row."""
    for ids, budget in zip(tokens, budgets.tolist(), strict=True):
        if budget == 0:
            continue
        check_held([ids])
        require(
            len(ids) + budget <= capacity,
            f"a row of at most {capacity} tokens cannot hold {len(ids)} + {budget}",
        )
