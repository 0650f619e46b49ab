"""The JAX engine: a decoder on the device, steered by an argument instead of a hook."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.engines.base import Decoding, OnRollout, Rollout, StreamSettings, Toolbox
from common.engines.checks import check_layers, check_positions
from common.engines.delimiter import Automata, Automaton
from common.engines.jax_stream import CHUNK, JaxStream
from common.engines.schedule import sample_through
from common.errors import require
from common.lm.cache import bytes_per_token
from common.lm.config import DecoderConfig
from common.lm.decoder import Capture, forward
from common.lm.generate import bucket_length, check_prompts, pad_prompts
from common.lm.layers import Params
from common.lm.weights import Model

CPU_SLOTS = 16
"""Rows `sample` decodes side by side on a CPU: beyond it, a step costs as much more as it gains."""
GPU_SLOTS = 128
_CACHE_SHARE = 0.4  # of the free device memory
_CAPACITY_STEP = 64  # row capacities are multiples of it: few programs for many lengths
_STATE_TOKENS = 4096  # tokens read in one call of states_at
_STATE_ROWS = 16
_NEVER = Automaton(np.zeros((1, 1), np.int32), np.zeros((1, 1), bool))


class JaxEngine:
    """An `Engine` over a decoder of `common.lm`."""

    name = "jax"
    capabilities = frozenset(("sample", "states", "steer"))

    def __init__(
        self,
        model: Model,
        token_bytes: Sequence[bytes],
        *,
        mesh: Any = None,
        sample_slots: int | None = None,
        chunk: int = CHUNK,
    ) -> None:
        """Wraps a loaded model.

        Args:
            model: The decoder.
            token_bytes: What each token adds to a text; b"" for special tokens.
            mesh: The mesh its weights are split over, or None.
            sample_slots: Rows `sample` decodes side by side; None = from the free memory.
            chunk: Tokens between two returns to the host.
        """
        self.model = model
        self.num_layers = model.cfg.num_layers
        self.hidden_size = model.cfg.hidden_size
        self.vocab_size = model.cfg.vocab_size
        self._mesh = mesh
        self._sample_slots = sample_slots
        self._chunk = chunk
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
        """As `Engine.sample`: rows of a prompt share one reading of it, and slots are refilled.

        Raises:
            UserError: A prompt is unusable, or longer with its continuation than the model allows.
        """
        check_prompts(prompts, self.model.cfg)
        require(max_new_tokens > 0, f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
        count = sum(len(row_ids) for row_ids in rows)
        if not count:
            return [[] for _ in rows]
        needed = max(len(prompt) for prompt in prompts) + max_new_tokens
        stream = self._plain_stream(max(count, task_rows), needed, decoding)
        return sample_through(stream, prompts, rows, max_new_tokens, on_rollout)

    def states_at(
        self,
        token_ids: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
    ) -> list[np.ndarray]:
        """As `Engine.states_at`, in length buckets and without the blocks above the top layer.

        Raises:
            UserError: A sequence is unusable, or a layer or position lies outside.
        """
        cfg = self.model.cfg
        check_prompts(token_ids, cfg)
        check_layers(layers, cfg.num_layers)
        results = [np.zeros((len(p), len(layers), cfg.hidden_size), np.float32) for p in positions]
        if not layers:
            return results
        check_positions(token_ids, positions)
        top = max(layers) + 1
        params = {**self.model.params, "layers": self.model.params["layers"][:top]}
        width = max((len(p) for p in positions), default=0)
        width = 1 << max(width - 1, 0).bit_length()
        groups: dict[int, list[int]] = {}
        for i, (ids, where) in enumerate(zip(token_ids, positions, strict=True)):
            if where:
                groups.setdefault(bucket_length(len(ids), cfg.max_positions), []).append(i)
        layer_ids = jnp.asarray(list(layers), jnp.int32)
        for bucket, indices in sorted(groups.items()):
            size = max(1, min(_STATE_ROWS, _STATE_TOKENS // bucket))
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                padded, _, _ = pad_prompts([token_ids[i] for i in part], part, bucket, size)
                asked = np.zeros((size, width), np.int32)
                for row, i in enumerate(part):
                    asked[row, : len(positions[i])] = positions[i]
                states = np.asarray(
                    _states(params, jnp.asarray(padded), jnp.asarray(asked), layer_ids, cfg=cfg)
                )  # [LQ, R, P, D]
                for row, i in enumerate(part):
                    results[i][...] = states[:, row, : len(positions[i])].transpose(1, 0, 2)
        return results

    def open(self, settings: StreamSettings, tools: Toolbox) -> JaxStream:
        """As `Engine.open`.

        Raises:
            UserError: Settings or tools do not fit the model.
        """
        automaton = self._automata.of(settings.delimiter)
        return JaxStream(self.model, settings, tools, automaton, self._mesh, self._chunk)

    def _plain_stream(self, rows: int, needed: int, decoding: Decoding) -> JaxStream:
        """A stream for `sample`: no tools, no states, no delimiter."""
        cfg = self.model.cfg
        require(
            needed <= cfg.max_positions,
            f"prompts and continuations of up to {needed} tokens exceed the {cfg.max_positions} "
            "positions of the model: shorten max_new_tokens",
        )
        capacity = min(-(-needed // _CAPACITY_STEP) * _CAPACITY_STEP, cfg.max_positions)
        limit = self._sample_slots or choose_slots(cfg, capacity)
        slots = min(limit, 1 << (rows - 1).bit_length())
        settings = StreamSettings(slots, capacity, (), "\n", 1, 0, decoding)
        tools = Toolbox.empty(cfg.hidden_size)
        automaton = Automaton(
            np.broadcast_to(_NEVER.next, (cfg.vocab_size, 1)),
            np.broadcast_to(_NEVER.hit, (cfg.vocab_size, 1)),
        )
        return JaxStream(self.model, settings, tools, automaton, self._mesh, self._chunk)


def choose_slots(cfg: DecoderConfig, capacity: int) -> int:
    """Rows of `capacity` tokens to decode side by side on this machine's device."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats:
        return CPU_SLOTS
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    fitting = int(_CACHE_SHARE * free / (capacity * bytes_per_token(cfg)))
    return max(1, min(GPU_SLOTS, fitting))


@functools.partial(jax.jit, static_argnames="cfg")
def _states(
    params: Params,
    token_ids: jax.Array,
    positions: jax.Array,
    layers: jax.Array,
    *,
    cfg: DecoderConfig,
) -> jax.Array:
    """States [LQ, R, P, D] of sequences [R, T] at positions [R, P]."""
    captured = forward(params, cfg, token_ids, capture=Capture(layers, positions)).captured
    assert captured is not None
    return captured
