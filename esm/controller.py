"""Answers in segments: one loop over the slots of a stream, refilled as answers end.

Before segment m the control point m - 1 is looked at; the prompt's end has none. After M segments
the rest of the answer follows unsteered. A slot that is done takes the next question at once, so
questions in the same round stand at different control points; one code path serves one slot or
many, and an answer does not depend on its neighbours.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from common.engines.base import Decoding, Engine, Rollout, StreamSettings, Work
from esm.policies import NULL, Policy


class Question(NamedTuple):
    """One row of work.

    Attributes:
        number: what the caller knows it by.
        row: identity of its random draws.
        prompt: token ids.
    """

    number: int
    row: int
    prompt: list[int]


class Answer(NamedTuple):
    """A finished answer.

    Attributes:
        number: of the question.
        token_ids: committed tokens, the end token included.
        log_prob: sum of their log-probabilities under the (steered) model at temperature 1.
        finish: how the last segment ended, as in `Rollout.finish`.
        probe_tokens: tokens of all probes.
        steps: the step log.
        work: token positions sent through the model.
        truncated: the budget ran out before the end of the text.
    """

    number: int
    token_ids: list[int]
    log_prob: float
    finish: str
    probe_tokens: int
    steps: list[dict[str, Any]]
    work: Work
    truncated: bool


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a stream of answers is opened with; static.

    Attributes:
        slots: S, answers side by side.
        max_points: M, segments in which a policy may act.
        max_tokens: T, committed tokens of an answer.
        capacity: longest prompt plus T.
        delimiter: ends a segment.
        scope: of an injection, see StreamSettings.
        tail_chunk: most tokens of the rest per round, so that a long one does not hold up the
            other slots; 0 = no limit.
    """

    slots: int
    max_points: int
    max_tokens: int
    capacity: int
    delimiter: str
    scope: str = "segment"
    tail_chunk: int = 0


@dataclasses.dataclass
class _Slot:
    """An answer in progress."""

    question: Question
    point: int = 1  # the segment to come; M + 1 = the rest
    token_ids: list[int] = dataclasses.field(default_factory=list)
    log_prob: float = 0.0
    probe_tokens: int = 0
    finish: str = "length"
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    in_tail: bool = False


def answer_questions(
    engine: Engine,
    policy: Policy,
    questions: Iterable[Question],
    limits: Limits,
    decoding: Decoding,
    on_round: Callable[[int], None] | None = None,
) -> Iterator[Answer]:
    """Answers all questions, in the order in which they finish.

    Args:
        engine: can steer.
        policy: what is done at control points.
        questions: taken as slots become free.
        limits: sizes.
        decoding: drawing of tokens.
        on_round: called after every round with the committed tokens.
    """
    waiting = iter(questions)
    slots: list[_Slot | None] = [None] * limits.slots
    stream = engine.open(
        StreamSettings(
            slots=limits.slots,
            capacity=limits.capacity,
            layers=policy.layers,
            delimiter=limits.delimiter,
            probe_tokens=policy.probe_tokens,
            probe_branches=policy.probe_branches,
            decoding=decoding,
            scope=limits.scope,
        ),
        policy.toolbox,
    )
    while True:
        fresh: list[tuple[int, _Slot]] = []
        for place, slot in enumerate(slots):
            question = next(waiting, None) if slot is None else None
            if question is not None:
                fresh.append((place, _Slot(question)))
        if fresh:
            places = [place for place, _ in fresh]
            prompts = [slot.question.prompt for _, slot in fresh]
            stream.refill(places, prompts, [slot.question.row for _, slot in fresh])
            for place, slot in fresh:
                slots[place] = slot
        if all(slot is None for slot in slots):
            return
        committed = _round(stream, policy, slots, limits)
        if on_round is not None:
            on_round(committed)
        work = stream.work()
        for place, slot in enumerate(slots):
            if slot is not None and _finished(slot, limits):
                slots[place] = None
                yield _answer(slot, work[place], limits)


def _round(stream: Any, policy: Policy, slots: list[_Slot | None], limits: Limits) -> int:
    """Every slot advances by one segment; returns the committed tokens."""
    count = len(slots)
    points = np.zeros((count,), np.int32)
    rows = np.zeros((count,), np.int32)
    consulted = np.zeros((count,), bool)
    budgets = np.zeros((count,), np.int32)
    until = np.ones((count,), bool)
    for place, slot in enumerate(slots):
        if slot is None:
            continue
        tail = slot.point > limits.max_points
        points[place], rows[place] = slot.point - 1, slot.question.row
        consulted[place] = not tail and policy.acts_at(slot.point - 1)
        budgets[place] = limits.max_tokens - len(slot.token_ids)
        until[place] = not tail
        if tail and limits.tail_chunk:
            budgets[place] = min(budgets[place], limits.tail_chunk)
    plan = policy.plan(stream, consulted, points, rows)
    segments = stream.commit(plan.tools, plan.strengths, budgets, until)
    committed = 0
    for place, slot in enumerate(slots):
        segment = segments[place]
        if slot is None or segment is None:
            continue
        committed += len(segment.token_ids)
        if slot.in_tail:
            _extend_tail(slot, segment)
        else:
            _log_step(slot, segment, plan.logs[place], int(plan.spent[place]), limits)
        slot.token_ids += segment.token_ids
        slot.log_prob += float(np.sum(segment.log_probs))
        slot.finish = segment.finish
        slot.in_tail = slot.point > limits.max_points
        if not slot.in_tail:
            slot.point += 1
    return committed


def _log_step(
    slot: _Slot, segment: Rollout, log: dict[str, Any], spent: int, limits: Limits
) -> None:
    """One row of the step log; steps without a lookup say so with zeros."""
    tail = slot.point > limits.max_points
    length = len(segment.token_ids)
    step: dict[str, Any] = {"m": slot.point}
    if tail:
        step["phase"] = "tail"
    else:
        step["mem_m"] = slot.point - 1
    step |= {
        "remaining_before": limits.max_tokens - len(slot.token_ids),
        "probe_tokens_per_cand": 0,
        "spent_probe": spent,
        "spent_commit": length,
        "spent_total": spent + length,
        "chosen": NULL,
        "chosen_score": 0.0,
        "chosen_scale": 0.0,
        "candidates": [{"name": NULL, "score": 0.0}],
    }
    slot.steps.append(step | log)
    slot.probe_tokens += spent


def _extend_tail(slot: _Slot, segment: Rollout) -> None:
    """The rest of an answer is one step, in however many rounds it came."""
    step = slot.steps[-1]
    step["spent_commit"] += len(segment.token_ids)
    step["spent_total"] += len(segment.token_ids)


def _finished(slot: _Slot, limits: Limits) -> bool:
    if len(slot.token_ids) >= limits.max_tokens or slot.finish == "eos":
        return True
    return slot.finish != "delimiter" and not slot.in_tail and bool(slot.steps)


def _answer(slot: _Slot, work: Work, limits: Limits) -> Answer:
    return Answer(
        number=slot.question.number,
        token_ids=slot.token_ids,
        log_prob=slot.log_prob,
        finish=slot.finish,
        probe_tokens=slot.probe_tokens,
        steps=slot.steps,
        work=work,
        truncated=slot.finish != "eos" and len(slot.token_ids) >= limits.max_tokens,
    )
