"""S rows of the transformers engine that advance segment by segment."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from common.engines.base import NO_TOOL, Finish, Probe, Rollout, StreamSettings, Toolbox, Work
from common.engines.checks import check_budgets, check_fit, check_held, check_stream
from common.engines.delimiter import Automaton
from common.engines.hf_rows import HfRows, HookedSteering
from common.engines.ledger import Ledger
from common.engines.probes import asked_branches, gather_probe
from common.engines.schedule import Advancing
from common.lm.sampling import fold_rows, make_sampling, sample

if TYPE_CHECKING:
    from common.engines.hf_engine import HfEngine

CHUNK = 32
"""Tokens after which `advance` may be left."""
_SLACK = 64  # columns nobody owns before the cache is compacted


class Continued(NamedTuple):
    """Tokens of R rows.

    Attributes:
        tokens: Per row.
        log_probs: Per row.
        finish: Per row; None = cut off.
        state: [R] int32, of the automaton.
        reads: [R] int, tokens that were read.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    finish: list[Finish | None]
    state: np.ndarray
    reads: np.ndarray


class HfStream(Advancing):
    """A `Stream` over a transformers model.

    Host arrays over slots: `_read` tokens in the cache (all of them in a settled row, whose state
    is in `_hidden` and `_states`), `_state` of the delimiter's automaton, `_drawn` tokens
    generated.
    """

    def __init__(
        self, engine: "HfEngine", settings: StreamSettings, tools: Toolbox, automaton: Automaton
    ) -> None:
        """Opens empty slots.

        Args:
            engine: The engine.
            settings: Settings.
            tools: Steering vectors.
            automaton: Of the delimiter.

        Raises:
            UserError: Settings or tools do not fit the model.
        """
        import torch

        check_stream(settings, tools, engine.num_layers, engine.hidden_size, engine.max_positions)
        self.settings = settings
        self._model, self._tools, self._automaton = engine.model, tools, automaton
        slots, width = settings.slots, engine.hidden_size
        self._rows = HfRows.empty(engine.model, slots)
        self._hidden = torch.zeros(
            (slots, width), dtype=engine.model.dtype, device=engine.model.device
        )
        self._states = np.zeros((slots, len(settings.layers), width), np.float32)
        self._tokens: list[list[int]] = [[] for _ in range(slots)]
        self._read = np.zeros(slots, np.int64)
        self._settled = np.zeros(slots, bool)
        self._reread = np.zeros(slots, np.int64)  # unread tokens that have been read before
        self._state = np.zeros(slots, np.int32)
        self._drawn = np.zeros(slots, np.int64)
        self._row_keys = jax.random.split(jax.random.key(settings.decoding.seed), slots)
        self._ledger = Ledger(slots)

    # ------------------------------------------------------------------------------------ contract
    def refill(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> None:
        """As `Stream.refill`; equal prompts are read once.

        Raises:
            UserError: A prompt is empty or too long.
        """
        if not len(slots):
            return
        check_fit(prompts, self.settings.capacity)
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        sources = [distinct[tuple(prompt)] for prompt in prompts]
        fresh = HfRows.empty(self._model, len(distinct))
        read = fresh.read(*_padded(list(distinct)), self.settings.layers)
        self._rows.replace(slots, fresh, sources)
        self._hidden[list(slots)] = read.hidden[sources]
        self._states[list(slots)] = read.states[:, sources].transpose(1, 0, 2)
        readers: dict[int, int] = {}
        for slot, source in zip(slots, sources, strict=True):
            readers.setdefault(source, slot)
        for slot, prompt, source, row in zip(slots, prompts, sources, rows, strict=True):
            self._tokens[slot] = list(prompt)
            self._read[slot] = len(prompt)
            self._settled[slot] = True
            self._reread[slot] = 0
            self._state[slot] = self._drawn[slot] = 0
            key = jax.random.fold_in(jax.random.key(self.settings.decoding.seed), row & 0xFFFFFFFF)
            self._row_keys = self._row_keys.at[slot].set(key)
            self._ledger.start(slot, len(prompt) if readers[source] == slot else 0)

    def query(self, active: np.ndarray) -> np.ndarray:
        """As `Stream.query`."""
        self._settle(active)
        return np.where(active[:, None, None], self._states, np.float32(0.0))

    def probe(self, tools: np.ndarray, strengths: np.ndarray, active: np.ndarray) -> Probe:
        """As `Stream.probe`: every branch is a row of its own that reads the last token again."""
        self._settle(active)
        asked = asked_branches(tools, strengths, active)
        if not asked:
            return gather_probe(self.settings, (), (), ())
        slots = [branch.slot for branch in asked]
        chosen = np.asarray([branch.tool for branch in asked])
        scale = np.asarray([branch.strength for branch in asked])
        fork = self._rows.fork(slots)
        fork.truncate(self._read[slots] - 1)
        last = np.asarray([[self._tokens[slot][-1]] for slot in slots])
        read = fork.read(last, np.ones(len(slots), np.int64), (), self._steering(chosen, scale))
        result = self._continue(
            fork,
            read.hidden,
            np.full(len(slots), self.settings.probe_tokens),
            np.ones(len(slots), bool),
            self._state[slots],
            self._drawn[slots],
            self._row_keys[np.asarray(slots)],
        )
        for slot, reads in zip(slots, result.reads.tolist(), strict=True):
            self._ledger.add_one(slot, "probe", reads + 1)
        return gather_probe(self.settings, asked, result.tokens, result.log_probs)

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
        """As `Advancing.advance`."""
        check_budgets(self._tokens, budgets, self.settings.capacity)
        active = budgets > 0
        steered = active & (tools != NO_TOOL)
        if not active.any():
            return [None] * self.settings.slots
        self._settle(active)
        hidden = self._hidden
        if steered.any():
            hidden = self._steer(steered, tools, strengths)
        limits = budgets if max_chunks is None else np.minimum(budgets, max_chunks * CHUNK)
        result = self._continue(
            self._rows,
            hidden,
            limits,
            until_delimiter,
            self._state,
            self._drawn,
            self._row_keys,
            quorum,
        )
        results: list[Rollout | None] = [None] * self.settings.slots
        for slot in np.flatnonzero(active).tolist():
            ids = result.tokens[slot]
            start = len(self._tokens[slot])
            results[slot] = Rollout(ids, result.log_probs[slot], result.finish[slot] or "length")
            self._tokens[slot] += ids
            self._drawn[slot] += len(ids)
            self._read[slot] = start + result.reads[slot]
            self._settled[slot] = False
            if steered[slot] and self.settings.scope == "segment":
                self._read[slot] = start - 1  # the trace begins with the steered token
                self._reread[slot] = len(ids)
        self._state = np.where(active, result.state, self._state)
        self._ledger.add("commit", np.where(active, result.reads, 0))
        self._rows.truncate(self._read)
        if self._rows.mask.shape[1] > self._read.max() + _SLACK:
            self._rows.compact()
        return results

    def _steer(self, steered: np.ndarray, tools: np.ndarray, strengths: np.ndarray) -> Any:
        """Reads the last tokens of rows again with their tools; the states to go on from."""
        import torch

        self._rows.truncate(np.where(steered, self._read - 1, self._read))
        last = np.asarray([[(ids or [0])[-1]] for ids in self._tokens])
        steering = self._steering(np.where(steered, tools, NO_TOOL), strengths)
        read = self._rows.read(last, steered.astype(np.int64), (), steering)
        self._ledger.add("commit", steered)
        mine = torch.as_tensor(steered, device=self._hidden.device)[:, None]
        return torch.where(mine, read.hidden, self._hidden)

    def _steering(self, tools: np.ndarray, strengths: np.ndarray) -> HookedSteering:
        """Steering of passes over one token per row."""
        import torch

        given = tools != NO_TOOL
        width = self._hidden.shape[1]
        additions = np.zeros((len(tools), width), np.float32)
        layers = np.full(len(tools), -1)
        if given.any():
            layers[given] = self._tools.layers[tools[given]]
            scale = np.asarray(strengths, np.float32)[given, None]
            additions[given] = scale * self._tools.vectors[tools[given]].astype(np.float32)
        columns = np.zeros(len(tools), np.int64)
        tensor = torch.as_tensor(additions, device=self._hidden.device)
        return HookedSteering(layers, columns, tensor)

    def _continue(
        self,
        rows: HfRows,
        hidden: Any,
        limits: np.ndarray,
        until: np.ndarray,
        state: np.ndarray,
        drawn: np.ndarray,
        row_keys: jax.Array,
        quorum: int = 1,
    ) -> Continued:
        """Generates until every row has ended or reached its limit; limit 0 = idle."""
        count = len(limits)
        out = Continued(
            [[] for _ in range(count)],
            [[] for _ in range(count)],
            [None] * count,
            state.copy(),
            np.zeros(count, np.int64),
        )
        running = limits > 0
        stops = self.settings.decoding.stop_ids
        while running.sum() >= quorum:
            if any(out.tokens):
                last = np.asarray([[(ids or [0])[-1]] for ids in out.tokens])
                hidden = rows.read(last, running.astype(np.int64)).hidden
                out.reads[running] += 1
            tokens, log_probs = self._draw(rows.logits(hidden), drawn, row_keys)
            hits = self._automaton.hit[tokens, out.state]
            out.state[running] = self._automaton.next[tokens, out.state][running]
            for r in np.flatnonzero(running).tolist():
                out.tokens[r].append(int(tokens[r]))
                out.log_probs[r].append(float(log_probs[r]))
                if tokens[r] in stops:
                    out.finish[r] = "eos"
                elif hits[r] and until[r]:
                    out.finish[r] = "delimiter"
                running[r] = out.finish[r] is None and len(out.tokens[r]) < limits[r]
            drawn = drawn + 1
        return out

    def _draw(
        self, logits: Any, drawn: np.ndarray, row_keys: jax.Array
    ) -> tuple[np.ndarray, np.ndarray]:
        """One token per row and its log-probability at temperature 1."""
        import torch

        decoding = self.settings.decoding
        if decoding.temperature == 0.0:
            token = logits.argmax(-1)
            chosen = logits.gather(1, token[:, None])[:, 0] - torch.logsumexp(logits, -1)
            return token.cpu().numpy(), chosen.cpu().numpy()
        rows = len(logits)
        padded = 1 << (rows - 1).bit_length()  # few shapes, few programs
        values = np.zeros((padded, logits.shape[1]), np.float32)
        values[:rows] = logits.cpu().numpy()
        index = np.zeros(padded, np.uint32)
        index[:rows] = drawn
        keys = row_keys[np.minimum(np.arange(padded), rows - 1)]
        token, log_prob = _sample(values, keys, index, decoding.temperature, decoding.top_p)
        return np.asarray(token)[:rows], np.asarray(log_prob)[:rows]

    def _settle(self, wanted: np.ndarray) -> None:
        """Reads what is unread in the wanted rows, unsteered."""
        import torch

        waiting = wanted & ~self._settled
        check_held([self._tokens[slot] for slot in np.flatnonzero(waiting)])
        if not waiting.any():
            return
        unread = [
            ids[self._read[slot] :] if waiting[slot] else []
            for slot, ids in enumerate(self._tokens)
        ]
        token_ids, lengths = _padded(unread)
        read = self._rows.read(token_ids, lengths, self.settings.layers)
        mine = torch.as_tensor(waiting, device=self._hidden.device)[:, None]
        self._hidden = torch.where(mine, read.hidden, self._hidden)
        self._states[waiting] = read.states.transpose(1, 0, 2)[waiting]
        self._read += lengths
        again = np.where(waiting, self._reread, 0)
        self._ledger.add("reread", again)
        self._ledger.add("commit", lengths - again)
        self._reread[waiting] = 0
        self._settled |= waiting


@functools.partial(jax.jit, static_argnums=(3, 4))
def _sample(
    logits: jax.Array, row_keys: jax.Array, index: jax.Array, temperature: float, top_p: float
) -> tuple[jax.Array, jax.Array]:
    """The tokens every engine draws: row b's from fold_in(row_keys[b], index[b])."""
    sampling = make_sampling(logits.shape[0], temperature, top_p=top_p)
    return sample(logits, fold_rows(row_keys, index), sampling)


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [R, T] and lengths [R]."""
    lengths = np.asarray([len(ids) for ids in sequences], np.int64)
    token_ids = np.zeros((len(sequences), int(lengths.max())), np.int64)
    for row, ids in zip(token_ids, sequences, strict=True):
        row[: len(ids)] = ids
    return token_ids, lengths
