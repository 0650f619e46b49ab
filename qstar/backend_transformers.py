"""The transformers backend: any causal attention model transformers has, forwards in PyTorch.

Logits go to JAX by DLPack (on a GPU without a copy), where the same functions as in the JAX backend
choose alpha, draw with the same keys and diagnose; token ids come back. Outputs agree with the JAX
backend up to the floating-point differences of the two decoders' logits.
"""

import functools
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.backend import Output, Progress, Request
from qstar.slots import Columns, Decoding, Slots, advance, empty_slots, fill_slots, read_slots
from qstar.torch_rows import TorchRows, load_torch_model

if TYPE_CHECKING:
    from qstar.system import System

BURST = 32  # tokens between two looks of the scheduler
DEFAULT_SLOTS = 8


def share_gpu() -> None:
    """Keeps JAX from reserving the GPU's memory, which PyTorch needs.

    Works until JAX first looks for devices: `qstar.system.check_backend` calls it before that.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def open_transformers(
    system: "System", slots: int | None, prompt_tokens: int
) -> "TransformersBackend":
    """Loads the models, once where both are the same.

    Args:
        system: The pair.
        slots: S; None = 8.
        prompt_tokens: Longest prompt that will come; caches grow as they are filled.

    Raises:
        UserError: A model cannot be loaded.
    """
    del prompt_tokens
    sources = [system.sources[role] for role in system.roles]
    if system.shared:
        sources = sources[:1]
    models = [load_torch_model(source.path, system.dtype()) for source in sources]
    run = system.config.run
    return TransformersBackend(
        models,
        system.decoding,
        system.columns(),
        slots or DEFAULT_SLOTS,
        system.config.seed,
        run.burst,
    )


@functools.partial(jax.jit, static_argnames=("decoding",), donate_argnames=("state",))
def _advance(
    state: Slots, x: jax.Array, y: jax.Array | None, columns: Columns, *, decoding: Decoding
) -> Slots:
    """One token in every active slot, from logits that came from outside."""
    return advance(state, x, y, decoding, columns)


@functools.partial(jax.jit, donate_argnames=("state",))
def _fill(
    state: Slots,
    slots: jax.Array,
    sample_idx: jax.Array,
    repeat: jax.Array,
    last_theta: jax.Array,
    last_t: jax.Array,
    seed: jax.Array,
) -> Slots:
    return fill_slots(state, slots, sample_idx, repeat, last_theta, last_t, seed)


@functools.partial(jax.jit, donate_argnames=("state",))
def _stop(state: Slots, stopped: jax.Array) -> Slots:
    """Ends the slots marked in `stopped` [S]."""
    return state.replace(active=state.active & ~stopped)  # type: ignore[attr-defined]


class TransformersBackend:
    """Slots whose models run in PyTorch; a `qstar.backend.Backend`.

    Attributes:
        slots: S.
    """

    def __init__(
        self,
        models: Sequence[Any],
        decoding: Decoding,
        columns: Columns,
        slots: int,
        seed: int,
        burst: int = BURST,
    ) -> None:
        """Empty slots.

        Args:
            models: pi_theta and pi_t as loaded by `load_torch_model`; one where one parameter set
                serves both prompts, or where one model is run alone (`decoding.source`).
            decoding: How tokens are chosen.
            columns: The common vocabulary.
            slots: S.
            seed: Of the run.
            burst: Most tokens per `step`.
        """
        self.slots, self._decoding, self._columns = slots, decoding, columns
        self._seed, self._burst = jnp.uint32(seed), burst
        self._shared = decoding.source == "both" and len(models) == 1
        rows = 2 * slots if self._shared else slots
        self._models = [TorchRows(model, rows) for model in models]
        self._state = empty_slots(slots, decoding.max_new_tokens)
        self._count = np.zeros(slots, np.int64)
        self._active = np.zeros(slots, bool)
        self._occupied = np.zeros(slots, bool)
        self._tokens = np.zeros((2, slots), np.int64)  # what each model reads next
        self._progress: Progress | None = None

    def prefill(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """See `Backend`; all but the last token of each prompt are read here."""
        at = np.asarray(slots, np.int64)
        theta = [list(r.prompt_theta) for r in requests]
        t = [list(r.prompt_t) for r in requests]
        groups = {"both": (theta, t), "theta": (theta,), "t": (t,), "same": (theta,)}
        chosen = [[prompt[:-1] for prompt in g] for g in groups[self._decoding.source]]
        if self._shared:
            self._models[0].put([*slots, *(at + self.slots)], [*chosen[0], *chosen[1]])
        else:
            for model, prompts in zip(self._models, chosen, strict=True):
                model.put(slots, prompts)
        self._tokens[:, at] = [[p[-1] for p in theta], [p[-1] for p in t]]
        # One shape whatever the number of requests: rows without a slot are out of range.
        targets = np.full(self.slots, self.slots, np.int32)
        targets[: len(at)] = at
        self._state = _fill(
            self._state,
            targets,
            _padded([r.sample_idx for r in requests], self.slots, np.uint32),
            _padded([r.repeat for r in requests], self.slots, np.uint32),
            _padded([p[-1] for p in theta], self.slots, np.int32),
            _padded([p[-1] for p in t], self.slots, np.int32),
            self._seed,
        )
        self._count[at], self._active[at], self._occupied[at] = 0, True, True

    def step(self, leave_at: int = 0) -> None:
        """See `Backend`; the work is done when it returns."""
        begin = time.perf_counter()
        before, started = self._count.sum(), int(self._active.sum())
        for _ in range(self._burst):
            if not self._active.any():
                break
            if leave_at and started - int(self._active.sum()) >= leave_at:
                break
            self._token()
        self._progress = Progress(
            np.where(self._occupied, self._count, 0),
            self._occupied & ~self._active,
            int(self._count.sum() - before),
            time.perf_counter() - begin,
        )

    def _token(self) -> None:
        """One token in every active slot."""
        x, y = self._logits()
        self._state = _advance(self._state, x, y, self._columns, decoding=self._decoding)
        state = self._state
        active, count, theta, t = jax.device_get(
            (state.active, state.count, state.token_theta, state.token_t)
        )
        self._active = np.asarray(active) & self._occupied
        self._count = np.where(self._occupied, count, 0).astype(np.int64)
        self._tokens = np.stack([theta, t]).astype(np.int64)

    def _logits(self) -> tuple[jax.Array, jax.Array | None]:
        """Both models' next logits [S, W] as JAX arrays; one where one model is run alone."""
        if self._shared:
            active = np.concatenate([self._active, self._active])
            both = _to_jax(self._models[0].read(self._tokens.reshape(-1), active))
            return both[: self.slots], both[self.slots :]
        if len(self._models) == 1:
            row = int(self._decoding.source == "t")
            return _to_jax(self._models[0].read(self._tokens[row], self._active)), None
        x, y = (
            _to_jax(model.read(tokens, self._active))
            for model, tokens in zip(self._models, self._tokens, strict=True)
        )
        return x, y

    def wait(self) -> Progress:
        """See `Backend`."""
        if self._progress is None:
            raise RuntimeError("wait() without step()")
        progress, self._progress = self._progress, None
        return progress

    def read(self, slots: Sequence[int]) -> list[Output]:
        """See `Backend`."""
        return read_slots(self._state, slots) if len(slots) else []

    def release(self, slots: Sequence[int]) -> None:
        """See `Backend`."""
        mask = np.zeros(self.slots, bool)
        mask[np.asarray(slots, np.int64)] = True
        if (mask & self._active).any():
            self._state = _stop(self._state, mask)
        self._active &= ~mask
        self._occupied &= ~mask
        self._count[mask] = 0

    def describe(self) -> dict[str, Any]:
        """See `Backend`."""
        return {
            "backend": "transformers",
            "device": str(self._models[0].device),
            "slots": self.slots,
            "weight_bytes": sum(model.weight_bytes for model in self._models),
            "cache_bytes_per_token": sum(model.token_bytes for model in self._models),
        }


def _to_jax(logits: Any) -> jax.Array:
    """A float32 tensor as a JAX array; shares its memory where both frameworks use one device."""
    return jnp.from_dlpack(logits.contiguous())


def _padded(values: Sequence[int], rows: int, dtype: Any) -> np.ndarray:
    """Values [n] as [rows], zeros behind."""
    result = np.zeros(rows, dtype)
    result[: len(values)] = values
    return result
