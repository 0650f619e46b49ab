"""The vLLM engine: fast rollouts; states and steering through hooks in its worker.

Stock vLLM, run in this process: whole prompts in one pass, eager execution (so that hooks run), and
a prefix cache that steered and captured requests never meet. Probes and segments resend their
prefix, which makes the JAX engine the better choice for everything steered. At a temperature above
0 the tokens are vLLM's draws: fixed by (seed, row, position) on a GPU; the CPU build takes seeds
for the engine only, so there a row's draws depend on what else is in the batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.engines.base import Decoding, OnRollout, Rollout, StreamSettings, Toolbox
from common.engines.checks import check_layers, check_positions, check_stream
from common.engines.delimiter import Automata
from common.engines.vllm_requests import Request, Runner, request_seed
from common.engines.vllm_stream import VllmStream
from common.engines.vllm_version import CPU_DISTRIBUTION, prepare_environment, require_vllm
from common.engines.vllm_worker import Job
from common.errors import UserError, require

_EXTENSION = "common.engines.vllm_worker.SteeringWorker"


class VllmEngine:
    """An `Engine` over vLLM."""

    name = "vllm"
    capabilities = frozenset(("sample", "states", "steer"))

    def __init__(
        self,
        directory: str | Path,
        token_bytes: Sequence[bytes],
        *,
        dtype: str = "float32",
        tensor_parallel_size: int = 1,
        enforce_eager: bool = True,
        enable_chunked_prefill: bool = False,
        gpu_memory_utilization: float = 0.6,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        seed: int = 0,
    ) -> None:
        """Starts vLLM with a model.

        Args:
            directory: Model in hub layout.
            token_bytes: What each token adds to a text; b"" for special tokens.
            dtype: Of weights and activations.
            tensor_parallel_size: GPUs the model is split over.
            enforce_eager: False = compiled graphs, in which only sampling works.
            enable_chunked_prefill: Prompts in pieces.
            gpu_memory_utilization: Share of the GPU vLLM may take.
            max_model_len: Most tokens of a sequence; None = the model's.
            max_num_seqs: Requests side by side.
            seed: Of the engine.

        Raises:
            UserError: vLLM is missing, unsupported, or does not start with this model.
        """
        distribution = require_vllm()
        prepare_environment()
        from vllm import LLM

        self._seeds = distribution != CPU_DISTRIBUTION
        self._eager = enforce_eager
        limits: dict[str, Any] = {} if max_model_len is None else {"max_model_len": max_model_len}
        if self._seeds:
            limits["gpu_memory_utilization"] = gpu_memory_utilization
        if not enable_chunked_prefill and max_model_len is not None:
            limits["max_num_batched_tokens"] = max(2048, max_model_len, max_num_seqs)
        try:
            self._llm = LLM(
                model=str(directory),
                skip_tokenizer_init=True,
                dtype=dtype,
                tensor_parallel_size=tensor_parallel_size,
                enforce_eager=enforce_eager,
                enable_chunked_prefill=enable_chunked_prefill,
                enable_prefix_caching=True,
                async_scheduling=False,
                max_num_seqs=max_num_seqs,
                seed=seed,
                worker_extension_cls=_EXTENSION,
                disable_log_stats=True,
                **limits,
            )
        except Exception as error:  # its reasons have many types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"backend=vllm: vLLM does not start with '{directory}': {reason}"
            ) from error
        config = self._llm.llm_engine.model_config
        self.num_layers = int(config.hf_text_config.num_hidden_layers)
        self.hidden_size = int(config.get_hidden_size())
        self.vocab_size = int(config.get_vocab_size())
        self._max_positions = int(config.max_model_len)
        self._runner = Runner(self._llm.llm_engine)
        self._automata = Automata(token_bytes, self.vocab_size)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        decoding: Decoding,
        max_new_tokens: int,
        on_rollout: OnRollout | None = None,
        task_rows: int = 0,
    ) -> list[list[Rollout]]:
        """As `Engine.sample`; all requests are given to vLLM, which schedules them.

        Raises:
            UserError: A prompt is empty, or longer with its continuation than the model allows.
        """
        del task_rows  # its batches depend on the moment anyway
        longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
        require(all(prompts), "empty prompt: there is no token to continue")
        require(
            longest <= self._max_positions,
            f"prompts and continuations of up to {longest} tokens exceed the "
            f"{self._max_positions} of model.max_model_len",
        )
        places, requests = [], []
        for i, (prompt, row_ids) in enumerate(zip(prompts, rows, strict=True)):
            for j, row in enumerate(row_ids):
                draws = self._seeds and decoding.temperature > 0.0
                seed = request_seed(decoding.seed, row, 0) if draws else None
                places.append((i, j))
                requests.append(Request(list(prompt), max_new_tokens, decoding, seed))
        results: list[list[Rollout | None]] = [[None] * len(row_ids) for row_ids in rows]

        def tell(index: int) -> None:
            (i, j), request = places[index], requests[index]
            rollout = Rollout(request.tokens, request.log_probs, request.finish)
            results[i][j] = rollout
            if on_rollout is not None:
                on_rollout(i, j, rollout)

        self._runner.run(requests, tell)
        return [[rollout for rollout in line if rollout is not None] for line in results]

    def states_at(
        self,
        token_ids: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        layers: Sequence[int],
    ) -> list[np.ndarray]:
        """As `Engine.states_at`.

        Raises:
            UserError: A layer or position lies outside, or the engine runs compiled graphs.
        """
        self._require_hooks()
        check_layers(layers, self.num_layers)
        check_positions(token_ids, positions)
        requests, owners = [], []
        for i, (ids, where) in enumerate(zip(token_ids, positions, strict=True)):
            if where:
                job = Job(i, sorted(set(where)), [])
                owners.append(i)
                requests.append(Request(list(ids), 1, Decoding(), job=job))
        self._llm.collective_rpc("watch_layers", args=(sorted(set(layers)),))
        self._runner.run(requests)
        captured = self._llm.collective_rpc("take_states")[0]
        results = [np.zeros((len(p), len(layers), self.hidden_size), np.float32) for p in positions]
        for i in owners:
            for p, position in enumerate(positions[i]):
                for n, layer in enumerate(layers):
                    results[i][p, n] = captured[i][layer, position]
        return results

    def open(self, settings: StreamSettings, tools: Toolbox) -> VllmStream:
        """As `Engine.open`; one stream at a time, since the workers hold one set of vectors.

        Raises:
            UserError: Settings or tools do not fit the model, or the engine runs compiled graphs.
        """
        self._require_hooks()
        sizes = self.num_layers, self.hidden_size, self._max_positions
        check_stream(settings, tools, *sizes)
        automaton = self._automata.of(settings.delimiter)
        return VllmStream(self._llm, self._runner, settings, tools, automaton, self._seeds)

    def _require_hooks(self) -> None:
        require(
            self._eager,
            "backend=vllm gives states and steers only with model.enforce_eager=True",
        )
