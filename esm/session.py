"""A model ready for a stage: its engine, its tokenizer, and how a question becomes tokens."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from common.engines.base import Engine
from common.engines.delimiter import Automaton, build_automaton
from common.engines.factory import check_engine
from common.errors import UserError, require
from common.lm.config import read_stop_ids
from common.lm.source import Source, resolve
from esm.backends import build_engine
from esm.datasets import TaskExample
from esm.prompts import build_messages, prompt_ids, prompt_record
from esm.runs import Run

# What each purpose asks of its backend; the purposes are the keys of the section `backend`.
NEEDS = {"rollouts": ("sample",), "states": ("states",), "online": ("steer",)}


@dataclasses.dataclass(frozen=True)
class Session:
    """An engine and everything around it.

    Attributes:
        engine: runs the model.
        tokenizer: a fast tokenizer of transformers.
        token_bytes: what each id adds to a text.
        stop_ids: ids that end an answer.
        record: what manifests keep of the model and the prompt.
        template: of the prompt.
        delimiter: ends a segment.
    """

    engine: Engine
    tokenizer: Any
    token_bytes: list[bytes]
    stop_ids: tuple[int, ...]
    record: dict[str, Any]
    template: str
    delimiter: str

    def prompt(self, example: TaskExample) -> list[int]:
        """Token ids of a question under the chat template."""
        return prompt_ids(build_messages(example, self.template), self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, without its end token."""
        known = len(self.token_bytes)
        parts = [self.token_bytes[i] for i in token_ids if i < known]
        return b"".join(parts).decode("utf-8", errors="replace")

    @functools.cached_property
    def automaton(self) -> Automaton:
        """Finds the ends of segments in token ids."""
        # A model may have more ids than its tokenizer; those add nothing.
        highest = max(len(self.token_bytes), int(getattr(self.engine, "vocab_size", 0)))
        return build_automaton(self.token_bytes, self.delimiter, highest)


class Sessions:
    """The models of a command: found at once, loaded when first needed, one per backend."""

    def __init__(self, config: ConfigDict, purposes: Sequence[str]) -> None:
        """Checks backends and finds the model; loads nothing.

        Args:
            config: finalized.
            purposes: keys of NEEDS that the command may ask for.

        Raises:
            UserError: a backend cannot do what is asked of it, or the model is not there.
        """
        for purpose in purposes:
            check_engine(backend_of(config, purpose), NEEDS[purpose])
        self._config = config
        self._open: dict[str, Session] = {}

    @functools.cached_property
    def source(self) -> Source:
        """Where the model lies."""
        config = self._config
        name = str(config.model.name_or_path)
        if name == "tiny":
            from esm.tiny import tiny_model

            name = str(tiny_model())
        return resolve(name, revision=config.model.revision, key="model.name_or_path")

    @property
    def model_name(self) -> str:
        """The model's identity, wherever it lies."""
        return self.source.digest[:16]

    @property
    def prompt_record(self) -> dict[str, str]:
        """Template and hash of its wording."""
        return dict(prompt_record(self._config.prompt.template))

    def get(self, purpose: str) -> Session:
        """The session of a purpose.

        Raises:
            UserError: the model cannot be loaded.
        """
        backend = backend_of(self._config, purpose)
        if backend not in self._open:
            self._open[backend] = self._load(backend)
        return self._open[backend]

    def _load(self, backend: str) -> Session:
        from common.lm.tokenizers import load_tokenizer, token_bytes

        config, source = self._config, self.source
        tokenizer = load_tokenizer(source.path)
        pieces = token_bytes(tokenizer)
        engine = build_engine(backend, source.path, pieces, config)
        stop_ids = read_stop_ids(source.path)
        if not stop_ids:
            require(
                tokenizer.eos_token_id is not None,
                f"{source.name}: neither the model nor its tokenizer names an end token",
            )
            stop_ids = (int(tokenizer.eos_token_id),)
        record = {
            "model": source.record(),
            "prompt": self.prompt_record,
            "chat_template": _digest(getattr(tokenizer, "chat_template", None)),
        }
        template = str(config.prompt.template)
        delimiter = str(config.control_points.segment_delimiter)
        return Session(engine, tokenizer, pieces, stop_ids, record, template, delimiter)


def backend_of(config: ConfigDict, purpose: str) -> str:
    """The backend that serves a purpose."""
    named = {
        "rollouts": config.backend.rollouts,
        "states": config.backend.states,
        "online": config.backend.online,
    }
    return str(named[purpose])


def check_memory(
    manifest: Mapping[str, Any], sessions: Sessions, config: ConfigDict, source: Run
) -> list[str]:
    """Refuses a memory that was not made with this model and delimiter.

    Returns:
        Warnings: what differs without making the memory unusable.

    Raises:
        UserError: names what differs.
    """
    made = manifest["model"]
    if made["digest"] != sessions.source.digest:
        raise UserError(
            f"{source.memory} was made with the model {made['name']} (digest "
            f"{made['digest'][:12]}), not with {config.model.name_or_path} "
            f"({sessions.source.digest[:12]}); mine this model, or name a run of it with "
            "eval.artifact_run_dir"
        )
    delimiter = config.control_points.segment_delimiter
    require(
        manifest["delimiter"] == delimiter,
        f"{source.memory} was made with the delimiter {manifest['delimiter']!r}, "
        f"control_points.segment_delimiter is {delimiter!r}",
    )
    if manifest["prompt"]["hash"] != sessions.prompt_record["hash"]:
        return [
            f"the memory was mined with the prompt {manifest['prompt']['template']}, "
            f"the questions are asked with {config.prompt.template}"
        ]
    return []


def check_width(manifest: Mapping[str, Any], session: Session, source: Run) -> None:
    """Refuses a memory whose states do not fit the loaded model.

    Raises:
        UserError: hidden size or layers differ.
    """
    engine = session.engine
    layers = manifest.get("layers", [])
    require(
        manifest["hidden_size"] == engine.hidden_size
        and all(layer < engine.num_layers for layer in layers),
        f"{source.memory} holds states of width {manifest['hidden_size']} and layers {layers}; "
        f"the model has width {engine.hidden_size} and {engine.num_layers} layers",
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
