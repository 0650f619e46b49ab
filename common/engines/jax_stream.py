"""S rows of the JAX engine that advance segment by segment, and what each of them has cost."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.engines.base import (
    NO_TOOL,
    Finish,
    Probe,
    Rollout,
    StreamSettings,
    Toolbox,
    Work,
)
from common.engines.delimiter import Automaton
from common.engines.jax_decode import (
    DELIMITER,
    EOS,
    RUNNING,
    Branches,
    Drawing,
    Ends,
    Entry,
    adopt_null,
    decode_chunk,
    probe_branches,
)
from common.engines.jax_rows import (
    copy_prompts,
    empty_columns,
    empty_rows,
    grow_rows,
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

CHUNK = 32
"""Tokens between two returns to the host."""
FIRST_CAPACITY = 256
"""Columns of a fresh cache; it doubles as rows grow."""
_PROMPT_ROWS = 4  # prompts read in one call, where there are enough of them
_SEGMENT_BUCKET = 16  # shortest padded segment

_FINISH: dict[int, Finish] = {RUNNING: "length", EOS: "eos", DELIMITER: "delimiter"}


class NullProbe(NamedTuple):
    """The unsteered branch of the last probe, kept until its row moves.

    Attributes:
        keys: Per layer, on the device; as `Probed.null_keys`.
        values: Per layer, on the device.
        tokens: [S, P].
        log_probs: [S, P].
        lengths: [S].
        ended: [S].
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    tokens: np.ndarray
    log_probs: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray


@dataclasses.dataclass
class Segment:
    """A segment being generated; lists over slots."""

    tokens: list[list[int]]
    log_probs: list[list[float]]
    ended: np.ndarray  # [S]


class JaxStream:
    """A `Stream` over a decoder; what it keeps on the device is `Rows`.

    Host arrays over slots: `_tokens` committed ids, `_read` how many of them are in the cache,
    `_settled` whether the last one was read unsteered, `_anchor` the steered position whose trace
    has to be overwritten (-1 = none), `_state` of the delimiter's automaton, `_drawn` tokens
    generated, `_prompt_length` of the prompt whose columns the slot still holds (0 = none).
    """

    def __init__(
        self,
        model: Model,
        settings: StreamSettings,
        tools: Toolbox,
        automaton: Automaton,
        mesh: Any = None,
        chunk: int = CHUNK,
    ) -> None:
        """Opens empty slots.

        Args:
            model: The decoder.
            settings: Settings.
            tools: Steering vectors.
            automaton: Of the delimiter, over the model's vocabulary.
            mesh: Splits the cache by heads, or None.
            chunk: Tokens between two returns to the host.

        Raises:
            UserError: Settings or tools do not fit the model.
        """
        cfg = model.cfg
        self.settings = settings
        self._model, self._cfg, self._tools, self._mesh = model, cfg, tools, mesh
        self._chunk = chunk
        decoding = settings.decoding
        wanted = [*settings.layers, *tools.layers.tolist()]
        require(
            all(0 <= layer < cfg.num_layers for layer in wanted),
            f"layers {wanted} are not all among the model's 0..{cfg.num_layers - 1}",
        )
        require(
            not tools.names or tools.vectors.shape[1] == cfg.hidden_size,
            f"steering vectors have {tools.vectors.shape[-1]} entries, the model's states "
            f"{cfg.hidden_size}: were they made with this model?",
        )
        require(
            settings.capacity <= cfg.max_positions,
            f"{settings.capacity} tokens per row exceed the {cfg.max_positions} positions of the "
            "model",
        )
        # Layer -1 keeps the arrays from being empty and costs nothing.
        self._layers = tuple(dict.fromkeys(wanted)) or (-1,)
        self._layer_ids = jnp.asarray(self._layers, jnp.int32)
        self._first = min(tools.layers.tolist(), default=cfg.num_layers - 1)
        self._captured = np.asarray(
            [self._layers.index(layer) for layer in tools.layers.tolist()], np.int32
        )
        self._drawing = Drawing(decoding.temperature, decoding.top_p)
        self._ends = Ends(
            jnp.asarray(decoding.stop_ids or (-1,), jnp.int32),
            jnp.asarray(automaton.next),
            jnp.asarray(automaton.hit),
        )
        self._automaton = automaton
        slots = settings.slots
        self._rows = empty_rows(
            cfg, slots, min(FIRST_CAPACITY, settings.capacity), len(self._layers)
        )
        if mesh is not None:
            self._rows = dataclasses.replace(self._rows, cache=shard_cache(self._rows.cache, mesh))
        self._clean = empty_columns(cfg, slots, self._first)
        self._row_keys = jax.random.split(jax.random.key(decoding.seed), slots)
        self._tokens: list[list[int]] = [[] for _ in range(slots)]
        self._prompts: list[tuple[int, ...]] = [()] * slots
        self._read = np.zeros(slots, np.int32)
        self._settled = np.zeros(slots, bool)
        self._anchor = np.full(slots, -1, np.int32)
        self._state = np.zeros(slots, np.int32)
        self._drawn = np.zeros(slots, np.int32)
        self._null: NullProbe | None = None
        self._ledger = Ledger(slots)

    # ------------------------------------------------------------------------------------ contract
    def refill(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> None:
        """As `Stream.refill`; a prompt that some slot still holds is copied, not read.

        Raises:
            UserError: A prompt is empty, too long, or has ids the model lacks.
        """
        check_prompts(prompts, self._cfg)
        for prompt in prompts:
            require(
                len(prompt) <= self.settings.capacity,
                f"a prompt of {len(prompt)} tokens exceeds the capacity {self.settings.capacity} "
                "of a row",
            )
        wanted = {slot: tuple(prompt) for slot, prompt in zip(slots, prompts, strict=True)}
        # Slots that already hold a wanted prompt, and one new reader for each of the others.
        holders = {prompt: slot for slot, prompt in enumerate(self._prompts) if prompt}
        readers: dict[tuple[int, ...], int] = {}
        for slot, prompt in wanted.items():
            if prompt not in holders:
                readers.setdefault(prompt, slot)
        self._ensure_capacity(max((len(prompt) for prompt in wanted.values()), default=0))
        # A reader overwrites what its slot holds: whoever wants that is served before.
        self._copy({slot: p for slot, p in wanted.items() if p in holders}, holders)
        self._read_prompts(readers)
        rest = {slot: p for slot, p in wanted.items() if readers.get(p, slot) != slot}
        self._copy(rest, readers)
        reading = set(readers.values())
        for slot, prompt in wanted.items():
            self._tokens[slot] = list(prompt)
            self._prompts[slot] = prompt
            self._read[slot] = len(prompt)
            self._ledger.start(slot, len(prompt) if slot in reading else 0)
        targets = np.asarray(list(wanted), np.int64)
        self._settled[targets] = True
        self._anchor[targets] = -1
        self._state[targets] = 0
        self._drawn[targets] = 0
        if self._null is not None:
            self._null.lengths[targets] = 0
        ids = jnp.asarray([row & 0xFFFFFFFF for row in rows], jnp.uint32)
        fresh = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(self.settings.decoding.seed), ids
        )
        self._row_keys = self._row_keys.at[targets].set(fresh)

    def query(self, active: np.ndarray) -> np.ndarray:
        """As `Stream.query`."""
        self._settle(active)
        index = [self._layers.index(layer) for layer in self.settings.layers]
        states = np.asarray(self._rows.residuals)[index].transpose(1, 0, 2)  # [S, LQ, D]
        return np.where(active[:, None, None], states, np.float32(0.0))

    def probe(self, tools: np.ndarray, strengths: np.ndarray, active: np.ndarray) -> Probe:
        """As `Stream.probe`."""
        self._settle(active)
        given = (tools != NO_TOOL) & active[:, None]  # [S, L]
        running = np.concatenate([active[:, None], given], axis=1)
        tool = np.where(given, tools, 0)
        branches = Branches(
            captured=self._tool_rows(self._captured, tool),
            layer=self._tool_rows(self._tools.layers, tool),
            additions=self._additions(tool, strengths, given),
            active=jnp.asarray(running),
        )
        probed = probe_branches(
            self._model.params,
            self._rows,
            branches,
            jnp.asarray(self._state),
            jnp.asarray(self._drawn),
            self._row_keys,
            self._ends,
            cfg=self._cfg,
            first=self._first,
            drawing=self._drawing,
            num_tokens=self.settings.probe_tokens,
        )
        tokens, log_probs, lengths, ended = jax.device_get(tuple(probed[:4]))
        self._null = NullProbe(
            probed.null_keys,
            probed.null_values,
            tokens[:, 0],
            log_probs[:, 0],
            lengths[:, 0].copy(),
            ended[:, 0],
        )
        # Every token but a branch's last is read, and each tool's branch reads the last token anew.
        reads = np.maximum(lengths - 1, 0).sum(1) + given.sum(1)
        self._ledger.add("probe", reads)
        means = log_probs.sum(-1) / np.maximum(lengths, 1)
        return Probe(lengths, means.astype(np.float32), tokens)

    def commit(
        self,
        tools: np.ndarray,
        strengths: np.ndarray,
        budgets: np.ndarray,
        until_delimiter: np.ndarray,
    ) -> list[Rollout | None]:
        """As `Stream.commit`.

        Raises:
            UserError: A budget exceeds what is left of a row's capacity.
        """
        return self.advance(tools, strengths, budgets, until_delimiter)

    def work(self) -> list[Work]:
        """As `Stream.work`."""
        return self._ledger.work()

    # ------------------------------------------------------------------------------------ segments
    def advance(
        self,
        tools: np.ndarray,
        strengths: np.ndarray,
        budgets: np.ndarray,
        until_delimiter: np.ndarray,
        quorum: int = 1,
        max_chunks: int | None = None,
    ) -> list[Rollout | None]:
        """`commit` that may return early; rows it cuts off have finish "length" and can go on.

        Args:
            tools, strengths, budgets, until_delimiter: As in `Stream.commit`.
            quorum: Leaves as soon as fewer rows than this are running.
            max_chunks: Leaves after so many chunks of tokens.

        Returns:
            What `commit` returns.
        """
        active = budgets > 0
        steered = active & (tools != NO_TOOL)
        lengths = np.asarray([len(ids) for ids in self._tokens])
        over = np.flatnonzero(active & (lengths + budgets > self.settings.capacity))
        require(
            over.size == 0,
            f"rows of {self.settings.capacity} tokens cannot hold "
            f"{lengths[over[:1]]} + {budgets[over[:1]]}",
        )
        # Unsteered rows go on from their unread token; the others need its clean state first.
        self._settle(steered | (active & (self._anchor >= 0)))
        segment = self._begin(active & ~steered, budgets, until_delimiter)
        first_hidden = self._rows.hidden
        if steered.any():
            first_hidden = self._steer(steered, tools, strengths)
        remaining = np.where(active & (segment.ended == RUNNING), budgets, 0)
        remaining -= np.where(remaining > 0, [len(ids) for ids in segment.tokens], 0)
        # Rows whose probe was adopted have an unread token although they were settled.
        fresh = self._settled & (np.asarray([not ids for ids in segment.tokens]))
        self._run(segment, first_hidden, fresh, remaining, until_delimiter, quorum, max_chunks)
        results: list[Rollout | None] = [None] * self.settings.slots
        for slot in np.flatnonzero(active):
            ids = segment.tokens[slot]
            results[slot] = Rollout(ids, segment.log_probs[slot], _FINISH[segment.ended[slot]])
            self._tokens[slot] += ids
            self._drawn[slot] += len(ids)
            self._settled[slot] = False
            if steered[slot]:
                if lengths[slot] == len(self._prompts[slot]):
                    self._prompts[slot] = ()  # its last column is no longer the prompt's own
                if self.settings.scope == "segment":
                    self._anchor[slot] = lengths[slot] - 1
        if self._null is not None:
            self._null.lengths[active] = 0
        return results

    def _begin(self, plain: np.ndarray, budgets: np.ndarray, until: np.ndarray) -> Segment:
        """Segments that already hold the probe's tokens where these are their beginning."""
        slots = self.settings.slots
        segment = Segment(
            [[] for _ in range(slots)], [[] for _ in range(slots)], np.full(slots, RUNNING)
        )
        null = self._null
        if null is None or not (plain & (null.lengths > 0)).any():
            return segment
        taken = np.where(plain, np.minimum(null.lengths, budgets), 0)  # [S]
        self._ensure_capacity(int((self._read + taken).max()))
        counts = np.maximum(taken - 1, 0).astype(np.int32)
        if counts.any():
            cache = adopt_null(self._rows.cache, null.keys, null.values, jnp.asarray(counts))
            self._rows = dataclasses.replace(self._rows, cache=cache)
        self._read += counts
        for slot in np.flatnonzero(taken):
            count = taken[slot]
            segment.tokens[slot] = null.tokens[slot, :count].tolist()
            segment.log_probs[slot] = null.log_probs[slot, :count].tolist()
            if count == null.lengths[slot] and (null.ended[slot] == EOS or until[slot]):
                segment.ended[slot] = null.ended[slot]
        for n in range(int(taken.max())):
            state = self._automaton.next[null.tokens[:, n], self._state]
            self._state = np.where(n < taken, state, self._state)
        self._ledger.add("probe_reused", taken)
        return segment

    def _steer(self, steered: np.ndarray, tools: np.ndarray, strengths: np.ndarray) -> jax.Array:
        """Steers rows; the states their segments begin with."""
        tool = np.where(steered, tools, 0)[:, None]
        self._rows, self._clean, hidden = steer(
            self._model.params,
            self._rows,
            self._clean,
            self._tool_rows(self._captured, tool)[:, 0],
            self._tool_rows(self._tools.layers, tool)[:, 0],
            self._additions(tool, strengths[:, None], steered[:, None])[:, 0],
            jnp.asarray(steered),
            cfg=self._cfg,
            first=self._first,
        )
        self._ledger.add("commit", steered)
        return hidden

    def _run(
        self,
        segment: Segment,
        first_hidden: jax.Array,
        fresh: np.ndarray,
        remaining: np.ndarray,
        until: np.ndarray,
        quorum: int,
        max_chunks: int | None,
    ) -> None:
        """Decodes chunk after chunk and puts the tokens into the segment."""
        drawn = self._drawn + np.asarray([len(ids) for ids in segment.tokens], np.int32)
        chunks = 0
        while (remaining > 0).sum() >= quorum and (max_chunks is None or chunks < max_chunks):
            chunks += 1
            running = remaining > 0
            ahead = self._read + np.minimum(remaining, self._chunk)
            self._ensure_capacity(int(ahead[running].max()))
            last = [(ids or whole or [0])[-1] for ids, whole in self._endings(segment)]
            entry = Entry(
                token=jnp.asarray(last, jnp.int32),
                fresh=jnp.asarray(fresh),
                state=jnp.asarray(self._state),
                drawn=jnp.asarray(drawn),
                limits=jnp.asarray(remaining, jnp.int32),
                until=jnp.asarray(until),
            )
            cache, chunk = decode_chunk(
                self._model.params,
                self._rows.cache,
                first_hidden,
                entry,
                self._row_keys,
                self._ends,
                jnp.asarray(quorum, jnp.int32),
                cfg=self._cfg,
                drawing=self._drawing,
                num_tokens=self._chunk,
            )
            self._rows = dataclasses.replace(self._rows, cache=cache)
            tokens, log_probs, lengths, state, ended = jax.device_get(tuple(chunk))
            for slot in np.flatnonzero(lengths):
                segment.tokens[slot] += tokens[slot, : lengths[slot]].tolist()
                segment.log_probs[slot] += log_probs[slot, : lengths[slot]].tolist()
            reads = np.where(lengths > 0, lengths - fresh, 0).astype(np.int32)
            self._ledger.add("commit", reads)
            self._read += reads
            self._state = np.where(running, state, self._state)
            segment.ended = np.where(running, ended, segment.ended)
            drawn = drawn + lengths
            remaining = np.where(running & (ended == RUNNING), remaining - lengths, 0)
            fresh = fresh & (lengths == 0)

    def _endings(self, segment: Segment) -> list[tuple[list[int], list[int]]]:
        """Per slot the last token of the segment and of the row, as lists of at most one."""
        return [
            (ids[-1:], whole[-1:]) for ids, whole in zip(segment.tokens, self._tokens, strict=True)
        ]

    # ------------------------------------------------------------------------------- given tokens
    def _settle(self, wanted: np.ndarray) -> None:
        """Reads what is unread in the wanted rows, unsteered, so that they are settled."""
        waiting = wanted & ~self._settled
        require(
            all(self._tokens[slot] for slot in np.flatnonzero(waiting)),
            "a slot without a row was asked to go on: refill it first",
        )
        plain = waiting & (self._anchor < 0)
        if plain.any():
            last = [ids[-1] if ids else 0 for ids in self._tokens]
            self._ensure_capacity(int(self._read[plain].max()) + 1)
            self._rows = read_pending(
                self._model.params,
                self._rows,
                jnp.asarray(last, jnp.int32),
                jnp.asarray(plain),
                self._layer_ids,
                cfg=self._cfg,
            )
            self._ledger.add("commit", plain)
            self._read += plain
        dirty = np.flatnonzero(waiting & (self._anchor >= 0)).tolist()
        segments = {slot: self._tokens[slot][self._anchor[slot] + 1 :] for slot in dirty}
        for bucket, group in self._groups({slot: len(ids) for slot, ids in segments.items()}):
            self._reread(bucket, group, [segments[slot] for slot in group])
        self._settled |= waiting

    def _reread(self, bucket: int, slots: list[int], segments: list[list[int]]) -> None:
        """Reads steered segments again, unsteered; the last token for the first time."""
        size = _PROMPT_ROWS if len(slots) > 1 else 1
        token_ids, lengths, targets = pad_prompts(segments, slots, bucket, size)
        anchors = np.zeros(size, np.int32)
        anchors[: len(slots)] = self._anchor[slots]
        self._ensure_capacity(int((anchors + lengths).max()) + 1)
        self._rows = reread(
            self._model.params,
            self._rows,
            jnp.asarray(token_ids),
            jnp.asarray(lengths),
            jnp.asarray(targets),
            jnp.asarray(anchors),
            self._clean,
            self._layer_ids,
            cfg=self._cfg,
            first=self._first,
        )
        for slot, ids in zip(slots, segments, strict=True):
            self._ledger.add_one(slot, "reread", len(ids) - 1)
            self._ledger.add_one(slot, "commit", 1)
            self._read[slot] = self._anchor[slot] + 1 + len(ids)
            self._anchor[slot] = -1

    def _read_prompts(self, readers: dict[tuple[int, ...], int]) -> None:
        """Reads each prompt into its slot."""
        by_slot = {slot: prompt for prompt, slot in readers.items()}
        sizes = {slot: len(prompt) for slot, prompt in by_slot.items()}
        for bucket, group in self._groups(sizes):
            size = _PROMPT_ROWS if len(group) > 1 else 1
            token_ids, lengths, targets = pad_prompts(
                [by_slot[slot] for slot in group], group, bucket, size
            )
            self._rows = read_prompts(
                self._model.params,
                self._rows,
                jnp.asarray(token_ids),
                jnp.asarray(lengths),
                jnp.asarray(targets),
                self._layer_ids,
                cfg=self._cfg,
            )

    def _groups(self, sizes: dict[int, int]) -> list[tuple[int, list[int]]]:
        """Slots by padded length, in calls of one row or of up to `_PROMPT_ROWS`."""
        buckets: dict[int, list[int]] = {}
        capacity = self._rows.cache.capacity
        for slot, size in sizes.items():
            bucket = bucket_length(size, capacity, _SEGMENT_BUCKET)
            buckets.setdefault(bucket, []).append(slot)
        groups = []
        for bucket, slots in sorted(buckets.items()):
            while slots:
                # Padding two prompts to a call of four would cost more than two calls.
                count = _PROMPT_ROWS if len(slots) >= _PROMPT_ROWS - 1 else 1
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
        self._rows = copy_prompts(
            self._rows, jnp.asarray(sources), jnp.asarray(targets), jnp.asarray(lengths)
        )

    def _ensure_capacity(self, needed: int) -> None:
        """Doubles the cache until rows of `needed` tokens fit."""
        capacity = self._rows.cache.capacity
        while capacity < needed:
            capacity = min(2 * capacity, self.settings.capacity)
        if capacity != self._rows.cache.capacity:
            self._rows = grow_rows(self._rows, capacity=capacity)

    # --------------------------------------------------------------------------------------- tools
    @staticmethod
    def _tool_rows(values: np.ndarray, tool: np.ndarray) -> jax.Array:
        """values[tool] as int32, zeros where there are no tools at all."""
        if not len(values):
            return jnp.zeros(tool.shape, jnp.int32)
        return jnp.asarray(values[tool], jnp.int32)

    def _additions(self, tool: np.ndarray, strengths: np.ndarray, given: np.ndarray) -> jax.Array:
        """strength * vector per branch [S, B, D] float32; zeros where none is given."""
        if not len(self._tools.names):
            return jnp.zeros((*tool.shape, self._cfg.hidden_size), jnp.float32)
        scale = np.where(given, strengths, 0.0).astype(np.float32)
        return jnp.asarray(scale[:, :, None] * self._tools.vectors[tool].astype(np.float32))
