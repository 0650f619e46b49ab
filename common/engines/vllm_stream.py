"""S rows of the vLLM engine: every query, probe and segment is a request with the whole prefix."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.engines.base import NO_TOOL, Probe, Rollout, StreamSettings, Toolbox, Work
from common.engines.checks import check_budgets, check_fit, check_held
from common.engines.delimiter import Automaton
from common.engines.ledger import Ledger
from common.engines.probes import asked_branches, gather_probe
from common.engines.vllm_requests import Request, Runner, request_seed
from common.engines.vllm_worker import Job


class VllmStream:
    """A `Stream` that resends prefixes; vLLM's prefix cache spares the unsteered ones.

    Under the scope "persistent" a row's earlier steerings are repeated in every request, which
    gives the cache that was steered once.
    """

    def __init__(
        self,
        llm: Any,
        runner: Runner,
        settings: StreamSettings,
        tools: Toolbox,
        automaton: Automaton,
        per_request_seeds: bool,
    ) -> None:
        """Opens empty slots and gives the vectors to the workers.

        Args:
            llm: vLLM's `LLM`.
            runner: Of its engine.
            settings: Settings.
            tools: Steering vectors.
            automaton: Of the delimiter.
            per_request_seeds: Whether requests may carry seeds.
        """
        self.settings = settings
        self._llm, self._runner, self._tools = llm, runner, tools
        self._automaton, self._seeds = automaton, per_request_seeds
        watched = sorted({*settings.layers, *tools.layers.tolist()})
        llm.collective_rpc("watch_layers", args=(watched,))
        llm.collective_rpc("set_vectors", args=(np.asarray(tools.vectors, np.float32),))
        slots = settings.slots
        self._tokens: list[list[int]] = [[] for _ in range(slots)]
        self._prompt = np.zeros(slots, np.int64)  # lengths
        self._row = np.zeros(slots, np.int64)
        self._read = np.zeros(slots, np.int64)  # positions computed at least once
        self._state = np.zeros(slots, np.int64)
        self._states: list[np.ndarray | None] = [None] * slots
        self._traces: list[list[tuple[int, int, int, float]]] = [[] for _ in range(slots)]
        self._tags = 0
        self._ledger = Ledger(slots)

    def refill(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> None:
        """As `Stream.refill`; a prompt is read by the row's first request.

        Raises:
            UserError: A prompt is empty or too long.
        """
        check_fit(prompts, self.settings.capacity)
        for slot, prompt, row in zip(slots, prompts, rows, strict=True):
            self._tokens[slot] = list(prompt)
            self._prompt[slot], self._row[slot] = len(prompt), row
            self._read[slot] = self._state[slot] = 0
            self._states[slot] = None
            self._traces[slot] = []
            self._ledger.start(slot, 0)

    def query(self, active: np.ndarray) -> np.ndarray:
        """As `Stream.query`."""
        asked = [s for s in np.flatnonzero(active).tolist() if self._states[s] is None]
        requests = []
        for slot in asked:
            self._tags += 1
            job = Job(self._tags, [len(self._tokens[slot]) - 1], list(self._traces[slot]))
            requests.append(self._request(slot, 1, False, job))
        self._run(asked, requests, "probe")
        if asked:
            captured = self._llm.collective_rpc("take_states")[0]
            for slot, request in zip(asked, requests, strict=True):
                assert request.job is not None
                found, last = captured[request.job.tag], request.job.capture[0]
                states = [found[layer, last] for layer in self.settings.layers]
                self._states[slot] = np.asarray(states, np.float32)
        width = self._tools.vectors.shape[1]
        empty = np.zeros((len(self.settings.layers), width), np.float32)
        return np.stack(
            [
                empty if not on or state is None else state
                for on, state in zip(active, self._states, strict=True)
            ]
        )

    def probe(self, tools: np.ndarray, strengths: np.ndarray, active: np.ndarray) -> Probe:
        """As `Stream.probe`."""
        asked = asked_branches(tools, strengths, active)
        requests = []
        for slot, _, tool, strength in asked:
            job = self._job(slot, tool, strength)
            requests.append(self._request(slot, self.settings.probe_tokens, True, job))
        self._run([branch.slot for branch in asked], requests, "probe")
        token_ids = [request.tokens for request in requests]
        log_probs = [request.log_probs for request in requests]
        return gather_probe(self.settings, asked, token_ids, log_probs)

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
        check_budgets(self._tokens, budgets, self.settings.capacity)
        active = np.flatnonzero(budgets > 0).tolist()
        requests = []
        for slot in active:
            job = self._job(slot, int(tools[slot]), float(strengths[slot]))
            until = bool(until_delimiter[slot])
            requests.append(self._request(slot, int(budgets[slot]), until, job))
        self._run(active, requests, "commit")
        results: list[Rollout | None] = [None] * self.settings.slots
        for slot, request in zip(active, requests, strict=True):
            results[slot] = Rollout(request.tokens, request.log_probs, request.finish)
            if request.job is not None and self.settings.scope == "persistent":
                self._traces[slot] = request.job.steer
            for token in request.tokens:
                self._state[slot] = self._automaton.next[token, self._state[slot]]
            self._tokens[slot] += request.tokens
            self._read[slot] = len(self._tokens[slot]) - 1
            self._states[slot] = None
        return results

    def work(self) -> list[Work]:
        """As `Stream.work`."""
        return self._ledger.work()

    def _job(self, slot: int, tool: int, strength: float) -> Job | None:
        """Steering at the row's last token, on top of what the row keeps; None = none at all."""
        steer = list(self._traces[slot])
        if tool != NO_TOOL:
            position = len(self._tokens[slot]) - 1
            steer.append((position, int(self._tools.layers[tool]), tool, strength))
        return Job(0, [], steer) if steer else None

    def _request(self, slot: int, limit: int, until: bool, job: Job | None) -> Request:
        decoding = self.settings.decoding
        seed = None
        if self._seeds and decoding.temperature > 0.0:
            drawn = len(self._tokens[slot]) - int(self._prompt[slot])
            seed = request_seed(decoding.seed, int(self._row[slot]), drawn)
        automaton = self._automaton if until else None
        state = int(self._state[slot])
        return Request(list(self._tokens[slot]), limit, decoding, seed, automaton, state, job)

    def _run(self, slots: Sequence[int], requests: Sequence[Request], purpose: str) -> None:
        """Runs requests and counts: new positions, resent ones, generated tokens that were read."""
        check_held([self._tokens[slot] for slot in slots])
        self._runner.run(requests)
        for slot, request in zip(slots, requests, strict=True):
            length, prompt = len(request.prompt), int(self._prompt[slot])
            begin = max(int(self._read[slot]), request.cached)
            self._ledger.add_one(slot, "prefill", max(prompt - begin, 0))
            self._ledger.add_one(slot, "commit", length - max(begin, prompt))
            self._ledger.add_one(slot, "reread", begin - request.cached)
            self._ledger.add_one(slot, purpose, max(len(request.tokens) - 1, 0))
            self._read[slot] = max(int(self._read[slot]), length)
