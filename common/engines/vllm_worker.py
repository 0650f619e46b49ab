"""What runs inside vLLM's worker: hooks on decoder blocks that capture and steer single requests.

vLLM mixes the class into its worker (`worker_extension_cls`) and calls its methods by
`collective_rpc`. In vLLM's fused layout a block returns (h, residual), whose sum is the residual
stream; the tokens of all requests lie along one axis.
"""

from typing import Any, NamedTuple

import numpy as np

JOB = "stream_job"
"""Key of `SamplingParams.extra_args` under which a request carries its `Job`, as plain values."""


class Job(NamedTuple):
    """What is done to a request beside generating.

    Attributes:
        tag: Under which its states are handed out.
        capture: Positions whose states are captured.
        steer: (position, layer, row of the vectors, strength) each.
    """

    tag: int
    capture: list[int]
    steer: list[tuple[int, int, int, float]]


class SteeringWorker:
    """Extension of vLLM's worker."""

    model_runner: Any

    def watch_layers(self, layers: list[int]) -> None:
        """Installs hooks on these layers, in place of the present ones."""
        for handle in getattr(self, "_handles", []):
            handle.remove()
        blocks = self.model_runner.get_model().model.layers
        self._captured: dict[int, dict[tuple[int, int], np.ndarray]] = {}
        self._handles = [blocks[i].register_forward_hook(self._make_hook(i)) for i in layers]

    def set_vectors(self, vectors: np.ndarray) -> None:
        """Replaces the steering vectors [N, H]."""
        import torch

        parameter = next(self.model_runner.get_model().parameters())
        self._vectors = torch.as_tensor(vectors, dtype=torch.float32, device=parameter.device)

    def take_states(self) -> dict[int, dict[tuple[int, int], np.ndarray]]:
        """Captured states [H] float32 by tag and (layer, position); they are forgotten."""
        captured, self._captured = self._captured, {}
        return captured

    def _make_hook(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            places = self._places()
            if not places:
                return None
            hidden, residual = output
            for job, begin, end, shift in places:
                for position, at, vector, strength in job.steer:
                    if at == layer and begin <= position + shift < end:
                        added = strength * self._vectors[vector]
                        hidden[position + shift] += added.to(hidden.dtype)
                for position in job.capture:
                    if begin <= position + shift < end:
                        row = position + shift
                        state = hidden[row].float() + residual[row].float()
                        states = self._captured.setdefault(job.tag, {})
                        states[layer, position] = state.cpu().numpy()
            return hidden, residual

        return hook

    def _places(self) -> list[tuple[Job, int, int, int]]:
        """Per request with a job: it, its rows of the flat axis, row of a position minus it."""
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        if not metadata:  # profiling runs have none
            return []
        runner = self.model_runner
        batch = runner.input_batch
        jobs = []
        for i, name in enumerate(batch.req_ids):
            extra = runner.requests[name].sampling_params.extra_args or {}
            if JOB in extra:
                jobs.append((i, Job(*extra[JOB])))
        if not jobs:
            return []
        some = next(iter(metadata.values())) if isinstance(metadata, dict) else metadata
        starts = some.query_start_loc.tolist()
        return [
            (job, starts[i], starts[i + 1], starts[i] - int(batch.num_computed_tokens_cpu[i]))
            for i, job in jobs
        ]
