"""Rows of a transformers model: one cache whose columns are moments shared by all rows.

Every pass appends columns to all rows; a mask says which of them are a row's own tokens. Forgetting
tokens is clearing mask bits, and `compact` moves each row's own columns to the front.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


class HookedSteering(NamedTuple):
    """Additions to the residual stream of one pass.

    Attributes:
        layers: [R] int, block behind which each row is steered; -1 = not.
        columns: [R] int, index of the steered token in the pass.
        additions: [R, D] float32 tensor, strength * vector.
    """

    layers: np.ndarray
    columns: np.ndarray
    additions: Any


class Pass(NamedTuple):
    """What a pass gives at one token per row.

    Attributes:
        hidden: [R, D] tensor after the final norm.
        states: [LC, R, D] float32 array, residual stream behind the captured layers.
    """

    hidden: Any
    states: np.ndarray


def decoder_blocks(model: Any) -> Any:
    """The list of a transformers model's decoder blocks."""
    return model.get_decoder().layers


@contextlib.contextmanager
def hooks(
    model: Any, steering: HookedSteering | None, layers: Sequence[int], columns: np.ndarray
) -> Iterator[dict[int, Any]]:
    """Steers and captures during one pass; nothing of it is left behind.

    Args:
        model: The transformers model.
        steering: Additions, or None.
        layers: Layers to capture.
        columns: [R] int, which token of each row to capture.

    Yields:
        Captured states [R, D] by layer, filled by the pass.
    """
    import torch

    captured: dict[int, Any] = {}
    steered = {} if steering is None else {int(i) for i in steering.layers if i >= 0}
    rows = torch.arange(len(columns))
    handles = []

    def watch(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output  # [R, T, D]
            if steering is not None and layer in steered:
                mine = np.flatnonzero(steering.layers == layer)
                at = torch.as_tensor(steering.columns[mine])
                which = torch.as_tensor(mine)
                h = h.clone()
                h[which, at] += steering.additions[which].to(h.dtype)
            if layer in layers:
                captured[layer] = h[rows, torch.as_tensor(columns)].float()
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    try:
        for layer in sorted({*layers, *steered} - {-1}):
            handles.append(decoder_blocks(model)[layer].register_forward_hook(watch(layer)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()


class HfRows:
    """R rows of tokens that a transformers model has read.

    Attributes:
        cache: `DynamicCache`; keys and values [R, H_kv, C, K] per block.
        mask: [R, C] bool tensor, True = the row's own token, in the order of its positions.
    """

    def __init__(self, model: Any, cache: Any, mask: Any) -> None:
        """Args: model: a transformers model; cache, mask: see the class."""
        self.model = model
        self.cache = cache
        self.mask = mask

    @classmethod
    def empty(cls, model: Any, rows: int) -> "HfRows":
        """Rows without tokens."""
        import torch
        from transformers import DynamicCache

        mask = torch.zeros((rows, 0), dtype=torch.bool, device=model.device)
        return cls(model, DynamicCache(), mask)

    @property
    def counts(self) -> np.ndarray:
        """[R] tokens of each row."""
        return np.asarray(self.mask.sum(1).cpu().numpy())

    def read(
        self,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        layers: Sequence[int] = (),
        steering: HookedSteering | None = None,
    ) -> Pass:
        """Reads up to T further tokens of every row.

        Args:
            token_ids: [R, T], left-aligned.
            lengths: [R], how many of them are real; 0 = the row stays as it is.
            layers: Layers to capture at each row's last real token.
            steering: Additions.

        Returns:
            States at each row's last real token; meaningless where there is none.
        """
        import torch

        device = self.model.device
        width = token_ids.shape[1]
        offsets = torch.arange(width, device=device)
        new = offsets < torch.as_tensor(lengths, device=device)[:, None]
        positions = self.mask.sum(1, keepdim=True) + offsets
        whole = torch.cat([self.mask, new], dim=1)
        # A query that may see nothing would be NaN, and NaN outlives its mask.
        visible = whole | (~whole.any(1, keepdim=True) & torch.ones_like(whole))
        last = np.maximum(lengths - 1, 0)
        with torch.no_grad(), hooks(self.model, steering, layers, last) as captured:
            out = self.model.get_decoder()(
                input_ids=torch.as_tensor(token_ids, device=device),
                attention_mask=visible.long(),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.cache, self.mask = out.past_key_values, whole
        hidden = out.last_hidden_state[torch.arange(len(last)), torch.as_tensor(last)]
        size = out.last_hidden_state.shape[-1]
        states = np.zeros((len(layers), len(last), size), np.float32)
        for i, layer in enumerate(layers):
            states[i] = captured[layer].cpu().numpy()
        return Pass(hidden, states)

    def logits(self, hidden: Any) -> Any:
        """Float32 logits [R, V] of states after the final norm."""
        import torch

        with torch.no_grad():
            return self.model.get_output_embeddings()(hidden).float()

    def truncate(self, counts: np.ndarray) -> None:
        """Forgets each row's tokens beyond the first counts[r]."""
        import torch

        limits = torch.as_tensor(counts, device=self.mask.device)[:, None]
        self.mask = self.mask & (self.mask.cumsum(1) <= limits)

    def fork(self, sources: Sequence[int]) -> "HfRows":
        """New rows, copies of rows `sources`."""
        import torch
        from transformers import DynamicCache

        index = torch.as_tensor(list(sources), device=self.mask.device)
        cache = DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[index], layer.values[index], i)
        return HfRows(self.model, cache, self.mask[index])

    def compact(self, width: int | None = None) -> None:
        """Moves every row's own columns to the front and drops the others.

        Args:
            width: C afterwards; None = as many as the longest row has tokens.
        """
        import torch

        counts = self.mask.sum(1)
        width = int(counts.max()) if width is None else width
        order = torch.argsort((~self.mask).byte(), dim=1, stable=True)[:, :width]
        missing = width - order.shape[1]
        for layer in self.cache.layers:
            layer.keys = _arrange(layer.keys, order, missing)
            layer.values = _arrange(layer.values, order, missing)
        columns = torch.arange(width, device=self.mask.device)
        self.mask = columns < counts[:, None]

    def replace(self, slots: Sequence[int], other: "HfRows", sources: Sequence[int]) -> None:
        """Puts rows of `other` into slots, whatever these held."""
        import torch

        index = torch.as_tensor(list(slots), device=self.mask.device)
        origin = torch.as_tensor(list(sources), device=self.mask.device)
        self.mask[index] = False
        width = int(max(self.mask.sum(1).max(), other.mask.sum(1).max())) if len(slots) else 0
        other.compact(width)
        if not len(self.cache.layers):
            shape = (len(self.mask), *other.cache.layers[0].keys.shape[1:])
            for i, layer in enumerate(other.cache.layers):
                self.cache.update(layer.keys.new_zeros(shape), layer.values.new_zeros(shape), i)
            self.mask = self.mask.new_zeros((len(self.mask), width))
        else:
            self.compact(width)
        for mine, given in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys[index] = given.keys[origin]
            mine.values[index] = given.values[origin]
        self.mask[index] = other.mask[origin]


def _arrange(x: Any, order: Any, missing: int) -> Any:
    """x [R, H_kv, C, K] with columns in the order [R, C'], and zeros appended."""
    import torch

    index = order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return torch.nn.functional.pad(x.gather(2, index), (0, 0, 0, missing))
