"""S rows of the JAX engine between two passes: which tokens they have and how far they are read."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.engines.base import StreamSettings, Toolbox
from common.engines.checks import check_fit, check_stream
from common.engines.jax_rows import (
    copy_prompts,
    empty_columns,
    empty_rows,
    grow_cache,
    read_pending,
    read_prompts,
    reread,
    steer,
)
from common.engines.ledger import Ledger
from common.errors import require
from common.lm.generate import bucket_length, check_prompts, pad_prompts
from common.lm.sharding import shard_cache
from common.lm.weights import Model

FIRST_CAPACITY = 512
"""Columns of a fresh cache; it doubles as rows grow, and every size is compiled once."""
_PROMPT_ROWS = 4  # prompts an accelerator reads in one call, where there are enough of them
_PROMPT_BUCKET, _SEGMENT_BUCKET = 16, 32  # shortest padded prompt and segment


class Slots:
    """Rows on the device, their tokens on the host, and what they have cost.

    Attributes:
        rows: What lies on the device.
        tokens: Per slot the committed ids, prompt included.
        read: [S] int32, how many of them are in the cache.
        settled: [S] bool, the last one has been read unsteered.
        anchor: [S] int32, steered position whose trace has to be overwritten; -1 = none.
        ledger: Token positions.
        first: Lowest layer of any tool.
        layers: Captured layers.
    """

    def __init__(
        self, model: Model, settings: StreamSettings, tools: Toolbox, mesh: Any = None
    ) -> None:
        """Empty slots.

        Args:
            model: The decoder.
            settings: Settings.
            tools: Steering vectors.
            mesh: Splits the cache by heads, or None.

        Raises:
            UserError: Settings or tools do not fit the model.
        """
        cfg = model.cfg
        wanted = [*settings.layers, *tools.layers.tolist()]
        check_stream(settings, tools, cfg.num_layers, cfg.hidden_size, cfg.max_positions)
        self._model, self._cfg, self._tools = model, cfg, tools
        self._limit = settings.capacity
        # Layer -1 keeps the arrays from being empty and costs nothing.
        self.layers = tuple(dict.fromkeys(wanted)) or (-1,)
        self._layer_ids = jnp.asarray(self.layers, jnp.int32)
        self.first = min(tools.layers.tolist(), default=cfg.num_layers - 1)
        self._captured = np.asarray(
            [self.layers.index(layer) for layer in tools.layers.tolist()], np.int32
        )
        slots = settings.slots
        self.rows = empty_rows(cfg, slots, min(FIRST_CAPACITY, settings.capacity), len(self.layers))
        if mesh is not None:
            self.rows = dataclasses.replace(self.rows, cache=shard_cache(self.rows.cache, mesh))
        self._clean = empty_columns(cfg, slots, self.first)
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self._prompts: list[tuple[int, ...]] = [()] * slots  # whose columns the slot still holds
        self.read = np.zeros(slots, np.int32)
        self.settled = np.zeros(slots, bool)
        self.anchor = np.full(slots, -1, np.int32)
        self._trails: list[jax.Array | None] = [None] * slots
        # Together, on a CPU, last bits depend on company, which a resumed run may not have again.
        self._together = 1 if jax.default_backend() == "cpu" else _PROMPT_ROWS
        self.ledger = Ledger(slots)

    # ------------------------------------------------------------------------------------ prompts
    def start(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Starts rows; a prompt that some slot still holds is copied, not read.

        Raises:
            UserError: A prompt is empty, too long, or has ids the model lacks.
        """
        check_prompts(prompts, self._cfg)
        check_fit(prompts, self._limit)
        wanted = {slot: tuple(prompt) for slot, prompt in zip(slots, prompts, strict=True)}
        # Slots that already hold a wanted prompt, and one new reader for each of the others.
        holders = {prompt: slot for slot, prompt in enumerate(self._prompts) if prompt}
        readers: dict[tuple[int, ...], int] = {}
        for slot, prompt in wanted.items():
            if prompt not in holders:
                readers.setdefault(prompt, slot)
        self.ensure_capacity(max((len(prompt) for prompt in wanted.values()), default=0))
        # A reader overwrites what its slot holds: whoever wants that is served before.
        self._copy({slot: p for slot, p in wanted.items() if p in holders}, holders)
        self._read_prompts(readers)
        rest = {slot: p for slot, p in wanted.items() if readers.get(p, slot) != slot}
        self._copy(rest, readers)
        reading = set(readers.values())
        for slot, prompt in wanted.items():
            self.tokens[slot] = list(prompt)
            self._prompts[slot] = prompt
            self.read[slot] = len(prompt)
            self.ledger.start(slot, len(prompt) if slot in reading else 0)
        targets = np.asarray(list(wanted), np.int64)
        self.settled[targets] = True
        self.anchor[targets] = -1
        for slot in wanted:
            self._trails[slot] = None

    def _read_prompts(self, readers: dict[tuple[int, ...], int]) -> None:
        """Reads each prompt into its slot."""
        by_slot = {slot: prompt for prompt, slot in readers.items()}
        sizes = {slot: len(prompt) for slot, prompt in by_slot.items()}
        for bucket, group in self._groups(sizes, _PROMPT_BUCKET, self.rows.cache.capacity):
            size = self._together if len(group) > 1 else 1
            token_ids, lengths, targets = pad_prompts(
                [by_slot[slot] for slot in group], group, bucket, size
            )
            self.rows = read_prompts(
                self._model.params,
                self.rows,
                jnp.asarray(token_ids),
                jnp.asarray(lengths),
                jnp.asarray(targets),
                self._layer_ids,
                cfg=self._cfg,
            )

    def _groups(
        self, sizes: dict[int, int], shortest: int, longest: int
    ) -> list[tuple[int, list[int]]]:
        """Slots by padded length, in calls of one row or of several."""
        buckets: dict[int, list[int]] = {}
        for slot, size in sizes.items():
            buckets.setdefault(bucket_length(size, longest, shortest), []).append(slot)
        groups = []
        for bucket, slots in sorted(buckets.items()):
            while slots:
                # Padding two prompts to a call of four would cost more than two calls.
                count = self._together if len(slots) >= self._together - 1 else 1
                groups.append((bucket, slots[:count]))
                slots = slots[count:]
        return groups

    def _copy(
        self, wanted: dict[int, tuple[int, ...]], holders: dict[tuple[int, ...], int]
    ) -> None:
        """Copies prompts to slots (also a slot's own one back); reads all before it writes any."""
        if not wanted:
            return
        size = 1 << (len(wanted) - 1).bit_length()
        sources = np.zeros(size, np.int32)
        targets = np.full(size, -1, np.int32)
        lengths = np.zeros(size, np.int32)
        for row, (slot, prompt) in enumerate(wanted.items()):
            sources[row], targets[row], lengths[row] = holders[prompt], slot, len(prompt)
        self.rows = copy_prompts(
            self.rows, jnp.asarray(sources), jnp.asarray(targets), jnp.asarray(lengths)
        )

    # ------------------------------------------------------------------------------- given tokens
    def settle(self, wanted: np.ndarray) -> None:
        """Reads what is unread in the wanted rows, unsteered, so that they are settled."""
        waiting = wanted & ~self.settled
        require(
            all(self.tokens[slot] for slot in np.flatnonzero(waiting)),
            "a slot without a row was asked to go on: refill it first",
        )
        if not waiting.any():
            return
        self.clear_traces(waiting)
        last = [ids[-1] if ids else 0 for ids in self.tokens]
        self.ensure_capacity(int(self.read[waiting].max()) + 1)
        self.rows = read_pending(
            self._model.params,
            self.rows,
            jnp.asarray(last, jnp.int32),
            jnp.asarray(waiting),
            self._layer_ids,
            cfg=self._cfg,
        )
        self.ledger.add("commit", waiting)
        self.read += waiting
        self.settled |= waiting

    def clear_traces(self, wanted: np.ndarray) -> None:
        """Overwrites the traces of steered segments in the wanted rows."""
        dirty = np.flatnonzero(wanted & (self.anchor >= 0)).tolist()
        # All tokens of a segment but the last were read behind the trace.
        counts = {slot: len(self.tokens[slot]) - int(self.anchor[slot]) - 2 for slot in dirty}
        for trail in {id(self._trails[slot]): self._trails[slot] for slot in dirty}.values():
            assert trail is not None
            mine = {s: max(n, 1) for s, n in counts.items() if self._trails[s] is trail}
            for bucket, group in self._groups(mine, _SEGMENT_BUCKET, trail.shape[1]):
                self._reread(trail, bucket, group, [counts[slot] for slot in group])
        for slot in dirty:
            self.anchor[slot] = -1
            self._trails[slot] = None

    def _reread(self, trail: jax.Array, bucket: int, slots: list[int], counts: list[int]) -> None:
        """Reads steered segments again, unsteered."""
        size = self._together if len(slots) > 1 else 1
        padded = np.zeros((3, size), np.int32)
        padded[1] = -1
        padded[:, : len(slots)] = counts, slots, self.anchor[slots]
        cache = reread(
            self._model.params,
            self.rows.cache,
            trail,
            *(jnp.asarray(values) for values in padded),
            self._clean,
            cfg=self._cfg,
            first=self.first,
            num_tokens=bucket,
        )
        self.rows = dataclasses.replace(self.rows, cache=cache)
        for slot, count in zip(slots, counts, strict=True):
            self.ledger.add_one(slot, "reread", count)

    # -------------------------------------------------------------------------------------- tools
    def steer(self, steered: np.ndarray, tools: np.ndarray, strengths: np.ndarray) -> jax.Array:
        """Puts tools' traces into settled rows.

        Args:
            steered: [S] bool.
            tools: [S] int32.
            strengths: [S] float32.

        Returns:
            States [S, D] the rows' next tokens come from.
        """
        captured, layer, additions = self.injections(
            tools[:, None], strengths[:, None], steered[:, None]
        )
        self.rows, self._clean, hidden = steer(
            self._model.params,
            self.rows,
            self._clean,
            captured[:, 0],
            layer[:, 0],
            additions[:, 0],
            jnp.asarray(steered),
            cfg=self._cfg,
            first=self.first,
        )
        self.ledger.add("commit", steered)
        return hidden

    def injections(
        self, tools: np.ndarray, strengths: np.ndarray, given: np.ndarray
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What tools add: [S, B] tools and strengths, as `Branches` wants them.

        Returns:
            Index of the layer among the captured ones [S, B], layer [S, B], strength * vector
            [S, B, D] float32; the first tool's layers and zeros where none is given.
        """
        if not self._tools.names:
            nothing = jnp.zeros(tools.shape, jnp.int32)
            width = self._cfg.hidden_size
            return nothing, nothing + self.first, jnp.zeros((*tools.shape, width), jnp.float32)
        tool = np.where(given, tools, 0)
        scale = np.where(given, strengths, 0.0).astype(np.float32)
        return (
            jnp.asarray(self._captured[tool], jnp.int32),
            jnp.asarray(self._tools.layers[tool], jnp.int32),
            jnp.asarray(scale[:, :, None] * self._tools.vectors[tool].astype(np.float32)),
        )

    def append(
        self, slot: int, token_ids: Sequence[int], steered: bool, trail: jax.Array | None
    ) -> None:
        """Adds a segment to a row; all its tokens but the last have been read.

        Args:
            slot: The slot.
            token_ids: The segment.
            steered: Its last token before the segment carries a trace.
            trail: [S, W, D] residual stream behind layer `first` of what was read, with which the
                trace is overwritten; None = it stays.
        """
        start = len(self.tokens[slot])
        if steered:
            if start == len(self._prompts[slot]):
                self._prompts[slot] = ()  # its last column is no longer the prompt's own
            if trail is not None:
                self.anchor[slot] = start - 1
                self._trails[slot] = trail
        self.tokens[slot] += token_ids
        self.settled[slot] = False

    def ensure_capacity(self, needed: int) -> None:
        """Doubles the cache until rows of `needed` tokens fit."""
        capacity = self.rows.cache.capacity
        while capacity < min(needed, self._limit):
            capacity = min(2 * capacity, self._limit)
        if capacity != self.rows.cache.capacity:
            cache = grow_cache(self.rows.cache, capacity=capacity)
            self.rows = dataclasses.replace(self.rows, cache=cache)
