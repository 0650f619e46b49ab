"""The transformers engine: hooks instead of arguments; the oracle, and a fallback.

It runs every architecture whose model in transformers has decoder blocks, computes what the JAX
engine computes (same tokens, also drawn ones), and makes no attempt to save passes: a probe reads
the last token again in every branch, and nothing of it is kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.engines.base import Decoding, OnRollout, Rollout, StreamSettings, Toolbox
from common.engines.checks import check_layers, check_positions
from common.engines.delimiter import Automata
from common.engines.hf_rows import HfRows, decoder_blocks
from common.engines.hf_stream import HfStream
from common.engines.schedule import sample_through
from common.errors import UserError

SAMPLE_SLOTS = 16
_STATE_ROWS = 8


class HfEngine:
    """An `Engine` over a causal language model of transformers."""

    name = "hf"
    capabilities = frozenset(("sample", "states", "steer"))

    def __init__(
        self,
        directory: str | Path,
        token_bytes: Sequence[bytes],
        *,
        dtype: str = "float32",
        device: str = "cpu",
        sample_slots: int = SAMPLE_SLOTS,
    ) -> None:
        """Loads a model.

        Args:
            directory: Model in hub layout.
            token_bytes: What each token adds to a text; b"" for special tokens.
            dtype: Of weights and activations.
            device: A torch device.
            sample_slots: Rows `sample` decodes side by side.

        Raises:
            UserError: The model cannot be loaded or has no decoder blocks to hook.
        """
        import torch
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(directory), dtype=getattr(torch, dtype), local_files_only=True
            )
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"transformers cannot load '{directory}': {reason}") from error
        self.model: Any = model.to(device).eval()
        self.num_layers = len(decoder_blocks(self.model))
        self.hidden_size = int(self.model.config.hidden_size)
        self.vocab_size = int(self.model.get_output_embeddings().weight.shape[0])
        self.max_positions = int(self.model.config.max_position_embeddings)
        self._sample_slots = sample_slots
        self._automata = Automata(token_bytes, self.vocab_size)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        decoding: Decoding,
        max_new_tokens: int,
        on_rollout: OnRollout | None = None,
        task_rows: int = 0,
    ) -> list[list[Rollout]]:
        """As `Engine.sample`.

        Raises:
            UserError: A prompt is unusable, or longer with its continuation than the model allows.
        """
        count = sum(len(row_ids) for row_ids in rows)
        if not count:
            return [[] for _ in rows]
        capacity = max(len(prompt) for prompt in prompts) + max_new_tokens
        slots = min(self._sample_slots, max(count, task_rows))
        settings = StreamSettings(slots, capacity, (), "\n", 1, 0, decoding)
        stream = self.open(settings, Toolbox.empty(self.hidden_size))
        return sample_through(stream, prompts, rows, max_new_tokens, on_rollout)

    def states_at(
        self,
        token_ids: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
    ) -> list[np.ndarray]:
        """As `Engine.states_at`; sequences of similar length are read together.

        Raises:
            UserError: A layer or position lies outside.
        """
        check_layers(layers, self.num_layers)
        check_positions(token_ids, positions)
        results = [np.zeros((len(p), len(layers), self.hidden_size), np.float32) for p in positions]
        # Each piece between two asked positions is one pass; rows go in step.
        by_length = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
        asked = [i for i in by_length if len(positions[i])]
        for start in range(0, len(asked), _STATE_ROWS):
            self._read_states(
                asked[start : start + _STATE_ROWS], token_ids, positions, layers, results
            )
        return results

    def _read_states(
        self,
        part: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
        results: list[np.ndarray],
    ) -> None:
        """Reads some sequences up to each of their positions in turn."""
        rows = HfRows.empty(self.model, len(part))
        order = [sorted(set(positions[i])) for i in part]
        for n in range(max(len(where) for where in order)):
            pieces = []
            for i, where in zip(part, order, strict=True):
                edges = [-1, *where]
                more = n < len(where)
                pieces.append(list(token_ids[i][edges[n] + 1 : where[n] + 1]) if more else [])
            padded = np.zeros((len(part), max(len(piece) for piece in pieces)), np.int64)
            for row, piece in zip(padded, pieces, strict=True):
                row[: len(piece)] = piece
            read = rows.read(padded, np.asarray([len(piece) for piece in pieces]), layers)
            for r, (i, where) in enumerate(zip(part, order, strict=True)):
                for p, position in enumerate(positions[i]):
                    if n < len(where) and position == where[n]:
                        results[i][p] = read.states[:, r]

    def open(self, settings: StreamSettings, tools: Toolbox) -> HfStream:
        """As `Engine.open`.

        Raises:
            UserError: Settings or tools do not fit the model.
        """
        return HfStream(self, settings, tools, self._automata.of(settings.delimiter))
