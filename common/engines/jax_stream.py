"""S rows of the JAX engine that advance segment by segment."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.engines.base import NO_TOOL, Finish, Probe, Rollout, StreamSettings, Toolbox, Work
from common.engines.checks import check_budgets
from common.engines.delimiter import Automaton
from common.engines.jax_decode import (
    DELIMITER,
    EOS,
    RUNNING,
    Drawing,
    Ends,
    Entry,
    decode_chunk,
)
from common.engines.jax_probe import Branches, adopt_null, probe_branches
from common.engines.jax_slots import Slots
from common.engines.schedule import Advancing
from common.lm.weights import Model

CHUNK = 32
"""Tokens between two returns to the host."""

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


class JaxStream(Advancing):
    """A `Stream` over a decoder.

    Host arrays over slots: `_state` of the delimiter's automaton, `_drawn` tokens generated.
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
        self.settings = settings
        self._model, self._cfg, self._chunk = model, model.cfg, chunk
        self._slots = Slots(model, settings, tools, mesh)
        overwritten = settings.scope == "segment" and bool(tools.names)
        self._trail_layer = self._slots.first if overwritten else None
        decoding = settings.decoding
        self._drawing = Drawing(decoding.temperature, decoding.top_p)
        self._automaton = automaton
        self._ends = Ends(
            jnp.asarray(decoding.stop_ids or (-1,), jnp.int32),
            jnp.asarray(automaton.next),
            jnp.asarray(automaton.hit),
        )
        self._row_keys = jax.random.split(jax.random.key(decoding.seed), settings.slots)
        self._state = np.zeros(settings.slots, np.int32)
        self._drawn = np.zeros(settings.slots, np.int32)
        self._null: NullProbe | None = None

    # ------------------------------------------------------------------------------------ contract
    def refill(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> None:
        """As `Stream.refill`; a prompt that some slot still holds is copied, not read.

        Raises:
            UserError: A prompt is empty, too long, or has ids the model lacks.
        """
        self._slots.start(slots, prompts)
        targets = np.asarray(slots, np.int64)
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
        self._slots.settle(active)
        index = [self._slots.layers.index(layer) for layer in self.settings.layers]
        states = np.asarray(self._slots.rows.residuals)[index].transpose(1, 0, 2)  # [S, LQ, D]
        return np.where(active[:, None, None], states, np.float32(0.0))

    def probe(self, tools: np.ndarray, strengths: np.ndarray, active: np.ndarray) -> Probe:
        """As `Stream.probe`."""
        self._slots.settle(active)
        given = (tools != NO_TOOL) & active[:, None]  # [S, L]
        running = np.concatenate([active[:, None], given], axis=1)
        branches = Branches(
            *self._slots.injections(tools, strengths, given), active=jnp.asarray(running)
        )
        probed = probe_branches(
            self._model.params,
            self._slots.rows,
            branches,
            jnp.asarray(self._state),
            jnp.asarray(self._drawn),
            self._row_keys,
            self._ends,
            cfg=self._cfg,
            first=self._slots.first,
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
        self._slots.ledger.add("probe", reads)
        means = log_probs.sum(-1) / np.maximum(lengths, 1)
        return Probe(lengths, means.astype(np.float32), tokens)

    def work(self) -> list[Work]:
        """As `Stream.work`."""
        return self._slots.ledger.work()

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
        """As `Advancing.advance`."""
        active = budgets > 0
        steered = active & (tools != NO_TOOL)
        check_budgets(self._slots.tokens, budgets, self.settings.capacity)
        # Unsteered rows go on from their unread token; the others need its clean state first.
        self._slots.settle(steered)
        self._slots.clear_traces(active)
        segment = self._begin(active & ~steered, budgets, until_delimiter)
        first_hidden = self._slots.rows.hidden
        if steered.any():
            first_hidden = self._slots.steer(steered, tools, strengths)
        remaining = np.where(active & (segment.ended == RUNNING), budgets, 0)
        remaining -= np.where(remaining > 0, [len(ids) for ids in segment.tokens], 0)
        # Rows whose probe was adopted have an unread token although they were settled.
        fresh = self._slots.settled & (np.asarray([not ids for ids in segment.tokens]))
        ends = until_delimiter, quorum, max_chunks
        trails = self._run(segment, first_hidden, fresh, remaining, *ends)
        trail = _join(trails) if steered.any() and self._trail_layer is not None else None
        results: list[Rollout | None] = [None] * self.settings.slots
        for slot in np.flatnonzero(active):
            ids = segment.tokens[slot]
            results[slot] = Rollout(ids, segment.log_probs[slot], _FINISH[segment.ended[slot]])
            self._slots.append(slot, ids, bool(steered[slot]), trail)
            self._drawn[slot] += len(ids)
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
        self._slots.ensure_capacity(int((self._slots.read + taken).max()))
        counts = np.maximum(taken - 1, 0).astype(np.int32)
        if counts.any():
            cache = adopt_null(self._slots.rows.cache, null.keys, null.values, jnp.asarray(counts))
            self._slots.rows = dataclasses.replace(self._slots.rows, cache=cache)
        self._slots.read += counts
        for slot in np.flatnonzero(taken):
            count = taken[slot]
            segment.tokens[slot] = null.tokens[slot, :count].tolist()
            segment.log_probs[slot] = null.log_probs[slot, :count].tolist()
            if count == null.lengths[slot] and (null.ended[slot] == EOS or until[slot]):
                segment.ended[slot] = null.ended[slot]
        for n in range(int(taken.max())):
            state = self._automaton.next[null.tokens[:, n], self._state]
            self._state = np.where(n < taken, state, self._state)
        self._slots.ledger.add("probe_reused", taken)
        return segment

    def _run(
        self,
        segment: Segment,
        first_hidden: jax.Array,
        fresh: np.ndarray,
        remaining: np.ndarray,
        until: np.ndarray,
        quorum: int,
        max_chunks: int | None,
    ) -> list[jax.Array]:
        """Decodes chunk after chunk and puts the tokens into the segment.

        Returns:
            The chunks' trails.
        """
        trails: list[jax.Array] = []
        drawn = self._drawn + np.asarray([len(ids) for ids in segment.tokens], np.int32)
        chunks = 0
        while (remaining > 0).sum() >= quorum and (max_chunks is None or chunks < max_chunks):
            chunks += 1
            running = remaining > 0
            ahead = self._slots.read + np.minimum(remaining, self._chunk)
            self._slots.ensure_capacity(int(ahead[running].max()))
            last = [(ids or whole or [0])[-1] for ids, whole in self._endings(segment)]
            entry = Entry(
                token=jnp.asarray(last, jnp.int32),
                fresh=jnp.asarray(fresh),
                state=jnp.asarray(self._state),
                drawn=jnp.asarray(drawn),
                limits=jnp.asarray(remaining, jnp.int32),
                until=jnp.asarray(until),
            )
            cache, chunk, trail = decode_chunk(
                self._model.params,
                self._slots.rows.cache,
                first_hidden,
                entry,
                self._row_keys,
                self._ends,
                jnp.asarray(quorum, jnp.int32),
                cfg=self._cfg,
                drawing=self._drawing,
                num_tokens=self._chunk,
                trail_layer=self._trail_layer,
            )
            trails.append(trail)
            self._slots.rows = dataclasses.replace(self._slots.rows, cache=cache)
            tokens, log_probs, lengths, state, ended = jax.device_get(tuple(chunk))
            for slot in np.flatnonzero(lengths):
                segment.tokens[slot] += tokens[slot, : lengths[slot]].tolist()
                segment.log_probs[slot] += log_probs[slot, : lengths[slot]].tolist()
            reads = np.where(lengths > 0, lengths - fresh, 0).astype(np.int32)
            self._slots.ledger.add("commit", reads)
            self._slots.read += reads
            self._state = np.where(running, state, self._state)
            segment.ended = np.where(running, ended, segment.ended)
            drawn = drawn + lengths
            remaining = np.where(running & (ended == RUNNING), remaining - lengths, 0)
            fresh = fresh & (lengths == 0)
        return trails

    def _endings(self, segment: Segment) -> list[tuple[list[int], list[int]]]:
        """Per slot the last token of the segment and of the row, as lists of at most one."""
        return [
            (ids[-1:], whole[-1:])
            for ids, whole in zip(segment.tokens, self._slots.tokens, strict=True)
        ]


def _join(trails: list[jax.Array]) -> jax.Array:
    """Trails of a segment's chunks as one [S, W, D], W a power of two.

    Steered rows draw their first token without reading one, so their first chunk is one short.
    """
    whole = jnp.concatenate([trails[0][:, :-1], *trails[1:]], axis=1)
    width = 1 << whole.shape[1].bit_length()
    return jnp.pad(whole, ((0, 0), (0, width - whole.shape[1]), (0, 0)))
