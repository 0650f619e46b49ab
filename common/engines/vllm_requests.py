"""Requests to a vLLM engine in this process, ended on the host where a delimiter is completed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.engines.base import Decoding, Finish
from common.engines.delimiter import Automaton
from common.engines.vllm_worker import JOB, Job


@dataclasses.dataclass
class Request:
    """One continuation, filled in as it comes.

    Attributes:
        prompt: Token ids.
        limit: Most tokens.
        decoding: How they are drawn.
        seed: Of this request's draws, None = the engine's.
        automaton: Ends it at a delimiter, None = none does.
        state: Of the automaton; moves on.
        job: Captures and steerings, or None.
        tokens, log_probs, finish: The result.
        cached: Positions of the prompt that were not computed again.
    """

    prompt: list[int]
    limit: int
    decoding: Decoding
    seed: int | None = None
    automaton: Automaton | None = None
    state: int = 0
    job: Job | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    finish: Finish = "length"
    cached: int = 0

    def take(self, output: Any) -> bool:
        """Adds what is new in vLLM's output; whether the request has ended."""
        result = output.outputs[0]
        self.cached = int(output.num_cached_tokens or 0)
        for n in range(len(self.tokens), len(result.token_ids)):
            token = int(result.token_ids[n])
            self.tokens.append(token)
            self.log_probs.append(float(result.logprobs[n][token].logprob))
            if token in self.decoding.stop_ids:
                self.finish = "eos"
                return True
            if self.automaton is not None:
                hit = bool(self.automaton.hit[token, self.state])
                self.state = int(self.automaton.next[token, self.state])
                if hit:
                    self.finish = "delimiter"
                    return True
        return bool(output.finished)


class Runner:
    """Runs requests through vLLM's engine loop."""

    def __init__(self, engine: Any) -> None:
        """Args: engine: vLLM's `LLMEngine`."""
        self._engine = engine
        self._count = 0

    def run(self, requests: Sequence[Request], on_end: Callable[[int], None] | None = None) -> None:
        """Generates until all have ended; as many side by side as vLLM allows.

        Args:
            requests: Filled in.
            on_end: Told the index of each request as it ends.
        """
        waiting: dict[str, int] = {}
        for index, request in enumerate(requests):
            self._count += 1
            name = f"stream-{self._count}"
            prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt)}
            if request.job is not None:
                # Blocks of a steered request must serve no other, and captured positions must be
                # computed: neither may meet the prefix cache.
                prompt["cache_salt"] = name
            self._engine.add_request(name, prompt, self._parameters(request))
            waiting[name] = index
        while waiting:
            for output in self._engine.step():
                index = waiting.get(output.request_id, -1)
                if index < 0 or not requests[index].take(output):
                    continue
                del waiting[output.request_id]
                if not output.finished:
                    self._engine.abort_request([output.request_id])
                if on_end is not None:
                    on_end(index)

    @staticmethod
    def _parameters(request: Request) -> Any:
        from vllm import SamplingParams

        decoding = request.decoding
        return SamplingParams(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_tokens=request.limit,
            seed=request.seed,
            logprobs=0,  # of the drawn token, before temperature
            ignore_eos=True,
            stop_token_ids=list(decoding.stop_ids),
            detokenize=False,
            extra_args=None if request.job is None else {JOB: list(request.job)},
        )


def request_seed(seed: int, row: int, drawn: int) -> int:
    """A seed for what a row draws from its token `drawn` on."""
    state = np.random.SeedSequence([seed, row & 0xFFFFFFFF, drawn]).generate_state(1)
    return int(state[0])
