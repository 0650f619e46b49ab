"""The sequences being generated, one per slot, and the step that gives each its next token.

Everything here is independent of how the logits came about. Row b's token number n is drawn with
fold_in(fold_in(fold_in(key(seed), sample_idx), repeat), n): it does not depend on the slot, on the
other slots or on when the row was started.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qstar.backend import Output
from qstar.law import LawSettings
from qstar.sampling import sample_key, token_keys
from qstar.single import single_step
from qstar.step import MixedToken, mix_step
from qstar.tilt import AlphaSettings
from qstar.vocabulary import merge_columns, take_columns

FIELDS = (
    "alpha",
    "kl_theta",
    "kl_t",
    "log_ess_theta",
    "log_ess_t",
    "entropy_q",
    "log_z",
    "overlap_theta",
    "overlap_t",
    "flags",
    "log_q",
    "log_theta",
    "log_t",
)
"""What is kept of every token; `log_*` without "ess" and "z" are of the token itself."""

Array = jax.Array | np.ndarray

SOURCES = ("both", "theta", "t", "same")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; static.

    Attributes:
        alpha, law: exponent, rules and filters.
        size: columns of the common vocabulary.
        max_new_tokens: N.
        temperature: 0 = greedy.
        source: "both" models; only "theta" or "t" (alpha fixed at 1 or 0, the other model is not
            run); "same" = both are one model that reads one prompt.
        force_first: the first token is pi_t's.
        merge: columns of end tokens whose probability is added up on the first of them; () = off.
        draw: see `sampling.DRAWS`.
    """

    alpha: AlphaSettings
    law: LawSettings
    size: int
    max_new_tokens: int
    temperature: float = 1.0
    source: str = "both"
    force_first: bool = False
    merge: tuple[int, ...] = ()
    draw: str = "cumulative"


@flax.struct.dataclass
class Columns:
    """The common vocabulary; arrays [U], U = `Decoding.size`.

    Attributes:
        theta, t: int32, each model's own id of a column, -1 = it has none; None = the column.
        special: bool, special tokens; None where no rule asks for them.
        allowed: bool, columns that may be drawn; None = all.
        stops: bool, tokens that end a text.
    """

    theta: jax.Array | None
    t: jax.Array | None
    special: jax.Array | None
    allowed: jax.Array | None
    stops: jax.Array


@flax.struct.dataclass
class Slots:
    """State of S slots.

    Attributes:
        keys: [S] typed keys of the samples.
        token_theta, token_t: [S] int32, the token each model reads next, in its own vocabulary:
            the prompt's last one at first.
        count: [S] int32, tokens generated.
        active: [S] bool, slots that want more.
        stopped, failed: [S] bool, see `backend.Output`.
        columns: [S, N] int32 tokens generated.
        values: [S, N, F] float32, `FIELDS` of each.
    """

    keys: jax.Array
    token_theta: jax.Array
    token_t: jax.Array
    count: jax.Array
    active: jax.Array
    stopped: jax.Array
    failed: jax.Array
    columns: jax.Array
    values: jax.Array


def empty_slots(slots: int, max_new_tokens: int) -> Slots:
    """S free slots; no two arrays share a buffer, so that the state can be donated."""

    def none(dtype: Any) -> jax.Array:
        return jnp.zeros((slots,), dtype)

    return Slots(
        keys=jax.vmap(jax.random.key)(none(jnp.uint32)),
        token_theta=none(jnp.int32),
        token_t=none(jnp.int32),
        count=none(jnp.int32),
        active=none(bool),
        stopped=none(bool),
        failed=none(bool),
        columns=jnp.zeros((slots, max_new_tokens), jnp.int32),
        values=jnp.zeros((slots, max_new_tokens, len(FIELDS)), jnp.float32),
    )


def fill_slots(
    state: Slots,
    slots: Any,
    sample_idx: Any,
    repeat: Any,
    last_theta: Array,
    last_t: Array,
    seed: Any,
) -> Slots:
    """Begins new sequences.

    Args:
        state: before.
        slots: [R] int32, distinct; one outside 0..S-1 drops its row.
        sample_idx, repeat: [R] what makes the randomness.
        last_theta, last_t: [R] int32, the last token of each prompt.
        seed: of the run; static or an array.
    """
    keys = jax.vmap(sample_key, (None, 0, 0))(seed, sample_idx, repeat)
    slots = jnp.where(slots < 0, state.count.shape[0], slots)
    rows = slots.shape[0]

    def put(old: jax.Array, new: Array) -> jax.Array:
        return old.at[slots].set(new, mode="drop")

    no = jnp.zeros((rows,), bool)
    return dataclasses.replace(
        state,
        keys=put(state.keys, keys),
        token_theta=put(state.token_theta, last_theta),
        token_t=put(state.token_t, last_t),
        count=put(state.count, jnp.zeros((rows,), jnp.int32)),
        active=put(state.active, ~no),
        stopped=put(state.stopped, no),
        failed=put(state.failed, no),
    )


def advance(
    state: Slots, x: jax.Array, y: jax.Array | None, decoding: Decoding, columns: Columns
) -> Slots:
    """Gives every active slot its next token.

    Args:
        state: before.
        x: [S, W] logits of pi_theta's next token (of pi_t's where `decoding.source` is "t"), in the
            model's own vocabulary; rows of inactive slots mean nothing.
        y: [S, W'] logits of pi_t; None unless `decoding.source` is "both".
        decoding, columns: how to choose.
    """
    step = choose(x, y, state.count, decoding, columns, state.keys)
    drawn = state.active & (step.token >= 0)
    token = jnp.maximum(step.token, 0)
    rows = jnp.arange(token.shape[0], dtype=jnp.int32)
    at = jnp.where(drawn, state.count, decoding.max_new_tokens)  # out of range: not written
    count = state.count + drawn
    ends = drawn & columns.stops[token]
    failed = state.failed | (state.active & ~drawn)

    def own(ids: jax.Array | None, old: jax.Array) -> jax.Array:
        new = token if ids is None else jnp.maximum(ids[token], 0)
        return jnp.where(drawn, new, old)

    values = stack_fields(step)
    return dataclasses.replace(
        state,
        token_theta=own(columns.theta, state.token_theta),
        token_t=own(columns.t, state.token_t),
        count=count,
        active=drawn & ~ends & (count < decoding.max_new_tokens),
        stopped=state.stopped | ends,
        failed=failed,
        columns=state.columns.at[rows, at].set(token, mode="drop"),
        values=state.values.at[rows, at].set(values, mode="drop"),
    )


def choose(
    x: jax.Array,
    y: jax.Array | None,
    index: jax.Array,
    decoding: Decoding,
    columns: Columns,
    keys: jax.Array | None = None,
    given: jax.Array | None = None,
) -> MixedToken:
    """The next token of every row with its diagnostics.

    Args:
        x, y: as in `advance`.
        index: [B] int32, how many tokens a row has.
        decoding, columns: how to choose.
        keys: [B] typed keys of the samples; None where tokens are given.
        given: [B] int32, tokens to be scored instead of drawn ones.
    """
    if keys is not None:
        keys = token_keys(keys, index)
    source = decoding.source
    x = common_logits(x, columns.t if source == "t" else columns.theta, decoding)
    if y is None:
        return single_step(x, keys, decoding, columns, given)
    y = common_logits(y, columns.t, decoding)
    return mix_step(
        x,
        y,
        keys,
        decoding.alpha,
        decoding.law,
        decoding.temperature,
        forced=index == 0 if decoding.force_first else None,
        special=columns.special,
        allowed=columns.allowed,
        method=decoding.draw,
        given=given,
    )


def common_logits(x: jax.Array, ids: jax.Array | None, decoding: Decoding) -> jax.Array:
    """Logits [B, W] of one model over the common columns [B, U], end tokens merged if asked."""
    x = x[:, : decoding.size] if ids is None else take_columns(x, ids)
    if decoding.merge:
        x = merge_columns(x, decoding.merge, decoding.temperature)
    return x


def stack_fields(step: MixedToken) -> jax.Array:
    """`FIELDS` of a step, [B, F] float32."""

    def field(name: str) -> jax.Array:
        found = getattr(step if name in MixedToken._fields else step.diagnostics, name)
        return found.astype(jnp.float32)

    return jnp.stack([field(name) for name in FIELDS], axis=-1)


def read_slots(state: Slots, slots: Sequence[int]) -> list[Output]:
    """What slots hold, on the host."""
    if not slots:
        return []
    # Padded to a power of two, so that few programs are compiled for many numbers of slots.
    at = np.zeros(1 << (len(slots) - 1).bit_length(), np.int32)
    at[: len(slots)] = slots
    count, stopped, failed, columns, values = jax.device_get(_take(state, at))
    return [
        Output(
            np.array(columns[i, :n]),
            bool(stopped[i]),
            bool(failed[i]),
            dict(zip(FIELDS, values[i, :n].T.astype(np.float64), strict=True)),
        )
        for i, n in enumerate(count[: len(slots)])
    ]


@jax.jit
def _take(state: Slots, at: jax.Array) -> tuple[jax.Array, ...]:
    """Rows `at` of what the host reads."""
    parts = (state.count, state.stopped, state.failed, state.columns, state.values)
    return tuple(part[at] for part in parts)
