"""Rows of a transformers causal language model that are filled and refilled one by one.

The rows share the columns of one key/value cache and end in the same column: a row of n tokens
owns the last n columns, the ones before are masked (left padding) and positions come from the mask.
A new prompt is read by itself and laid over its row, so rows of any length come and go while the
others continue. PyTorch and transformers are imported when a model is loaded.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, require


def load_torch_model(path: str | Path, dtype: str, device: str = "") -> Any:
    """Loads a model directory in inference mode.

    Args:
        path: Directory in hub layout.
        dtype: "float32" | "bfloat16" | "float16".
        device: "cpu", "cuda", ...; "" = CUDA where there is one.

    Raises:
        UserError: The packages are absent or the model cannot be loaded.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            f"backend=transformers needs torch and transformers ({error}): install them or use "
            "backend=jax"
        ) from error
    logging.disable_progress_bar()  # ours is the one the user sees
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=getattr(torch, dtype), local_files_only=True
        )
        return model.to(place).eval()
    except Exception as error:  # a dozen types, by what is wrong with the files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"transformers cannot load the model at '{path}': {reason}") from error


class TorchRows:
    """R rows of one model.

    Attributes:
        lengths: [R] int64, tokens each row has read.
    """

    def __init__(self, model: Any, rows: int) -> None:
        """Empty rows of a loaded model."""
        self.model = model
        self.lengths = np.zeros(rows, np.int64)
        self._mask = np.zeros((rows, 0), bool)  # [R, C] columns a row owns
        self._keys: list[Any] = []  # per layer [R, H_kv, C, K]
        self._values: list[Any] = []
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @property
    def device(self) -> Any:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def weight_bytes(self) -> int:
        """Memory of the parameters, tied ones once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def token_bytes(self) -> int:
        """Memory of one cached token; 0 before anything was read."""
        both = [*self._keys, *self._values]
        return sum(x[0, :, 0].numel() * x.element_size() for x in both) if self._columns else 0

    @property
    def _columns(self) -> int:
        return self._mask.shape[1]

    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Replaces what rows hold by prompts, which may be empty.

        Args:
            rows: Distinct rows.
            prompts: Their token ids.
        """
        at = np.asarray(rows, np.int64)
        self._mask[at] = False
        self.lengths[at] = [len(prompt) for prompt in prompts]
        self._trim()
        for own in (*self._keys, *self._values):
            own[at] = 0  # a masked NaN would still spoil the row
        width = max(len(prompt) for prompt in prompts)
        if width == 0:
            return
        ids = np.zeros((len(at), width), np.int64)
        mask = np.zeros((len(at), width), bool)
        for row, prompt in enumerate(prompts):
            if len(prompt):
                ids[row, width - len(prompt) :] = prompt
                mask[row, width - len(prompt) :] = True
        # An empty prompt beside others: its row reads one token that nothing will attend to.
        seen = mask.copy()
        seen[:, -1] = True
        _, cache = self._forward(ids, seen, np.maximum(seen.cumsum(1) - 1, 0), None)
        self._widen(width, cache)
        for own, new in zip((*self._keys, *self._values), (*cache[0], *cache[1]), strict=True):
            own[at, :, self._columns - width :] = new
        self._mask[at, self._columns - width :] = mask

    def read(self, tokens: np.ndarray, active: np.ndarray) -> Any:
        """Reads one token per row.

        Args:
            tokens: [R] token ids.
            active: [R] bool; the others' rows stay as they are and their logits mean nothing.

        Returns:
            Logits [R, W] of the next token, a float32 tensor on the model's device.
        """
        column = np.ones((len(tokens), 1), bool)
        seen = np.concatenate([self._mask, column], axis=1)
        past = (self._keys, self._values) if self._columns else None
        positions = self.lengths[:, None]
        logits, (self._keys, self._values) = self._forward(
            np.asarray(tokens, np.int64)[:, None], seen, positions, past
        )
        self._mask = np.concatenate([self._mask, active[:, None]], axis=1)
        # An inactive row has a gap at the end: it is over, or begins anew with `put`.
        self.lengths += active
        return logits[:, -1].float()

    def _forward(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Any
    ) -> tuple[Any, tuple[list[Any], list[Any]]]:
        """Logits and the cache as keys and values per layer."""
        import torch
        from transformers import DynamicCache

        device = self.device
        cache = DynamicCache()
        if past is not None:
            for layer, (key, value) in enumerate(zip(*past, strict=True)):
                cache.update(key, value, layer)
        with torch.no_grad():
            out = self.model(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
                position_ids=torch.from_numpy(positions.astype(np.int64)).to(device),
                past_key_values=cache,
                use_cache=True,
                **self._last_only,
            )
        layers: Any = getattr(out.past_key_values, "layers", None)
        require(
            bool(layers) and all(getattr(layer, "keys", None) is not None for layer in layers),
            f"backend=transformers: {type(self.model).__name__} keeps no plain key/value cache; "
            "only attention models can share slots",
        )
        return out.logits, ([layer.keys for layer in layers], [layer.values for layer in layers])

    def _widen(self, width: int, like: tuple[list[Any], list[Any]]) -> None:
        """At least so many columns, new ones in front."""
        import torch

        rows, missing = len(self.lengths), width - self._columns
        if not self._keys:
            self._keys, self._values = (
                [x.new_zeros(rows, x.shape[1], width, x.shape[3]) for x in part] for part in like
            )
        elif missing > 0:
            pad = torch.nn.functional.pad
            self._keys, self._values = (
                [pad(x, (0, 0, missing, 0)) for x in part] for part in (self._keys, self._values)
            )
        if missing > 0:
            self._mask = np.pad(self._mask, ((0, 0), (missing, 0)))

    def _trim(self) -> None:
        """Drops the columns in front that no row owns."""
        owned = self._mask.any(axis=0)
        first = int(np.argmax(owned)) if owned.any() else self._columns
        if first == 0:
            return
        self._mask = self._mask[:, first:]
        if self._columns == 0:
            self._keys, self._values = [], []
            return
        self._keys = [x[:, :, first:].clone() for x in self._keys]
        self._values = [x[:, :, first:].clone() for x in self._values]
