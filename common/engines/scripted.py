"""An engine without a model: every answer is read from a table. For tests of policies only.

The table says what follows a text under a tool, and which hidden states a text has. The engine is
token-native like the others: ids are indices into the script's vocabulary, and any further text
(a prompt) is one token behind it. Whatever the table does not hold is an error, so a policy that
asks another question than the recorded one fails at once. Strengths do not change what is said.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.engines.base import (
    NO_TOOL,
    Decoding,
    Finish,
    OnRollout,
    Probe,
    Rollout,
    StreamSettings,
    Toolbox,
    Work,
)
from common.engines.checks import check_fit
from common.engines.probes import asked_branches, gather_probe
from common.errors import UserError

Key = tuple[str, str | None, int, bool]
"""Text so far, tool or None, most tokens, whether a delimiter ends it."""


@dataclasses.dataclass(frozen=True)
class Script:
    """What the engine says.

    Attributes:
        vocab: Text of every token id.
        stop_ids: Ids that end a row and are not part of the text.
        generate: Continuations.
        layers: Layers whose states are recorded.
        states: Per text float32 [len(layers), H], at its last token.
        num_layers: Of the model that is played.
        hidden_size: H.
        samples: Per prompt text what `sample` draws: row r gets entry r modulo their number;
            prompts that are not in it are looked up in `generate`.
    """

    vocab: tuple[str, ...]
    stop_ids: tuple[int, ...]
    generate: Mapping[Key, Rollout]
    layers: tuple[int, ...] = ()
    states: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    num_layers: int = 0
    hidden_size: int = 0
    samples: Mapping[str, Sequence[Rollout]] = dataclasses.field(default_factory=dict)


def read_script(path: str | Path, arrays: str | Path | None = None, num_layers: int = 0) -> Script:
    """A script from a recording.

    Args:
        path: JSON with `vocab`, `eos_id` and `generate`, keyed "<text>||<tool or null>||<most
            tokens>||<1 if a delimiter ends it>", at its top or under "world"; with states also
            `state_prefixes`, `state_layers` and `hidden_size`.
        arrays: npz whose "states" [text, layer, H] belong to `state_prefixes`.
        num_layers: Of the model that is played; 0 = up to the last recorded layer.

    Returns:
        The script.

    Raises:
        UserError: A file is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        states = np.zeros((0, 0, 0), np.float32)
        if arrays is not None:
            with np.load(arrays) as file:
                states = file["states"]
        world = content.get("world", content)
        layers = tuple(world.get("state_layers", ()))
        prefixes = world.get("state_prefixes", [])
        return Script(
            vocab=tuple(world["vocab"]),
            stop_ids=(world["eos_id"],),
            generate={
                _parse_key(key): _parse_rollout(value, world["eos_id"])
                for key, value in world["generate"].items()
            },
            layers=layers,
            states={} if arrays is None else dict(zip(prefixes, states, strict=True)),
            num_layers=num_layers or max(layers, default=0) + 1,
            hidden_size=world.get("hidden_size", states.shape[-1]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the script '{path}': {error}") from error


def _parse_key(text: str) -> Key:
    prefix, tool, tokens, stops = text.rsplit("||", 3)
    return prefix, None if tool == "null" else tool, int(tokens), stops == "1"


def _parse_rollout(value: Mapping[str, Any], eos_id: int) -> Rollout:
    token_ids = list(value["token_ids"])
    finish: Finish = "length"
    if value["finish_reason"] != "length":
        finish = "eos" if token_ids[-1:] == [eos_id] else "delimiter"
    return Rollout(token_ids, list(value["logprobs"]), finish)


class ScriptedEngine:
    """An `Engine` that reads its lines."""

    name = "scripted"
    capabilities = frozenset(("sample", "states", "steer"))

    def __init__(self, script: Script) -> None:
        """Args: script: what it says."""
        self.script = script
        self.num_layers = script.num_layers
        self.hidden_size = script.hidden_size
        self._texts = list(script.vocab)

    def encode(self, text: str) -> list[int]:
        """A text as one token, added to the vocabulary where it is new."""
        if text not in self._texts:
            self._texts.append(text)
        return [self._texts.index(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; stop tokens have none."""
        stops = self.script.stop_ids
        return "".join(self._texts[i] for i in token_ids if i not in stops)

    def token_bytes(self) -> list[bytes]:
        """What each token of the script's vocabulary adds to a text."""
        stops = self.script.stop_ids
        vocab = enumerate(self.script.vocab)
        return [b"" if i in stops else text.encode() for i, text in vocab]

    def continuation(
        self, token_ids: Sequence[int], tool: str | None, max_tokens: int, until_delimiter: bool
    ) -> Rollout:
        """What the table holds.

        Raises:
            UserError: Nothing for this question.
        """
        key = (self.decode(token_ids), tool, max_tokens, until_delimiter)
        found = self.script.generate.get(key)
        if found is None:
            raise UserError(f"the script has no line for {key!r}")
        return found

    def state(self, token_ids: Sequence[int], layers: Sequence[int]) -> np.ndarray:
        """Recorded states [len(layers), H] at the last token.

        Raises:
            UserError: The text or a layer is not recorded.
        """
        text = self.decode(token_ids)
        missing = [layer for layer in layers if layer not in self.script.layers]
        if text not in self.script.states or missing:
            raise UserError(f"the script has no states for layers {list(layers)} of {text!r}")
        rows = [self.script.layers.index(layer) for layer in layers]
        return np.asarray(self.script.states[text][rows], np.float32)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        decoding: Decoding,
        max_new_tokens: int,
        on_rollout: OnRollout | None = None,
        task_rows: int = 0,
    ) -> list[list[Rollout]]:
        """As `Engine.sample`; see `Script.samples`."""
        del decoding, task_rows
        results: list[list[Rollout]] = []
        for i, (prompt, row_ids) in enumerate(zip(prompts, rows, strict=True)):
            lines = self.script.samples.get(self.decode(prompt))
            results.append([])
            for j, row in enumerate(row_ids):
                if lines:
                    rollout = lines[row % len(lines)]
                else:
                    rollout = self.continuation(prompt, None, max_new_tokens, False)
                results[-1].append(rollout)
                if on_rollout is not None:
                    on_rollout(i, j, rollout)
        return results

    def states_at(
        self,
        token_ids: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
    ) -> list[np.ndarray]:
        """As `Engine.states_at`."""
        shape = (-1, len(layers), self.hidden_size)
        return [
            np.asarray([self.state(ids[: p + 1], layers) for p in where], np.float32).reshape(shape)
            for ids, where in zip(token_ids, positions, strict=True)
        ]

    def open(self, settings: StreamSettings, tools: Toolbox) -> "ScriptedStream":
        """As `Engine.open`."""
        return ScriptedStream(self, settings, tools)


class ScriptedStream:
    """A `Stream` that reads its lines; its work counts tokens as an engine that forks would."""

    def __init__(self, engine: ScriptedEngine, settings: StreamSettings, tools: Toolbox) -> None:
        """Args: engine: the reader; settings, tools: as in `Engine.open`."""
        self.settings = settings
        self._engine = engine
        self._tools = tools
        self._rows: list[list[int]] = [[] for _ in range(settings.slots)]
        self._work = [Work()] * settings.slots

    def refill(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> None:
        """As `Stream.refill`."""
        del rows
        check_fit(prompts, self.settings.capacity)
        for slot, prompt in zip(slots, prompts, strict=True):
            self._rows[slot] = list(prompt)
            self._work[slot] = Work(prefill=len(prompt))

    def query(self, active: np.ndarray) -> np.ndarray:
        """As `Stream.query`."""
        layers = self.settings.layers
        states = np.zeros((len(self._rows), len(layers), self._engine.hidden_size), np.float32)
        for slot in np.flatnonzero(active):
            states[slot] = self._engine.state(self._rows[slot], layers)
        return states

    def probe(self, tools: np.ndarray, strengths: np.ndarray, active: np.ndarray) -> Probe:
        """As `Stream.probe`."""
        asked = asked_branches(tools, strengths, active)
        limit = self.settings.probe_tokens
        lines = [self._line(branch.slot, branch.tool, limit, True) for branch in asked]
        for branch, line in zip(asked, lines, strict=True):
            work = self._work[branch.slot]
            self._work[branch.slot] = work._replace(probe=work.probe + len(line.token_ids))
        token_ids = [line.token_ids for line in lines]
        return gather_probe(self.settings, asked, token_ids, [line.log_probs for line in lines])

    def commit(
        self,
        tools: np.ndarray,
        strengths: np.ndarray,
        budgets: np.ndarray,
        until_delimiter: np.ndarray,
    ) -> list[Rollout | None]:
        """As `Stream.commit`."""
        del strengths
        results: list[Rollout | None] = [None] * len(self._rows)
        for slot in np.flatnonzero(budgets):
            line = self._line(slot, tools[slot], int(budgets[slot]), bool(until_delimiter[slot]))
            self._rows[slot] += line.token_ids
            work = self._work[slot]
            self._work[slot] = work._replace(commit=work.commit + len(line.token_ids))
            results[slot] = line
        return results

    def work(self) -> list[Work]:
        """As `Stream.work`."""
        return list(self._work)

    def _line(self, slot: int, tool: int, limit: int, until_delimiter: bool) -> Rollout:
        name = None if tool == NO_TOOL else self._tools.names[tool]
        return self._engine.continuation(self._rows[slot], name, limit, until_delimiter)
