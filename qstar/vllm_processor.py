"""vLLM's side of the q* law: a batch-level logits processor.

This is the one module of the package that knows vLLM's interfaces. Its "V1" logits processors are
told which request sits in which row of the batch and get all rows at once. A request carries its
slot in `extra_args`; the processor looks the token up with a `Guide` and leaves it as the only
possible one of its row, so that vLLM's own sampler, whose random numbers depend on the batch, has
nothing to decide. Nothing of vLLM is imported with this module.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from common.engines.vllm_version import installed_version, require_supported

if TYPE_CHECKING:
    from qstar.guide import Guide

SLOT = "qstar_slot"
"""Key of `SamplingParams.extra_args` that holds a request's slot."""


def require_vllm() -> str:
    """Version of the installed vLLM.

    Raises:
        UserError: It is missing or its interface is another one; names what is supported.
    """
    name, version = installed_version()
    require_supported(name, version, others="jax|transformers")
    return version


class BatchRows:
    """Which slot, with which kept tokens, sits in which row of vLLM's batch."""

    def __init__(self) -> None:
        """An empty batch."""
        self._rows: dict[int, tuple[int, Sequence[int]]] = {}

    def update(self, change: Any) -> None:
        """Applies a `BatchUpdate` (None = nothing changed): removed, then added, then moved."""
        if change is None:
            return
        for row in change.removed:
            self._rows.pop(row, None)
        for row, params, _, output_ids in change.added:
            slot = (params.extra_args or {}).get(SLOT)
            if slot is None:
                self._rows.pop(row, None)
            else:
                # The list is vLLM's own and grows as tokens are kept.
                self._rows[row] = (int(slot), output_ids if output_ids is not None else [])
        for source, target, direction in change.moved:
            moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if other is not None and direction.name == "SWAP":
                self._rows[source] = other

    def kept(self) -> dict[int, tuple[int, Sequence[int]]]:
        """By row: the slot, and the tokens vLLM has kept."""
        return dict(self._rows)


def apply_guide(logits: Any, rows: BatchRows, guide: "Guide") -> Any:
    """Leaves every row of a guided request one possible token.

    Args:
        logits: [R, W] tensor; changed in place.
        rows: What the rows are.
        guide: Chooses.

    Returns:
        The logits.
    """
    # Rows beyond the batch, or slots that are over, are vLLM's own business.
    held = {
        row: (slot, tokens)
        for row, (slot, tokens) in rows.kept().items()
        if row < logits.shape[0] and guide.active[slot]
    }
    if not held:
        return logits
    at = [slot for slot, _ in held.values()]
    by_slot = logits.new_zeros((guide.slots, logits.shape[1]))
    by_slot[at] = logits[list(held)]
    tokens = guide.choose(jnp.from_dlpack(by_slot), dict(held.values()))
    for row, (slot, _) in held.items():
        logits[row] = -float("inf")
        logits[row, int(tokens[slot])] = 0.0
    return logits


def processor_class(guide: "Guide") -> type:
    """A logits processor class for `LLM(logits_processors=[...])` that asks this guide."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class GuidedProcessor(LogitsProcessor):  # type: ignore[misc]
        """Rows that carry `SLOT` follow the q* law; the others stay as they are."""

        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
            """Called by the engine while it starts."""
            del vllm_config, device, is_pin_memory
            self._rows = BatchRows()

        def is_argmax_invariant(self) -> bool:
            """No: greedy requests are changed too."""
            return False

        def update_state(self, batch_update: Any) -> None:
            """Called before every forward pass."""
            self._rows.update(batch_update)

        def apply(self, logits: Any) -> Any:
            """Called after every forward pass."""
            return apply_guide(logits, self._rows, guide)

    return GuidedProcessor
