"""Whole generations: prompts in length buckets, then one compiled loop over tokens.

`generate` is the plain driver: one slot per prompt, every row until its end. The parts it is made
of (`plan_prefill`, `pad_prompts`, the passes of `common.lm.decoder`, `sampling.sample`) are what an
engine with its own schedule uses.

Prompts are padded to powers of two and read a fixed number of rows at a time, so the number of
compiled programs is bounded whatever prompts come. Row b's n-th token draws from
`fold_in(row_keys[b], n)`: it depends neither on its neighbours nor on the batch size.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import require
from common.lm.cache import Cache, empty_cache
from common.lm.config import DecoderConfig
from common.lm.decoder import Steering, decode_step, prefill
from common.lm.layers import Params
from common.lm.sampling import Sampling, fold_rows, sample

MIN_BUCKET = 32
_CAPACITY_STEP = 64  # cache sizes are multiples of it: few programs for many lengths


class Generation(NamedTuple):
    """What was generated for B prompts.

    Attributes:
        tokens: [B, N] int32; 0 behind a row's end.
        lengths: [B] int32, tokens of each row, its stop token included.
        log_probs: [B, N] float32, log-probability of each token at temperature 1 under the whole
            vocabulary; 0 behind a row's end.
        stopped: [B] bool, ended by a stop token rather than by the limit.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    stopped: np.ndarray

    def rows(self) -> list[list[int]]:
        """Token ids of each row, without padding."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


class Prefill(NamedTuple):
    """Prompts that are read in one call.

    Attributes:
        bucket: Their padded length.
        indices: Which prompts, at most as many as the call has rows.
    """

    bucket: int
    indices: list[int]


class _State(NamedTuple):
    """Carry of the token loop."""

    cache: Cache
    tokens: jax.Array  # [B, N]
    log_probs: jax.Array  # [B, N]
    lengths: jax.Array  # [B] tokens generated
    token: jax.Array  # [B] the last one, not yet in the cache
    stopped: jax.Array  # [B] bool
    active: jax.Array  # [B] bool


def bucket_length(length: int, maximum: int, minimum: int = MIN_BUCKET) -> int:
    """Smallest power of two >= length and >= minimum, at most `maximum`.

    Raises:
        UserError: The length exceeds the maximum, or is 0.
    """
    require(length > 0, "empty prompt: there is no token to continue")
    require(length <= maximum, f"a prompt of {length} tokens exceeds the limit of {maximum}")
    return min(max(minimum, 1 << (length - 1).bit_length()), maximum)


def plan_prefill(
    lengths: Sequence[int], rows: int, maximum: int, minimum: int = MIN_BUCKET
) -> list[Prefill]:
    """Groups prompts of one bucket into calls of at most `rows` rows.

    Args:
        lengths: Tokens of each prompt.
        rows: Rows of one call.
        maximum: Longest bucket, normally the cache's capacity.
        minimum: Shortest bucket.

    Returns:
        Calls, shortest bucket first, prompts in their order.

    Raises:
        UserError: A prompt is empty or too long.
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(bucket_length(length, maximum, minimum), []).append(index)
    return [
        Prefill(bucket, indices[start : start + rows])
        for bucket, indices in sorted(groups.items())
        for start in range(0, len(indices), rows)
    ]


def pad_prompts(
    prompts: Sequence[Sequence[int]], slots: Sequence[int], bucket: int, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arguments of `prefill` for up to `rows` prompts.

    Args:
        prompts: Token ids.
        slots: Slot of each prompt.
        bucket: P.
        rows: R; missing rows are filled with prompts of one token that no slot takes.

    Returns:
        token_ids [R, P] int32, lengths [R] int32, slots [R] int32.
    """
    token_ids = np.zeros((rows, bucket), np.int32)
    lengths = np.ones((rows,), np.int32)
    targets = np.full((rows,), -1, np.int32)
    for row, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        token_ids[row, : len(prompt)] = prompt
        lengths[row], targets[row] = len(prompt), slot
    return token_ids, lengths, targets


def generate(
    params: Params,
    cfg: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    row_ids: Sequence[int] | None = None,
    steering: Steering | None = None,
    prefill_rows: int = 8,
) -> Generation:
    """Continues every prompt until a stop token or the limit.

    Args:
        params: Parameter tree.
        cfg: The decoder.
        prompts: B lists of token ids, none empty.
        max_new_tokens: N.
        stop_ids: Tokens that end a row.
        sampling: Settings over the B rows; None = greedy.
        key: Typed key, needed unless greedy.
        row_ids: What makes each row's randomness its own; None = 0..B-1.
        steering: Additions while the prompts are read, rows as in `prompts`.
        prefill_rows: Prompts read per call.

    Returns:
        The generation, on the host.

    Raises:
        UserError: No or unusable prompts, sequences beyond the model's positions, sampling without
            a key.
    """
    sampling = sampling or Sampling()
    batch = len(prompts)
    require(batch > 0, "nothing to generate: there are no prompts")
    require(max_new_tokens > 0, f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
    require(
        key is not None or sampling.temperature is None, "sampled generation needs a random key"
    )
    check_prompts(prompts, cfg)
    needed = max(len(prompt) for prompt in prompts) + max_new_tokens
    capacity = min(-(-needed // _CAPACITY_STEP) * _CAPACITY_STEP, max(cfg.max_positions, needed))
    cache = empty_cache(cfg, batch, capacity)
    ids = jnp.asarray(range(batch) if row_ids is None else row_ids, jnp.uint32)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(0) if key is None else key, ids
    )
    rows = min(prefill_rows, batch)
    first = jnp.zeros((batch, cfg.vocab_size), jnp.float32)
    for call in plan_prefill([len(p) for p in prompts], rows, capacity):
        chosen = [prompts[i] for i in call.indices]
        token_ids, lengths, slots = pad_prompts(chosen, call.indices, call.bucket, rows)
        part = None if steering is None else jax.tree.map(lambda x, s=slots: x[s], steering)
        first, cache = _prefill(params, cache, first, token_ids, lengths, slots, part, cfg=cfg)
    stops = jnp.asarray(list(stop_ids) or [-1], jnp.int32)
    limits = jnp.full((batch,), max_new_tokens, jnp.int32)
    result = decode(
        params, cache, first, row_keys, sampling, stops, limits, cfg=cfg, num_tokens=max_new_tokens
    )
    return Generation(*(np.asarray(x) for x in result[:4]))


def check_prompts(prompts: Sequence[Sequence[int]], cfg: DecoderConfig) -> None:
    """Raises UserError for an empty prompt or a token id the model does not have."""
    for index, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompt {index} is empty: there is no token to continue")
        bad = [i for i in prompt if not 0 <= i < cfg.vocab_size]
        require(
            not bad,
            f"prompt {index} has token id {bad[:1]}, the vocabulary 0..{cfg.vocab_size - 1}: "
            "does the tokenizer belong to this model?",
        )


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("cache", "logits"))
def _prefill(
    params: Params,
    cache: Cache,
    logits: jax.Array,
    token_ids: jax.Array,
    lengths: jax.Array,
    slots: jax.Array,
    steering: Steering | None,
    *,
    cfg: DecoderConfig,
) -> tuple[jax.Array, Cache]:
    """Reads prompts and puts the logits of their first tokens where their slots are."""
    read = prefill(params, cfg, cache, token_ids, lengths, slots, steering=steering)
    slots = jnp.where(slots < 0, cache.slots, slots)
    return logits.at[slots].set(read.logits, mode="drop"), read.cache


@functools.partial(jax.jit, static_argnames=("cfg", "num_tokens"), donate_argnames=("cache",))
def decode(
    params: Params,
    cache: Cache,
    first_logits: jax.Array,
    row_keys: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    limits: jax.Array,
    *,
    cfg: DecoderConfig,
    num_tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Cache]:
    """Generates until every row has stopped or reached its limit, as one compiled loop.

    Args:
        params: Parameter tree.
        cache: B slots holding the prompts; donated.
        first_logits: [B, V] of the prompts' next tokens.
        row_keys: [B] typed keys; the n-th token uses fold_in(row_keys[b], n).
        sampling: Settings.
        stop_ids: [K] int32, -1 = none.
        limits: [B] int32, most tokens of each row, at most N; 0 = the row is idle.
        cfg: The decoder.
        num_tokens: N.

    Returns:
        tokens [B, N] int32, lengths [B] int32, log_probs [B, N] float32, stopped [B] bool, and the
        cache, which holds every token but each row's last.
    """
    batch = first_logits.shape[0]
    rows = jnp.arange(batch)

    def choose(state: _State, logits: jax.Array) -> _State:
        token, log_prob = sample(logits, fold_rows(row_keys, state.lengths), sampling)
        at = jnp.where(state.active, state.lengths, num_tokens)  # out of range: not written
        lengths = state.lengths + state.active
        stopped = state.active & jnp.any(token[:, None] == stop_ids, axis=1)
        return state._replace(
            tokens=state.tokens.at[rows, at].set(token, mode="drop"),
            log_probs=state.log_probs.at[rows, at].set(log_prob, mode="drop"),
            lengths=lengths,
            token=token,
            stopped=state.stopped | stopped,
            active=state.active & ~stopped & (lengths < limits),
        )

    def body(state: _State) -> _State:
        logits, cache = decode_step(params, cfg, state.cache, state.token, state.active)
        return choose(state._replace(cache=cache), logits)

    start = _State(
        cache=cache,
        tokens=jnp.zeros((batch, num_tokens), jnp.int32),
        log_probs=jnp.zeros((batch, num_tokens), jnp.float32),
        lengths=jnp.zeros((batch,), jnp.int32),
        token=jnp.zeros((batch,), jnp.int32),
        stopped=jnp.zeros((batch,), bool),
        active=limits > 0,
    )
    end: Any = jax.lax.while_loop(
        lambda state: jnp.any(state.active), body, choose(start, first_logits)
    )
    return end.tokens, end.lengths, end.log_probs, end.stopped, end.cache
