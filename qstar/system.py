"""The pair of models as a config describes it: sources, tokenizers, vocabulary, end tokens, rules.

`describe_system` settles all of this before any weight is read; `open_backend` then loads the
weights, of one model only where the other is not needed.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common import log
from common.errors import UserError, require
from common.lm.config import DecoderConfig, read_config, read_stop_ids
from common.lm.source import Source, cache_root, resolve
from common.lm.tokenizers import load_tokenizer
from common.rundir import json_text
from qstar.backend import Backend
from qstar.settings import alpha_settings, law_settings, prompt_settings
from qstar.slots import Columns, Decoding
from qstar.texts import Detokenizer
from qstar.tiny import is_tiny, tiny_directory
from qstar.vocabulary import Alignment, align, require_same, same_vocabulary

ROLES = ("theta", "t")


@dataclasses.dataclass(frozen=True)
class System:
    """Everything about a pair of models but the weights.

    Attributes:
        config: the finalized config.
        sources: by role; a role that is not run is absent. Equal where one model serves both.
        shared: both roles are one model.
        tokenizers: by role, for the roles that are run.
        tokenizer_digests: hash of each token -> id map.
        alignment: of unequal vocabularies, else None.
        decoding: how tokens are chosen.
        stop_columns: end tokens.
        special_columns: special tokens.
        notes: lines worth telling the user.
    """

    config: ConfigDict
    sources: Mapping[str, Source]
    shared: bool
    tokenizers: Mapping[str, Any]
    tokenizer_digests: Mapping[str, str]
    alignment: Alignment | None
    decoding: Decoding
    stop_columns: tuple[int, ...]
    special_columns: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles whose model is run: both, or one."""
        return tuple(role for role in ROLES if role in self.sources)

    @property
    def texts(self) -> Detokenizer:
        """Generated columns to text, by pi_theta's tokenizer where it is there."""
        role = self.roles[0]
        ids = self.token_columns(role)
        return Detokenizer(self.tokenizers[role], ids, tuple(self.config.sampling.stop_strings))

    def token_columns(self, role: str) -> np.ndarray | None:
        """A model's own id per column, -1 = none; None = the column is the id.

        Merged end tokens count as each model's own first end token.
        """
        if self.alignment is None:
            return None
        ids = self.alignment.columns_theta if role == "theta" else self.alignment.columns_t
        if self.decoding.merge and ids[self.decoding.merge[0]] < 0:
            own = [ids[column] for column in self.decoding.merge if ids[column] >= 0]
            if own:
                ids = ids.copy()
                ids[self.decoding.merge[0]] = own[0]
        return ids

    def columns(self) -> Columns:
        """The common vocabulary on the device."""
        size = self.decoding.size

        def mask(members: tuple[int, ...]) -> Any:
            return jnp.asarray(np.isin(np.arange(size), members))

        ids: dict[str, Any] = {role: None for role in ROLES}
        allowed = None
        if self.alignment is not None:
            # Logits are laid out by the real columns; only what is fed back knows merged tokens.
            ids = {"theta": self.alignment.columns_theta, "t": self.alignment.columns_t}
            allowed = self.alignment.allowed.copy()
            allowed[list(self.decoding.merge[:1])] = True
            ids = {role: jnp.asarray(value) for role, value in ids.items()}
        needs_special = self.decoding.law.special_tokens == "target_mass"
        return Columns(
            ids["theta"],
            ids["t"],
            mask(self.special_columns) if needs_special else None,
            None if allowed is None else jnp.asarray(allowed),
            mask(self.stop_columns),
        )

    def dtype(self) -> str:
        """The weights' dtype; settles "auto"."""
        import jax

        config = self.config
        asked = config.model.dtype
        if asked != "auto":
            return str(asked)
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def describe_system(config: ConfigDict, one_prompt: bool) -> System:
    """Finds models and tokenizers and settles vocabulary, end tokens and rules.

    Args:
        config: finalized.
        one_prompt: both models read the same messages in the same rendering.

    Raises:
        UserError: if a model or tokenizer is missing or unsupported, or the two do not fit.
    """
    same_model = _names(config, "theta") == _names(config, "t")
    source_of_token = _who_runs(config, same_model and one_prompt)
    roles = ("theta", "t") if source_of_token == "both" else (_only_role(source_of_token),)
    sources: dict[str, Source] = {}
    tokenizers: dict[str, Any] = {}
    for role in roles:
        if role == "t" and same_model and "theta" in sources:
            sources[role], tokenizers[role] = sources["theta"], tokenizers["theta"]
            continue
        sources[role] = find_model(config, role)
        tokenizers[role] = load_tokenizer(_names(config, role)[2] or sources[role].path)
    if config.backend == "jax":
        for role in roles:
            read_config(sources[role].path)  # refuses what the JAX decoder cannot compute
    vocabularies = {role: tokenizers[role].get_vocab() for role in roles}
    alignment = _alignment(config, vocabularies)
    size = _size(vocabularies, alignment)
    notes = [f"pi_{role}: {sources[role].name}" for role in roles]
    stops, merge, stop_notes = _end_tokens(config, roles, sources, tokenizers, alignment)
    decoding = Decoding(
        alpha=alpha_settings(config),
        law=law_settings(config),
        size=size,
        max_new_tokens=config.sampling.max_new_tokens,
        temperature=float(config.sampling.temperature),
        source=source_of_token,
        force_first=config.q.force_first_token and source_of_token == "both",
        merge=merge,
        draw=config.sampling.draw,
    )
    for role in roles:
        _check_width(config, sources[role], role, vocabularies[role], decoding)
    special = {
        column
        for role in roles
        for column in _to_columns(_special_ids(tokenizers[role]), role, alignment)
    }
    return System(
        config=config,
        sources=sources,
        shared=same_model,
        tokenizers=tokenizers,
        tokenizer_digests={
            role: hashlib.sha256(
                json_text(dict(sorted(vocabularies[role].items()))).encode()
            ).hexdigest()
            for role in roles
        },
        alignment=alignment,
        decoding=decoding,
        stop_columns=stops,
        special_columns=tuple(sorted(special)),
        notes=tuple(notes + stop_notes),
    )


def _names(config: ConfigDict, role: str) -> tuple[str, ...]:
    """What identifies a role's model; pi_t defaults to pi_theta's."""
    model = config.model
    if role == "t" and model.t:
        return model.t, model.revision_t, model.tokenizer_t
    if role == "t":
        return model.theta, model.revision_theta, model.tokenizer_t or model.tokenizer_theta
    return model.theta, model.revision_theta, model.tokenizer_theta


def _who_runs(config: ConfigDict, same: bool) -> str:
    """`Decoding.source` of a config.

    Fixed exponents 1 and 0 leave one model, unless a rule asks for the other's probabilities.
    """
    needs_t = (
        config.q.special_tokens == "target_mass"
        or config.q.support == "target"
        or config.q.force_first_token
    )
    if same:
        return "same"
    if config.alpha.method == "fixed" and config.alpha.fixed == 0.0:
        return "t"
    if config.alpha.method == "fixed" and config.alpha.fixed == 1.0 and not needs_t:
        return "theta"
    return "both"


def _only_role(source_of_token: str) -> str:
    return "t" if source_of_token == "t" else "theta"


def find_model(config: ConfigDict, role: str) -> Source:
    """The files of pi_theta or pi_t; raises UserError."""
    name, revision, _ = _names(config, role)
    key = f"model.{role}"
    if is_tiny(name):
        found = resolve(str(tiny_directory(name, cache_root())), key=key)
        return found._replace(name=name, kind="tiny")
    return resolve(name, revision=revision, key=key)


def _alignment(config: ConfigDict, vocabularies: Mapping[str, Any]) -> Alignment | None:
    """None for equal vocabularies; refuses unequal ones unless they are to be aligned."""
    if len(vocabularies) < 2:
        return None
    theta, t = vocabularies["theta"], vocabularies["t"]
    if same_vocabulary(theta, t):
        return None
    if config.model.vocab_align == "none":
        require_same(theta, t)
    return align(theta, t)


def _size(vocabularies: Mapping[str, Any], alignment: Alignment | None) -> int:
    """Columns of the common vocabulary."""
    if alignment is not None:
        return len(alignment.columns_theta)
    return max(next(iter(vocabularies.values())).values()) + 1


def _to_columns(ids: tuple[int, ...], role: str, alignment: Alignment | None) -> tuple[int, ...]:
    """A model's token ids as columns; ids without one are left out."""
    if alignment is None:
        return ids
    own = alignment.columns_theta if role == "theta" else alignment.columns_t
    place = {int(token): column for column, token in enumerate(own) if token >= 0}
    return tuple(place[i] for i in ids if i in place)


def _end_tokens(
    config: ConfigDict,
    roles: tuple[str, ...],
    sources: Mapping[str, Source],
    tokenizers: Mapping[str, Any],
    alignment: Alignment | None,
) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    """Columns that end a text, those to be merged (the one that stands for all first), notes."""
    found: dict[str, tuple[int, ...]] = {}
    for role in roles:
        ids = read_stop_ids(sources[role].path)
        if not ids and tokenizers[role].eos_token_id is not None:
            ids = (int(tokenizers[role].eos_token_id),)
        found[role] = _to_columns(ids, role, alignment)
    extra = _to_columns(tuple(config.sampling.stop_ids), roles[0], alignment)
    size_note: list[str] = []
    union = tuple(dict.fromkeys(c for role in reversed(roles) for c in found[role]))
    differ = len({frozenset(columns) for columns in found.values()}) > 1
    mode = config.q.eos
    if mode == "auto":
        mode = "merge" if differ else "union"
        if differ:
            size_note.append(
                f"end tokens differ ({_shown(found, tokenizers, alignment)}): their probabilities "
                "are added up (q.eos=merge); q.eos=union keeps them apart"
            )
    merge = union if mode == "merge" and len(union) > 1 and len(roles) > 1 else ()
    stops = tuple(sorted({*union, *extra}))
    if not stops and not config.sampling.stop_strings:
        size_note.append("no end token is known: every sample gets sampling.max_new_tokens tokens")
    return stops, merge, size_note


def _shown(
    found: Mapping[str, tuple[int, ...]],
    tokenizers: Mapping[str, Any],
    alignment: Alignment | None,
) -> str:
    """End tokens of every role, by name."""
    parts = []
    for role, columns in found.items():
        ids = list(columns)
        if alignment is not None:
            own = alignment.columns_theta if role == "theta" else alignment.columns_t
            ids = [int(own[c]) for c in columns]
        names = tokenizers[role].convert_ids_to_tokens(ids)
        parts.append(f"pi_{role}: {', '.join(map(str, names)) or 'none'}")
    return "; ".join(parts)


def _special_ids(tokenizer: Any) -> tuple[int, ...]:
    """All special ids, those without a role included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {i for i, token in added.items() if token.special}
    return tuple(sorted(marked | {int(i) for i in tokenizer.all_special_ids}))


def _check_width(
    config: ConfigDict,
    source: Source,
    role: str,
    vocabulary: Mapping[str, int],
    decoding: Decoding,
) -> None:
    """Refuses a tokenizer that is larger than the model, and too long sequences."""
    if config.backend != "jax":
        return
    cfg: DecoderConfig = read_config(source.path)
    size = max(vocabulary.values()) + 1
    require(
        size <= cfg.vocab_size,
        f"model.{role}: the tokenizer has {size} tokens, the model '{source.name}' only "
        f"{cfg.vocab_size}; name the right one with model.tokenizer_{role}",
    )
    require(
        decoding.max_new_tokens < cfg.max_positions,
        f"sampling.max_new_tokens={decoding.max_new_tokens} leaves no room for a prompt: "
        f"'{source.name}' has {cfg.max_positions} positions",
    )


def max_prompt_tokens(system: System) -> int:
    """Longest prompt that is accepted: the config's limit, within the models' positions."""
    limit = int(prompt_settings(system.config)[0].max_tokens)
    if system.config.backend != "jax":
        return limit
    for source in system.sources.values():
        positions = read_config(source.path).max_positions
        limit = min(limit, positions - system.decoding.max_new_tokens + 1)
    return limit


def open_backend(
    system: System,
    slots: int | None,
    prompt_tokens: int,
    models: dict[Any, Any] | None = None,
) -> Backend:
    """Loads the weights and makes the engine.

    Args:
        system: the pair.
        slots: S; None = as many as memory allows.
        prompt_tokens: longest prompt that will come.
        models: keeps loaded weights between calls (backend "jax"); None = loads them.

    Raises:
        UserError: if the weights cannot be loaded, or not even one slot fits.
    """
    name = system.config.backend
    if name == "jax":
        from qstar.jax_backend import open_jax

        return open_jax(system, slots, prompt_tokens, models)
    if name == "transformers":
        from qstar.backend_transformers import open_transformers

        opened: Backend = open_transformers(system, slots, prompt_tokens)
        return opened
    from qstar.backend_vllm import open_vllm

    opened = open_vllm(system, slots, prompt_tokens)
    return opened


def check_backend(config: ConfigDict) -> None:
    """Refuses a backend that cannot run here, before anything is downloaded or loaded.

    Raises:
        UserError: naming what is supported.
    """
    if config.backend == "vllm":
        from qstar.backend_vllm import check_vllm

        check_vllm(config)
    elif config.backend == "transformers":
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"backend=transformers needs torch and transformers ({error}); "
                "install them or use backend=jax"
            ) from None
        from qstar.backend_transformers import share_gpu

        share_gpu()


def tell(system: System) -> None:
    """Prints the notes."""
    for line in system.notes:
        log.info(line)
