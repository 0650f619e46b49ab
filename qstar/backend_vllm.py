"""The vllm backend: pi_t (or a model alone) in vLLM, the q* law in its logits processor.

Good for architectures, quantisations and multi-GPU models the JAX decoder lacks; only pi_t gains,
since pi_theta is read by the JAX decoder inside the processor. Tokens, randomness and diagnostics
are those of the other backends. The engine runs in this process and samples greedily from rows that
the processor has reduced to one token.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from common.engines.vllm_version import prepare_environment
from common.errors import UserError, require
from common.lm.weights import load_model
from qstar.backend import Output, Progress, Request
from qstar.guide import Guide
from qstar.networks import DecoderNetwork
from qstar.slots import Decoding
from qstar.system import System
from qstar.vllm_processor import SLOT, processor_class, require_vllm

DEFAULT_SLOTS = 32
_MAX_SLOTS = 256


def check_vllm(config: ConfigDict) -> None:
    """Refuses what this backend cannot do, before anything is loaded.

    Raises:
        UserError: vLLM is missing or unsupported, or the config asks for two vocabularies.
    """
    require_vllm()
    require(
        config.model.vocab_align == "none",
        "backend=vllm needs one tokenizer for both models: leave model.vocab_align=none, or use "
        "backend=jax|transformers",
    )
    slots = str(config.run.slots)
    require(
        slots == "auto" or int(slots) <= _MAX_SLOTS,
        f"backend=vllm: run.slots={slots} is more than {_MAX_SLOTS}",
    )


def open_vllm(system: System, slots: int | None, prompt_tokens: int) -> "VllmBackend":
    """Starts vLLM with the served model and loads pi_theta where the law needs it.

    Args:
        system: The pair, of one tokenizer.
        slots: S; None = 32.
        prompt_tokens: Longest prompt that will come.

    Raises:
        UserError: A model cannot be loaded, or vLLM does not start.
    """
    decoding = system.decoding
    count = slots or DEFAULT_SLOTS
    longest = prompt_tokens + decoding.max_new_tokens
    network, params = None, None
    if decoding.source == "both":
        model = load_model(system.sources["theta"].path, system.dtype())
        network, params = DecoderNetwork(model.cfg), model.params
    guide = Guide(decoding, system.columns(), count, system.config.seed, longest, network, params)
    engine = start_engine(
        str(system.sources[system.roles[-1]].path), system.dtype(), guide, longest
    )
    stops = [int(i) for i in system.stop_columns]
    return VllmBackend(engine, guide, decoding, stops, system.config.run.burst)


def start_engine(path: str, dtype: str, guide: Guide, longest: int) -> Any:
    """vLLM's engine with the processor of a guide.

    Args:
        path: Model directory.
        dtype: Of weights and activations.
        guide: Chooses tokens; its slots bound the batch.
        longest: Most tokens of a sequence.

    Raises:
        UserError: vLLM does not start; the first line of its reason.
    """
    prepare_environment()
    from vllm import LLM

    try:
        llm = LLM(
            model=path,
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=longest + 1,
            max_num_seqs=guide.slots,
            # Whole prompts in one pass: a processor cannot tell a part from a whole.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(2048, longest + 1, guide.slots),
            enable_prefix_caching=False,
            async_scheduling=False,
            logits_processors=[processor_class(guide)],
            disable_log_stats=True,
        )
    except Exception as error:  # its reasons have many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"backend=vllm: vLLM does not start with '{path}': {reason}") from error
    return llm.llm_engine


class VllmBackend:
    """Slots whose served model runs in vLLM; a `qstar.backend.Backend`.

    Attributes:
        slots: S.
    """

    def __init__(
        self, engine: Any, guide: Guide, decoding: Decoding, stop_ids: list[int], burst: int
    ) -> None:
        """Empty slots over a running engine.

        Args:
            engine: vLLM's `LLMEngine`, with the processor of the guide.
            guide: Chooses tokens.
            decoding: How.
            stop_ids: End tokens.
            burst: Most engine steps per `step`.
        """
        self.slots, self._guide, self._engine = guide.slots, guide, engine
        self._decoding, self._stops, self._burst = decoding, stop_ids, burst
        self._names: dict[int, str] = {}  # request id of an occupied slot
        self._started = 0
        self._progress: Progress | None = None

    def prefill(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """See `Backend`; vLLM reads the served model's prompts in the steps that follow."""
        from vllm import SamplingParams

        for slot, request in zip(slots, requests, strict=True):
            served = "theta" if self._decoding.source in ("theta", "same") else "t"
            prompt = request.prompt_theta if served == "theta" else request.prompt_t
            self._guide.put(slot, request)
            self._started += 1
            name = f"qstar-{self._started}"
            params = SamplingParams(
                temperature=0.0,
                max_tokens=self._decoding.max_new_tokens,
                ignore_eos=True,
                stop_token_ids=self._stops,
                detokenize=False,
                extra_args={SLOT: int(slot)},
            )
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
            self._names[slot] = name

    def step(self, leave_at: int = 0) -> None:
        """See `Backend`; the work is done when it returns."""
        begin = time.perf_counter()
        guide = self._guide
        before, started = guide.counts.sum(), int(guide.active.sum())
        for _ in range(self._burst):
            running = int(guide.active.sum())
            if running == 0 or (leave_at and started - running >= leave_at):
                break
            self._engine.step()
        occupied = np.isin(np.arange(self.slots), list(self._names))
        self._progress = Progress(
            np.where(occupied, guide.counts, 0),
            occupied & ~guide.active,
            int(guide.counts.sum() - before),
            time.perf_counter() - begin,
        )

    def wait(self) -> Progress:
        """See `Backend`."""
        if self._progress is None:
            raise RuntimeError("wait() without step()")
        progress, self._progress = self._progress, None
        return progress

    def read(self, slots: Sequence[int]) -> list[Output]:
        """See `Backend`."""
        return self._guide.read(slots)

    def release(self, slots: Sequence[int]) -> None:
        """See `Backend`."""
        names = [self._names.pop(slot) for slot in slots if slot in self._names]
        # Finished requests are gone already; failed and abandoned ones go now.
        self._engine.abort_request(names)
        self._guide.release(slots)

    def describe(self) -> dict[str, Any]:
        """See `Backend`."""
        return {"backend": "vllm", "vllm": require_vllm(), "slots": self.slots}
