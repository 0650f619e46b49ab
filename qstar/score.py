"""Teacher-forced scores of existing texts: what q* would have thought of every token."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from common.errors import require
from common.lm.config import DecoderConfig
from common.lm.decoder import forward, head_logits
from common.lm.generate import bucket_length
from common.lm.weights import Model
from qstar.backend import Request
from qstar.jax_backend import load
from qstar.slots import FIELDS, Columns, Decoding, choose, stack_fields
from qstar.system import System

CHUNK = 8  # positions whose logits exist at a time


class Scores(NamedTuple):
    """Per-token values of B responses; arrays [B, T].

    Attributes:
        token_ids: [B] ids of each response in pi_theta's vocabulary.
        mask: bool, real tokens.
        values: `qstar.slots.FIELDS` by name; 0 outside the mask, NaN = not defined.
    """

    token_ids: list[list[int]]
    mask: np.ndarray
    values: dict[str, np.ndarray]


def score_tokens(
    system: System,
    requests: Sequence[Request],
    token_ids: Sequence[Sequence[int]],
    models: dict[Any, Model] | None = None,
) -> Scores:
    """Scores texts under the law a system samples from.

    Args:
        system: the pair, with the JAX backend.
        requests: B prompts.
        token_ids: B responses in pi_theta's ids, none empty.
        models: weights that are loaded, see `jax_backend.load`.

    Raises:
        UserError: a response without tokens, two tokenizers, or too long a text.
    """
    require(system.alignment is None, "score needs models with one tokenizer")
    models = {} if models is None else models
    empty = [row for row, ids in enumerate(token_ids) if not ids]
    require(not empty, f"score: response {empty[:1]} has no tokens")
    steps = -(-max(map(len, token_ids)) // CHUNK) * CHUNK
    prompts = {
        "theta": [list(request.prompt_theta) for request in requests],
        "t": [list(request.prompt_t) for request in requests],
    }
    hidden: list[jax.Array] = []
    heads: list[Any] = []
    configs: list[DecoderConfig] = []
    for role in system.roles:
        model = load(system, role, models)
        params, cfg = model.params, model.cfg
        texts = [p + list(ids) for p, ids in zip(prompts[role], token_ids, strict=True)]
        starts = [len(prompt) - 1 for prompt in prompts[role]]
        hidden.append(_states(params, cfg, texts, starts, steps))
        heads.append(params)
        configs.append(cfg)
    given = np.zeros((len(token_ids), steps), np.int32)
    mask = np.zeros(given.shape, bool)
    for row, ids in enumerate(token_ids):
        given[row, : len(ids)], mask[row, : len(ids)] = ids, True
    values = _score(
        tuple(heads),
        tuple(hidden),
        given,
        system.columns(),
        cfgs=tuple(configs),
        decoding=system.decoding,
    )
    stacked = np.asarray(values)[:, : int(mask.sum(1).max())].astype(np.float64)  # [B, T, F]
    mask = mask[:, : stacked.shape[1]]
    found = {name: np.where(mask, stacked[..., f], 0.0) for f, name in enumerate(FIELDS)}
    return Scores([list(ids) for ids in token_ids], mask, found)


def _states(
    params: Any, cfg: DecoderConfig, texts: list[list[int]], starts: list[int], steps: int
) -> jax.Array:
    """Normed hidden states [B, T, D] at the positions that predict each response token."""
    longest = max(map(len, texts))
    require(
        longest <= cfg.max_positions,
        f"score: a text of {longest} tokens exceeds the model's {cfg.max_positions} positions",
    )
    bucket = bucket_length(longest, cfg.max_positions)
    ids = np.zeros((len(texts), bucket), np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    places = np.minimum(np.asarray(starts)[:, None] + np.arange(steps), bucket - 1)
    return _read(params, ids, places.astype(np.int32), cfg=cfg)


@functools.partial(jax.jit, static_argnames=("cfg",))
def _read(params: Any, ids: jax.Array, places: jax.Array, *, cfg: DecoderConfig) -> jax.Array:
    """Hidden states of texts [B, L] at places [B, T]."""
    hidden = forward(params, cfg, ids).hidden
    return jnp.take_along_axis(hidden, places[:, :, None], axis=1)


@functools.partial(jax.jit, static_argnames=("cfgs", "decoding"))
def _score(
    params: tuple[Any, ...],
    hidden: tuple[jax.Array, ...],
    given: jax.Array,
    columns: Columns,
    *,
    cfgs: tuple[DecoderConfig, ...],
    decoding: Decoding,
) -> jax.Array:
    """Values [B, T, F] of given tokens [B, T], `CHUNK` positions at a time."""
    batch, steps = given.shape

    def chunk(start: jax.Array) -> jax.Array:
        logits = []
        for own, cfg, states in zip(params, cfgs, hidden, strict=True):
            part = lax.dynamic_slice_in_dim(states, start, CHUNK, 1)
            logits.append(head_logits(own, cfg, part).reshape(batch * CHUNK, -1))
        token = lax.dynamic_slice_in_dim(given, start, CHUNK, 1).reshape(-1)
        index = jnp.tile(start + jnp.arange(CHUNK), batch)
        y = logits[1] if len(logits) == 2 else None
        step = choose(logits[0], y, index, decoding, columns, given=token)
        return stack_fields(step).reshape(batch, CHUNK, len(FIELDS))

    parts = lax.map(chunk, jnp.arange(0, steps, CHUNK))  # [T/C, B, C, F]
    return jnp.moveaxis(parts, 0, 1).reshape(batch, steps, len(FIELDS))
