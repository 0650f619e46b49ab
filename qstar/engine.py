"""The JAX backend: both models, alpha, filters, sampling and diagnostics in one compiled step.

A burst is one `lax.while_loop` over tokens with donated state. It ends early once enough slots have
finished; the host then refills them, so no row waits for the longest of its batch. Prompts are read
in length buckets, all but their last token: that one is the first the loop reads, so there is a
single place where logits are made and alpha is solved.
"""

import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from common.lm.generate import pad_prompts, plan_prefill
from qstar.backend import Output, Progress, Request
from qstar.networks import Network
from qstar.slots import Columns, Decoding, Slots, advance, empty_slots, fill_slots, read_slots

BURST = 32  # tokens per device call
KEPT_PLANS = 1  # whose programs wait for the next engine although nobody holds them
PREFILL_ROWS = 4
PREFILL_TOKENS = 2048  # prompt tokens per call, above one row
MIN_CAPACITY_STEP = 64
_CAPACITY_STEPS = 8

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled; static.

    Attributes:
        networks: pi_theta and pi_t; one network where one parameter set serves both, or where one
            model is run alone (`decoding.source`).
        decoding: how tokens are chosen.
    """

    networks: tuple[Network, ...]
    decoding: Decoding

    @property
    def shared(self) -> bool:
        """Whether one parameter set reads two prompts: 2 S rows of one forward pass."""
        return len(self.networks) == 1 and self.decoding.source == "both"

    @property
    def rows_per_slot(self) -> int:
        """Rows of a cache that belong to one slot."""
        return 2 if self.shared else 1


class State(NamedTuple):
    """What lives on the device between calls; donated to every call.

    Attributes:
        slots: the sequences.
        caches: one per network. A shared one has the rows of pi_theta first, then those of pi_t.
    """

    slots: Slots
    caches: tuple[Any, ...]


class Prompts(NamedTuple):
    """R prompts for each of the networks' row groups.

    Attributes:
        token_ids: per group [R, P] int32, padded on the right.
        lengths: per group [R] int32, tokens that are to be cached: all but the last; may be 0.
        last: [R] int32 pairs, the last token of the prompts of pi_theta and of pi_t.
        slots: [R] int32, negative = no slot.
        sample_idx, repeat: [R] uint32.
    """

    token_ids: tuple[Array, ...]
    lengths: tuple[Array, ...]
    last: tuple[Array, Array]
    slots: Array
    sample_idx: Array
    repeat: Array


class Summary(NamedTuple):
    """What the host wants to know after a burst; [S] each, and the number of steps."""

    counts: jax.Array
    active: jax.Array
    steps: jax.Array


# ------------------------------------------------------------------------------ compiled functions
def next_logits(
    plan: Plan, params: Sequence[Any], state: State
) -> tuple[jax.Array, jax.Array | None, tuple[Any, ...]]:
    """Lets every model read its next token: logits of pi_theta and pi_t, and the caches.

    The second is None where one model is run alone.
    """
    slots = state.slots
    if plan.shared:
        tokens = jnp.concatenate([slots.token_theta, slots.token_t])
        active = jnp.concatenate([slots.active, slots.active])
        logits, cache = plan.networks[0].decode(params[0], state.caches[0], tokens, active)
        x, y = jnp.split(logits, 2)
        return x, y, (cache,)
    tokens_of = (slots.token_theta, slots.token_t)
    if len(plan.networks) == 1:
        token = tokens_of[plan.decoding.source == "t"]
        x, cache = plan.networks[0].decode(params[0], state.caches[0], token, slots.active)
        return x, None, (cache,)
    (x, first), (y, second) = (
        network.decode(own, cache, token, slots.active)
        for network, own, cache, token in zip(
            plan.networks, params, state.caches, tokens_of, strict=True
        )
    )
    return x, y, (first, second)


def decode_token(plan: Plan, params: Sequence[Any], columns: Columns, state: State) -> State:
    """One token in every active slot."""
    x, y, caches = next_logits(plan, params, state)
    return State(advance(state.slots, x, y, plan.decoding, columns), caches)


def _burst(
    params: tuple[Any, ...],
    state: State,
    columns: Columns,
    length: jax.Array,
    leave_at: jax.Array,
    *,
    plan: Plan,
) -> tuple[State, Summary]:
    """Up to `length` tokens in every active slot, fewer once `leave_at` slots have finished."""
    started = jnp.sum(state.slots.active)

    def going(carry: tuple[jax.Array, State]) -> jax.Array:
        step, now = carry
        left = jnp.sum(now.slots.active)
        return (step < length) & (left > 0) & (started - left < leave_at)

    def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        step, now = carry
        return step + 1, decode_token(plan, params, columns, now)

    steps, state = lax.while_loop(going, body, (jnp.int32(0), state))
    return state, Summary(state.slots.count, state.slots.active, steps)


def _read(params: tuple[Any, ...], token_ids: tuple[Array, ...], *, plan: Plan) -> tuple[Any, ...]:
    """Reads prompts: what each cache is to keep of them.

    Apart from `_store`, since it is most of what there is to compile and asks for no size of a
    cache: one program serves all of them.
    """
    if plan.shared:
        return (plan.networks[0].read(params[0], jnp.concatenate(token_ids)),)
    return tuple(
        network.read(own, jnp.asarray(ids))
        for network, own, ids in zip(plan.networks, params, token_ids, strict=True)
    )


def _store(
    state: State, kept: tuple[Any, ...], prompts: Prompts, seed: Array, *, plan: Plan
) -> State:
    """Puts prompts that were read into free slots."""
    size = state.slots.count.shape[0]
    slots = jnp.where(prompts.slots < 0, plan.rows_per_slot * size, prompts.slots)
    lengths = tuple(map(jnp.asarray, prompts.lengths))
    if plan.shared:
        # Rows without a slot stay out of range in both halves.
        lengths, slots = (jnp.concatenate(lengths),), jnp.concatenate([slots, slots + size])
    caches = tuple(
        network.store(cache, own, count, slots)
        for network, cache, own, count in zip(
            plan.networks, state.caches, kept, lengths, strict=True
        )
    )
    filled = fill_slots(
        state.slots, prompts.slots, prompts.sample_idx, prompts.repeat, *prompts.last, seed
    )
    return State(filled, caches)


def _abandon(state: State, stopped: jax.Array, cleared: jax.Array, *, plan: Plan) -> State:
    """Ends the slots marked in `stopped` [S] and wipes the caches of those in `cleared` [S]."""
    rows = jnp.tile(cleared, plan.rows_per_slot)
    caches = tuple(
        network.clear(cache, rows)
        for network, cache in zip(plan.networks, state.caches, strict=True)
    )
    slots = dataclasses.replace(state.slots, active=state.slots.active & ~stopped)
    return State(slots, caches)


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """Compiled functions of one plan; they are freed with the last engine or model that holds them.

    States are donated.

    Attributes:
        burst: (params, state, columns, length, leave_at) -> (state, `Summary`).
        read: (params, token_ids) -> what the caches keep.
        store: (state, what was read, prompts, seed) -> state.
        abandon: (state, stopped, cleared) -> state.
    """

    burst: Any
    read: Any
    store: Any
    abandon: Any

    def prefill(self, params: tuple[Any, ...], state: State, prompts: Prompts, seed: Any) -> State:
        """Reads prompts into free slots."""
        return self.store(state, self.read(params, prompts.token_ids), prompts, seed)


_in_use: weakref.WeakValueDictionary[Plan, Programs] = weakref.WeakValueDictionary()


@functools.lru_cache(maxsize=KEPT_PLANS)
def programs(plan: Plan) -> Programs:
    """The programs of a plan: those that are held anywhere, or else new ones.

    One jit with the plan as a static argument would keep the programs of every plan for as long as
    the process lives, 0.1 GiB each for 30 layers.
    """
    found = _in_use.get(plan)
    if found is None:

        def compiled(function: Callable[..., Any], donated: tuple[str, ...] = ("state",)) -> Any:
            return jax.jit(functools.partial(function, plan=plan), donate_argnames=donated)

        found = Programs(
            burst=compiled(_burst),
            read=compiled(_read, ()),
            store=compiled(_store),
            abandon=compiled(_abandon),
        )
        _in_use[plan] = found
    return found


# ---------------------------------------------------------------------------------------- the host
class JaxBackend:
    """Slots on the device, driven from the host; a `qstar.backend.Backend`.

    Attributes:
        slots: S.
        plan: what is compiled.
        programs: of the plan.
        capacity: M, tokens each slot has room for at present.
    """

    def __init__(
        self,
        plan: Plan,
        params: Sequence[Any],
        columns: Columns,
        slots: int,
        seed: int,
        max_prompt_tokens: int,
        deterministic: bool = False,
        burst: int = BURST,
        prefill_rows: int = PREFILL_ROWS,
    ) -> None:
        """Allocates the caches.

        Args:
            plan, params: networks and their parameters, in the same order.
            columns: the common vocabulary.
            slots: S.
            seed: of the run.
            max_prompt_tokens: longest prompt that will come.
            deterministic: no shape may depend on what else is being generated: caches have their
                full capacity from the start, and prompts of a bucket are always read the same
                number at a time.
            burst: tokens per device call.
            prefill_rows: most prompts read in one call.
        """
        self.plan, self.slots, self.programs = plan, slots, programs(plan)
        self._params, self._columns = tuple(params), columns
        self._seed = np.uint32(seed)
        self._burst, self._rows = burst, min(prefill_rows, slots)
        self._deterministic = deterministic
        self.longest = max_prompt_tokens + plan.decoding.max_new_tokens - 1
        self._step = max(MIN_CAPACITY_STEP, -(-self.longest // _CAPACITY_STEPS // 64) * 64)
        self.capacity = self.longest if deterministic else min(self._step, self.longest)
        rows = plan.rows_per_slot * slots
        caches = tuple(network.empty(rows, self.capacity) for network in plan.networks)
        self._state = State(empty_slots(slots, plan.decoding.max_new_tokens), caches)
        self._prompt = np.zeros(slots, np.int64)  # longest of a slot's prompts
        self._count = np.zeros(slots, np.int64)
        self._active = np.zeros(slots, bool)
        self._occupied = np.zeros(slots, bool)
        self._failed = np.zeros(slots, bool)
        self._pending: tuple[Summary, float] | None = None

    def prefill(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """See `Backend`; prompts of one length bucket are read together."""
        at = np.asarray(slots, np.int64)
        groups = [_prompts_of(self.plan, request) for request in requests]
        lengths = [max(max(map(len, group)) - 1, 1) for group in groups]
        self._prompt[at] = [max(map(len, group)) for group in groups]
        self._count[at], self._active[at], self._occupied[at] = 0, True, True
        for call in plan_prefill(lengths, self._rows, self.longest):
            fitting = max(1, min(self._rows, PREFILL_TOKENS // call.bucket))
            for start in range(0, len(call.indices), fitting):
                chosen = call.indices[start : start + fitting]
                rows = fitting if self._deterministic or len(chosen) > 1 else 1
                self._reserve(call.bucket)
                self._read(call.bucket, rows, [(slots[i], requests[i], groups[i]) for i in chosen])

    def _read(
        self, bucket: int, rows: int, chosen: Sequence[tuple[int, Request, tuple[Any, ...]]]
    ) -> None:
        """One prefill call."""
        targets = [slot for slot, _, _ in chosen]
        ids: list[Array] = []
        lengths: list[Array] = []
        for group in range(len(chosen[0][2])):
            texts = [list(prompts[group])[:-1] for _, _, prompts in chosen]
            padded, _, places = pad_prompts(texts, targets, bucket, rows)
            ids.append(padded)
            lengths.append(_padded([len(text) for text in texts], rows, np.int32))
        requests = [request for _, request, _ in chosen]
        last = (
            _padded([r.prompt_theta[-1] for r in requests], rows, np.int32),
            _padded([r.prompt_t[-1] for r in requests], rows, np.int32),
        )
        prompts = Prompts(
            tuple(ids),
            tuple(lengths),
            last,
            places,
            _padded([r.sample_idx for r in requests], rows, np.uint32),
            _padded([r.repeat for r in requests], rows, np.uint32),
        )
        self._state = self.programs.prefill(self._params, self._state, prompts, self._seed)

    def _reserve(self, tokens: int) -> None:
        """Makes room for so many tokens in every slot."""
        if tokens <= self.capacity:
            return
        self.capacity = min(-(-tokens // self._step) * self._step, self.longest)
        caches = tuple(
            network.resize(cache, self.capacity)
            for network, cache in zip(self.plan.networks, self._state.caches, strict=True)
        )
        self._state = State(self._state.slots, caches)

    def step(self, leave_at: int = 0) -> None:
        """See `Backend`; returns once the burst is queued."""
        if self._active.any():
            ahead = (self._prompt + self._count)[self._active].max() + self._burst
            self._reserve(int(min(ahead, self.longest)))
        begin = time.perf_counter()
        self._state, summary = self.programs.burst(
            self._params,
            self._state,
            self._columns,
            np.int32(self._burst),
            np.int32(leave_at or self.slots + 1),
        )
        self._pending = summary, begin

    def wait(self) -> Progress:
        """See `Backend`."""
        if self._pending is None:
            raise RuntimeError("wait() without step()")
        summary, begin = self._pending
        self._pending = None
        count, active, _ = jax.device_get(summary)
        seconds = time.perf_counter() - begin
        count = np.where(self._occupied, count, 0).astype(np.int64)
        tokens = int((count - self._count).sum())
        self._count = count
        self._active = np.asarray(active) & self._occupied
        return Progress(count, self._occupied & ~self._active, tokens, seconds)

    def read(self, slots: Sequence[int]) -> list[Output]:
        """See `Backend`."""
        if not slots:
            return []
        outputs = read_slots(self._state.slots, slots)
        for slot, output in zip(slots, outputs, strict=True):
            self._failed[slot] = output.failed
        return outputs

    def release(self, slots: Sequence[int]) -> None:
        """See `Backend`."""
        at = np.asarray(slots, np.int64)
        mask = np.zeros(self.slots, bool)
        mask[at] = True
        # What a failed row left in its caches may be NaN, which masking does not remove.
        cleared = mask & self._failed
        if (mask & self._active).any() or cleared.any():
            self._state = self.programs.abandon(self._state, mask, cleared)
        self._active &= ~mask
        self._occupied &= ~mask
        self._failed &= ~mask
        self._count[mask] = 0
        self._prompt[mask] = 0

    def describe(self) -> dict[str, Any]:
        """See `Backend`."""
        weights = sum(x.nbytes for x in jax.tree.leaves(self._params))
        per_token = self.plan.rows_per_slot * sum(n.token_bytes for n in self.plan.networks)
        return {
            "backend": "jax",
            "device": str(jax.devices()[0]),
            "slots": self.slots,
            "capacity": self.capacity,
            "longest": self.longest,
            "weight_bytes": weights,
            "cache_bytes": per_token * self.slots * self.longest,
        }


def _prompts_of(plan: Plan, request: Request) -> tuple[Sequence[int], ...]:
    """The prompts that are read: one per row group."""
    both = (request.prompt_theta, request.prompt_t)
    if plan.decoding.source == "both":
        return both
    return (both[plan.decoding.source == "t"],)


def _padded(values: Sequence[int], rows: int, dtype: Any) -> np.ndarray:
    """Values [n] as [rows], zeros behind."""
    result = np.zeros(rows, dtype)
    result[: len(values)] = values
    return result
