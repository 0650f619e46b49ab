"""Choosing tokens inside another engine: it brings the logits of one model, JAX adds the rest.

The engine calls `choose` with the logits of the rows it is about to sample. Where the law needs
pi_theta as well, a JAX decoder reads the same continuation, in a cache with one slot per sequence;
the token is chosen by `qstar.slots.advance`, with the keys and diagnostics of every other backend.
Engines may drop work: each call says how many tokens the engine has really kept, and a slot that
has run ahead or lost its way is read anew.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.lm.generate import bucket_length, pad_prompts
from qstar.backend import Output, Request
from qstar.networks import Network
from qstar.slots import Columns, Decoding, Slots, advance, empty_slots, fill_slots, read_slots


@functools.partial(jax.jit, static_argnames=("network", "decoding"), donate_argnames=("state",))
def _choose(
    params: Any,
    state: tuple[Slots, Any],
    logits: jax.Array,
    present: jax.Array,
    columns: Columns,
    *,
    network: Network | None,
    decoding: Decoding,
) -> tuple[Slots, Any]:
    """One token in the slots marked in `present` [S], from logits [S, W] of the served model."""
    slots, cache = state
    chosen = slots.active & present
    now = dataclasses.replace(slots, active=chosen)
    if network is None:
        after = advance(now, logits, None, decoding, columns)
    else:
        x, cache = network.decode(params, cache, slots.token_theta, chosen)
        after = advance(now, x, logits, decoding, columns)
    active = jnp.where(chosen, after.active, slots.active)
    return dataclasses.replace(after, active=active), cache


@functools.partial(jax.jit, static_argnames=("network",), donate_argnames=("state",))
def _begin(
    params: Any,
    state: tuple[Slots, Any],
    text: tuple[jax.Array, jax.Array, jax.Array],
    sample: tuple[jax.Array, jax.Array],
    last: tuple[jax.Array, jax.Array],
    count: jax.Array,
    seed: jax.Array,
    *,
    network: Network | None,
) -> tuple[Slots, Any]:
    """Puts a sequence of `count` [1] tokens so far into a slot and reads its text."""
    slots, cache = state
    token_ids, lengths, places = text
    if network is not None:
        cache = network.store(cache, network.read(params, token_ids), lengths, places)
    filled = fill_slots(slots, places, *sample, *last, seed)
    return dataclasses.replace(filled, count=filled.count.at[places].set(count)), cache


@functools.partial(jax.jit, static_argnames=("network",), donate_argnames=("state",))
def _end(
    state: tuple[Slots, Any], ended: jax.Array, *, network: Network | None
) -> tuple[Slots, Any]:
    """Frees the slots marked in `ended` [S]; what a failed row left behind is wiped."""
    slots, cache = state
    if network is not None:
        cache = network.clear(cache, ended)
    return dataclasses.replace(slots, active=slots.active & ~ended), cache


class Guide:
    """S sequences whose other model runs elsewhere.

    Attributes:
        slots: S.
        counts: [S] int, tokens each sequence has.
        active: [S] bool, sequences that want more.
    """

    def __init__(
        self,
        decoding: Decoding,
        columns: Columns,
        slots: int,
        seed: int,
        longest: int,
        network: Network | None = None,
        params: Any = None,
    ) -> None:
        """Empty slots.

        Args:
            decoding: How tokens are chosen; `source` "both" needs the network.
            columns: The common vocabulary.
            slots: S.
            seed: Of the run.
            longest: Most tokens of a sequence that pi_theta reads, prompt included.
            network, params: pi_theta.
        """
        self.slots, self._decoding, self._columns = slots, decoding, columns
        self._network, self._params = network, params
        self._seed, self._longest = jnp.uint32(seed), longest
        cache = None if network is None else network.empty(slots, longest)
        self._state = (empty_slots(slots, decoding.max_new_tokens), cache)
        self._requests: dict[int, Request] = {}
        self.counts = np.zeros(slots, np.int64)
        self.active = np.zeros(slots, bool)
        self._next = np.zeros(slots, np.int64)

    @property
    def state(self) -> Slots:
        """The sequences, on the device."""
        return self._state[0]

    def put(self, slot: int, request: Request) -> None:
        """Begins a sequence in a free slot."""
        self._requests[slot] = request
        self._read(slot, [])

    def _read(self, slot: int, tokens: Sequence[int]) -> None:
        """Puts a slot where it is after `tokens`, in the served model's vocabulary."""
        request = self._requests[slot]
        theta, t = ([*prompt, *tokens] for prompt in (request.prompt_theta, request.prompt_t))
        bucket = bucket_length(max(len(theta) - 1, 1), self._longest)
        if self._network is None:
            theta, bucket = theta[-1:], 1
        ids, _, places = pad_prompts([theta[:-1]], [slot], bucket, 1)
        self._state = _begin(
            self._params,
            self._state,
            (jnp.asarray(ids), jnp.array([len(theta) - 1]), jnp.asarray(places)),
            (jnp.array([request.sample_idx], "uint32"), jnp.array([request.repeat], "uint32")),
            (jnp.array(theta[-1:]), jnp.array(t[-1:])),
            jnp.array([len(tokens)]),
            self._seed,
            network=self._network,
        )
        self.counts[slot], self.active[slot] = len(tokens), True

    def choose(self, logits: jax.Array, kept: Mapping[int, Sequence[int]]) -> np.ndarray:
        """The next token of some slots.

        Args:
            logits: [S, W] of the served model, by slot; rows of other slots mean nothing.
            kept: By slot, the tokens the engine has kept so far.

        Returns:
            [S] int64 tokens in the served model's vocabulary; those of slots that are not in
            `kept`, or where nothing could be drawn, mean nothing.
        """
        present = np.zeros(self.slots, bool)
        for slot, tokens in kept.items():
            present[slot] = True
            if slot in self._requests and len(tokens) != self.counts[slot]:
                self._read(slot, tokens)
        self._state = _choose(
            self._params,
            self._state,
            logits,
            jnp.asarray(present),
            self._columns,
            network=self._network,
            decoding=self._decoding,
        )
        slots = self._state[0]
        served = slots.token_theta if self._decoding.source in ("theta", "same") else slots.token_t
        active, count, token = jax.device_get((slots.active, slots.count, served))
        self.active = np.array(active)
        self.counts = np.array(count, np.int64)
        return np.array(token, np.int64)

    def read(self, slots: Sequence[int]) -> list[Output]:
        """What slots hold, on the host."""
        return read_slots(self._state[0], slots) if len(slots) else []

    def release(self, slots: Sequence[int]) -> None:
        """Frees slots."""
        ended = np.zeros(self.slots, bool)
        ended[np.asarray(slots, np.int64)] = True
        self._state = _end(self._state, jnp.asarray(ended), network=self._network)
        self.active &= ~ended
        self.counts[ended] = 0
        for slot in slots:
            self._requests.pop(slot, None)
