"""The ways of answering: greedy decoding, the memory and its variants, a fixed correction, voting.

Each runs over the questions that have no row yet and adds rows as answers finish.
"""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from common.engines.base import Decoding, Rollout
from common.errors import require
from esm.controller import Answer, Limits, Question, answer_questions
from esm.datasets import TaskExample
from esm.examples import row_of
from esm.grading import Graded, Grader
from esm.memory import Memory
from esm.monitor import Monitor
from esm.policies import MemoryPolicy, NullPolicy, Policy, PolicySettings, StaticPolicy
from esm.results import Results, answer_row, graded_row, rollout_row
from esm.session import Session

_CAPACITY_STEP = 64
SAVED = "finished answers are"


def policy_settings(config: ConfigDict, variant: str, k_scale: float | None = None) -> Any:
    """The online block as settings of a policy."""
    online = config.online
    return PolicySettings(
        variant=variant,
        k_retrieve=online.k_retrieve,
        num_tools=online.L,
        probe_tokens=online.probe_tokens,
        beta=online.beta,
        rho=online.rho,
        k_scale=online.k_scale if k_scale is None else k_scale,
        tau_null=online.tau_null,
        min_sim=online.min_sim,
        min_entries=online.min_entries,
        min_tool_m=online.min_tool_m,
        max_tool_m=online.max_tool_m,
        probe_scale=online.probe_scale,
        alpha_max=online.alpha_max or float("inf"),
        alpha_norm=online.alpha_norm,
        key_center=online.key_center,
        seed=config.seed,
    )


def make_policy(settings: PolicySettings, memory: Memory | None, hidden_size: int) -> Policy:
    """The policy of a variant; one without a memory never steers."""
    if settings.variant == "no_memory" or memory is None:
        return NullPolicy(hidden_size)
    return MemoryPolicy(memory, settings)


def static_policy(config: ConfigDict, memory: Memory, settings: PolicySettings) -> Policy:
    """The mean correction of one layer at one strength.

    Raises:
        UserError: the memory has no correction in that layer.
    """
    counts = collections.Counter(memory.layer[~memory.is_null].tolist())
    layer = config.eval.static_layer
    if layer < 0:
        layer = min(counts, key=lambda x: (-counts[x], x), default=-1)
    require(
        counts.get(layer, 0) > 0,
        f"eval.static_layer={layer}: the memory has no correction there (it has "
        f"{dict(sorted(counts.items()))})",
    )
    strength = config.eval.static_strength
    if strength < 0:
        strength = settings.beta * settings.k_scale
    return StaticPolicy(memory, layer, float(strength), settings)


def decoding(config: ConfigDict, session: Session) -> Decoding:
    """How answers are decoded."""
    return Decoding(
        config.decode.temperature, config.decode.top_p, session.stop_ids, int(config.seed)
    )


def run_policy(
    config: ConfigDict,
    session: Session,
    policy: Policy,
    results: Results,
    monitor: Monitor,
    name: str,
    max_tokens: int,
) -> None:
    """Answers in segments under a policy."""
    examples = results.missing
    if not examples:
        return
    prompts = {example.id: session.prompt(example) for example in results.examples}
    limits = stream_limits(config, list(prompts.values()), max_tokens)
    questions = [
        Question(i, row_of(example), prompts[example.id]) for i, example in enumerate(examples)
    ]
    with _Pipe(config, results, monitor, name) as pipe:

        def on_round(committed: int) -> None:
            pipe.tokens += committed
            pipe.save()

        found = answer_questions(
            session.engine, policy, questions, limits, decoding(config, session), on_round
        )
        for answer in found:
            pipe.answered(examples[answer.number], answer, session.text(answer.token_ids))


def stream_limits(config: ConfigDict, prompts: Sequence[Sequence[int]], max_tokens: int) -> Limits:
    """Sizes of a stream for some prompts.

    Args:
        config: sections online, jax, model, control_points.
        prompts: of all questions, answered ones included, so that the sizes, and with them the last
            bits of what is computed, are the same when a run is resumed.
        max_tokens: T.

    Raises:
        UserError: a prompt with its answer exceeds model.max_model_len.
    """
    longest = max(len(prompt) for prompt in prompts)
    needed = longest + max_tokens
    require(
        needed <= config.model.max_model_len,
        f"the longest prompt has {longest} tokens; with decode.max_new_tokens={max_tokens} that "
        f"exceeds model.max_model_len={config.model.max_model_len}",
    )
    wanted = config.online.batch_size_examples
    slots = wanted if wanted > 0 else config.jax.slots
    # Powers of two for a few questions: few programs for all numbers of them.
    few = 1 << (len(prompts) - 1).bit_length()
    return Limits(
        slots=min(slots, few),
        max_points=config.control_points.M,
        max_tokens=max_tokens,
        capacity=_capacity(needed, config),
        delimiter=config.control_points.segment_delimiter,
        scope=config.online.injection_scope,
        tail_chunk=config.jax.tail_chunk,
    )


def run_greedy(
    config: ConfigDict,
    session: Session,
    results: Results,
    monitor: Monitor,
    max_tokens: int,
) -> None:
    """One unsegmented answer per question."""

    def answered(
        pipe: "_Pipe", example: TaskExample, prompt: list[int], rollout: Rollout, sample: int
    ) -> None:
        del sample
        row = rollout_row(example, rollout, session.text(rollout.token_ids), len(prompt))
        pipe.grader.submit(row, example, row["text"], row["finish_reason"])

    _sample_all(
        config,
        session,
        results,
        monitor,
        "greedy",
        1,
        decoding(config, session),
        max_tokens,
        answered,
    )


def run_self_consistency(
    config: ConfigDict, session: Session, results: Results, monitor: Monitor, max_tokens: int
) -> None:
    """The most frequent answer of N samples; ties go to the one that came first."""
    count = config.eval.sc_samples
    drawing = Decoding(
        config.eval.sc_temperature, config.offline_mine.top_p, session.stop_ids, int(config.seed)
    )
    ballots: dict[str, list[tuple[int, dict[str, Any], Graded]]] = {}

    def vote(row: dict[str, Any], verdict: Graded) -> dict[str, Any] | None:
        ballot = ballots.setdefault(row["example_id"], [])
        ballot.append((row.pop("sample"), row, verdict))
        if len(ballot) < count:
            return None
        return _elect(ballots.pop(row["example_id"]))

    def answered(
        pipe: "_Pipe", example: TaskExample, prompt: list[int], rollout: Rollout, sample: int
    ) -> None:
        row = rollout_row(example, rollout, session.text(rollout.token_ids), len(prompt))
        row["sample"] = sample
        pipe.grader.submit(row, example, row["text"], row["finish_reason"])

    _sample_all(
        config,
        session,
        results,
        monitor,
        "self_consistency",
        count,
        drawing,
        max_tokens,
        answered,
        vote,
    )


def _elect(ballot: list[tuple[int, dict[str, Any], Graded]]) -> dict[str, Any]:
    ballot.sort(key=lambda vote: vote[0])
    preds = [verdict.pred for _, _, verdict in ballot]
    counts = collections.Counter(pred for pred in preds if pred is not None)
    best = max(counts, key=lambda pred: (counts[pred], -preds.index(pred)), default=None)
    _, row, verdict = ballot[preds.index(best)]
    total = {
        "tokens_used": sum(r["tokens_used"] for _, r, _ in ballot),
        "truncated": all(r["truncated"] for _, r, _ in ballot),
        "forward_positions": row["prefill_tokens"] + sum(r["tokens_used"] for _, r, _ in ballot),
        "votes": dict(counts.most_common()),
    }
    return graded_row(row | total, verdict)


class _Pipe:
    """From finished answers over grading to rows, with a progress bar."""

    def __init__(
        self,
        config: ConfigDict,
        results: Results,
        monitor: Monitor,
        name: str,
        merge: Callable[[dict[str, Any], Graded], dict[str, Any] | None] = graded_row,
    ) -> None:
        self.grader = Grader(config.prompt.template, config.eval.grader, config.eval.grader_workers)
        self.tokens = 0
        self._log_probs = config.decode.logprobs > 0
        self._results = results
        self._monitor = monitor
        self._merge = merge
        total = len(results.examples)
        self._progress = monitor.progress(name, total, total - len(results.missing))
        self._right = sum(bool(row["correct"]) for row in results.rows)
        self._timed = results.timed()
        self._start = time.monotonic()

    def __enter__(self) -> "_Pipe":
        self._results.start()
        self._timed.__enter__()
        self.grader.__enter__()
        self._bar = self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.save(wait=True)
        finally:
            self._progress.__exit__(kind, *rest)  # type: ignore[arg-type]
            self.grader.__exit__(kind, *rest)
            self._timed.__exit__(kind, *rest)  # type: ignore[arg-type]

    def answered(self, example: TaskExample, answer: Answer, text: str) -> None:
        """Queues an answer in segments for grading."""
        row = answer_row(example, answer, text)
        self.grader.submit(row, example, text, row["finish_reason"])

    def save(self, wait: bool = False) -> None:
        """Writes what is graded, and stops here if that was asked for."""
        for item, verdict in self.grader.done(wait or self._monitor.stopping):
            row = self._merge(item, verdict)
            if row is None:
                continue
            if not self._log_probs:
                row.pop("logprob_sum", None)
            self._results.add(row)
            self._right += bool(row["correct"])
            self._bar.update()
        done = len(self._results.rows)
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix(
            acc=f"{self._right / max(done, 1):.3f}", tok_s=round(self.tokens / seconds)
        )
        self._monitor.check(SAVED)


def _sample_all(
    config: ConfigDict,
    session: Session,
    results: Results,
    monitor: Monitor,
    name: str,
    count: int,
    drawing: Decoding,
    max_tokens: int,
    answered: Callable[[_Pipe, TaskExample, list[int], Rollout, int], None],
    merge: Callable[[dict[str, Any], Graded], dict[str, Any] | None] = graded_row,
) -> None:
    """`count` unsegmented answers to every missing question."""
    missing = {example.id for example in results.missing}
    if not missing:
        return
    examples = results.examples
    prompts = [session.prompt(example) for example in examples]
    stream_limits(config, prompts, max_tokens)  # the same check as for steered answers
    # Answered questions stay in the list, so that a resumed run has the sizes of a whole one.
    rows = [
        [row_of(example, sample) for sample in range(count)] if example.id in missing else []
        for example in examples
    ]
    with _Pipe(config, results, monitor, name, merge) as pipe:

        def finished(i: int, j: int, rollout: Rollout) -> None:
            pipe.tokens += len(rollout.token_ids)
            answered(pipe, examples[i], prompts[i], rollout, j)
            pipe.save()

        total = count * len(examples)
        session.engine.sample(prompts, rows, drawing, max_tokens, finished, total)


def _capacity(needed: int, config: ConfigDict) -> int:
    """Tokens a row is given room for: the next of jax.length_buckets, else a multiple of 64."""
    fitting = [int(size) for size in sorted(config.jax.length_buckets) if size >= needed]
    rounded = fitting[0] if fitting else -(-needed // _CAPACITY_STEP) * _CAPACITY_STEP
    return int(np.clip(rounded, needed, max(needed, config.model.max_model_len)))
