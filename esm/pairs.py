"""From graded rollouts to contrast pairs: which answers, which positions, which differences.

Everything is labelled by (question, rollout, control point) from the start; what is left out is
counted by reason.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from esm.core.contrast import Contrast, contrast
from esm.core.reward import reward
from esm.core.sets import REASONS, SetRules, random_sets, rank_sets

GOLD = -1  # the k of the reference answer
METHODS = ("contrastive", "random")


class MineRules(NamedTuple):
    """How pairs are made; static.

    Attributes:
        sets: which rollouts count as right and wrong.
        method: one of METHODS; "random" ignores the rewards.
        max_points: control points 1 .. max_points are mined.
        max_tokens: budget of a rollout, in the reward.
        eta0: price of a whole budget.
        quality: see `contrast`.
        keep: pairs of highest quality that are kept.
        seed: of the method "random".
    """

    sets: SetRules
    method: str
    max_points: int
    max_tokens: int
    eta0: float
    quality: str
    keep: int
    seed: int


class Rollouts(NamedTuple):
    """The answers to one question.

    Attributes:
        order: place of the question in the run.
        example_id: its id.
        task: its task.
        prompt: token ids.
        answers: K rollouts, then the reference answer or None.
        ends: per answer the indices of the tokens that end its segments.
    """

    order: int
    example_id: str
    task: str
    prompt: list[int]
    answers: list[dict[str, Any] | None]
    ends: list[list[int]]


class Chosen(NamedTuple):
    """Sets of Q questions.

    Attributes:
        pos: [Q, M, K + 1] bool.
        neg: [Q, M, K + 1] bool.
        reward: [Q, K + 1] float64.
        reason: [Q, M] index into REASONS.
    """

    pos: np.ndarray
    neg: np.ndarray
    reward: np.ndarray
    reason: np.ndarray


class Pair(NamedTuple):
    """A correction: where it was found and what it is.

    Attributes:
        order: of the question.
        meta: the fields of `candidates.jsonl` that both entries share.
        right: [H] float32.
        wrong: [H] float32.
        vector: [H] float32.
    """

    order: int
    meta: dict[str, Any]
    right: np.ndarray
    wrong: np.ndarray
    vector: np.ndarray


StatesAt = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[np.ndarray]]
"""Sequences and positions -> per sequence float32 [P, LQ, H], the layers being fixed."""


def choose_sets(questions: Sequence[Rollouts], rules: MineRules) -> Chosen:
    """Positives and negatives of every question and control point."""
    width = max(len(q.answers) for q in questions)
    shape = (len(questions), width)
    correct, tokens = np.zeros(shape, bool), np.zeros(shape, np.int64)
    reached = np.zeros(shape, np.int64)
    for row, question in enumerate(questions):
        for place, answer in enumerate(question.answers):
            if answer is None:
                continue
            # The reference stands in the last column whatever the number of rollouts.
            column = width - 1 if answer["k"] == GOLD else place
            correct[row, column] = bool(answer["correct"])
            tokens[row, column] = int(answer["gen_tokens"])
            reached[row, column] = len(question.ends[place])
    valid = reached[:, None, :] >= np.arange(1, rules.max_points + 1)[None, :, None]
    with jax.enable_x64(True):
        rewards, sets = jax.device_get(
            _rank(
                correct,
                tokens,
                valid,
                (rules.max_tokens, rules.eta0),
                rules.sets[:2] + rules.sets[3:5],
                contrast=rules.sets.contrast,
                source=rules.sets.positive_source,
            )
        )
    chosen = Chosen(
        np.array(sets.pos), np.array(sets.neg), np.asarray(rewards), np.array(sets.reason)
    )
    return _randomize(chosen, questions, valid, rules) if rules.method == "random" else chosen


def pairs_of(
    questions: Sequence[Rollouts],
    chosen: Chosen,
    layers: Sequence[int],
    states_at: StatesAt,
    hidden_size: int,
    rules: MineRules,
    batch: int,
) -> tuple[list[Pair], collections.Counter[str]]:
    """The pairs of some questions, and how many (question, m, layer) were left out, by reason.

    Args:
        questions: at most `batch`.
        chosen: their sets.
        layers: of the states.
        states_at: reads states.
        hidden_size: H.
        rules: see there.
        batch: rows the arithmetic is compiled for.
    """
    used = (chosen.pos | chosen.neg) & (chosen.reason == 0)[:, :, None]
    states = _read_states(questions, used, layers, states_at, hidden_size, batch)
    pad = batch - len(questions)

    def padded(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, pad), *[(0, 0)] * (x.ndim - 1)))

    with jax.enable_x64(True):
        found: Contrast = jax.device_get(
            _contrast(
                states,
                padded(chosen.pos),
                padded(chosen.neg),
                padded(chosen.reward),
                quality=rules.quality,
            )
        )
    pairs: list[Pair] = []
    skipped: collections.Counter[str] = collections.Counter()
    for q, question in enumerate(questions):
        for m in range(rules.max_points):
            if chosen.reason[q, m]:
                skipped[REASONS[chosen.reason[q, m]]] += len(layers)
                continue
            for place, layer in enumerate(layers):
                reason = _unusable(found, (q, m, place), rules)
                if reason:
                    skipped[reason] += 1
                else:
                    pairs.append(_pair(question, chosen, found, q, m, place, layer, rules))
    return pairs, skipped


def keep_best(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The `count` pairs of highest quality; ties by question, control point and layer."""

    def rank(pair: Pair) -> tuple[float, int, int, int]:
        meta = pair.meta
        # Rounded, so that equal qualities stay equal whatever the order of their sums.
        return (-round(meta["quality"], 9), pair.order, meta["control_point_m"], meta["layer"])

    return sorted(pairs, key=rank)[:count]


def candidate_rows(pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """Two entries per pair: the wrong state with its correction, the right one without."""
    for pair_id, pair in enumerate(pairs):
        meta = pair.meta
        for place, kind in enumerate(("wrong", "right")):
            tool_id = 2 * pair_id + place
            yield {
                "tool_id": tool_id,
                "tool_name": f"p{pair_id:04d}_m{meta['control_point_m']}_L{meta['layer']}_{kind}",
                "entry_type": kind,
                "row": tool_id,
                "has_vector": kind == "wrong",
                "pair_id": pair_id,
                **meta,
            }


def pair_keys(pairs: Sequence[Pair], hidden_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys [2 P, H] and vectors [P, H] in the order of `candidate_rows`."""
    keys = [state for pair in pairs for state in (pair.wrong, pair.right)]
    vectors = [pair.vector for pair in pairs]
    return (
        np.asarray(keys, np.float32).reshape(-1, hidden_size),
        np.asarray(vectors, np.float32).reshape(-1, hidden_size),
    )


@functools.partial(jax.jit, static_argnames=("contrast", "source"))
def _rank(
    correct: jax.Array,
    tokens: jax.Array,
    valid: jax.Array,
    price: tuple[int, float],
    counts: tuple[int, int, int, int],
    *,
    contrast: bool,
    source: str,
) -> Any:
    k_pos, k_neg, min_correct, min_incorrect = counts
    rules = SetRules(k_pos, k_neg, contrast, min_correct, min_incorrect, source)
    rewards = reward(correct, tokens, *price)
    return rewards, jax.vmap(lambda r, c, v: rank_sets(r, c, v, rules))(rewards, correct, valid)


@functools.partial(jax.jit, static_argnames="quality")
def _contrast(
    states: jax.Array, pos: jax.Array, neg: jax.Array, rewards: jax.Array, *, quality: str
) -> Contrast:
    return jax.vmap(lambda s, p, n, r: contrast(s, p, n, r, quality))(states, pos, neg, rewards)


def _randomize(
    chosen: Chosen, questions: Sequence[Rollouts], valid: np.ndarray, rules: MineRules
) -> Chosen:
    """Random sets; drawn per (question, control point), so a resumed run draws the same."""
    pos, neg = np.zeros_like(chosen.pos), np.zeros_like(chosen.neg)
    for q, question in enumerate(questions):
        for m in range(rules.max_points):
            rng = np.random.default_rng([rules.seed, question.order, m])
            reached = np.flatnonzero(valid[q, m, :-1]).tolist()
            right, wrong = random_sets(reached, rules.sets.k_pos, rules.sets.k_neg, rng)
            pos[q, m, right] = True
            neg[q, m, wrong] = True
    return chosen._replace(pos=pos, neg=neg)


def _read_states(
    questions: Sequence[Rollouts],
    used: np.ndarray,
    layers: Sequence[int],
    states_at: StatesAt,
    hidden_size: int,
    batch: int,
) -> np.ndarray:
    """float32 [batch, K + 1, M, LQ, H], zeros where nothing was chosen."""
    _, points, width = used.shape
    states = np.zeros((batch, width, points, len(layers), hidden_size), np.float32)
    sequences: list[list[int]] = []
    positions: list[list[int]] = []
    places: list[tuple[int, int, np.ndarray]] = []
    for q, question in enumerate(questions):
        for place, answer in enumerate(question.answers):
            if answer is None:
                continue
            column = width - 1 if answer["k"] == GOLD else place
            wanted = np.flatnonzero(used[q, :, column])
            if not len(wanted):
                continue
            ends = [question.ends[place][m] for m in wanted]
            start = len(question.prompt)
            sequences.append(question.prompt + list(answer["token_ids"][: ends[-1] + 1]))
            positions.append([start + end for end in ends])
            places.append((q, column, wanted))
    found = states_at(sequences, positions) if sequences else []
    for (q, column, wanted), rows in zip(places, found, strict=True):
        states[q, column, wanted] = rows
    return states


def _unusable(found: Contrast, at: tuple[int, int, int], rules: MineRules) -> str:
    """Why a pair does not count, "" if it does."""
    if not found.finite[at]:
        return "states_not_finite"
    quality = float(found.quality[at])
    if not np.isfinite(quality):
        return "quality_not_finite"
    if quality <= 0 and rules.method != "random":
        return "quality_not_positive"
    return ""


def _pair(
    question: Rollouts,
    chosen: Chosen,
    found: Contrast,
    q: int,
    m: int,
    place: int,
    layer: int,
    rules: MineRules,
) -> Pair:
    quality = float(found.quality[q, m, place])
    pos, neg = _names(chosen.pos[q, m]), _names(chosen.neg[q, m])
    rewards = chosen.reward[q]
    reward_pos, reward_neg = float(found.reward_pos[q, m]), float(found.reward_neg[q, m])
    meta = {
        "layer": int(layer),
        "control_point_m": m + 1,
        "quality": max(0.0, quality) if rules.method == "random" else quality,
        "reward_gap": reward_pos - reward_neg,
        "r_pos_mean": reward_pos,
        "r_neg_mean": reward_neg,
        "n_pos": len(pos),
        "n_neg": len(neg),
        "task": question.task,
        "example_id": question.example_id,
        # In the order in which they rank.
        "pos_k": sorted(pos, key=lambda k: -rewards[k]),
        "neg_k": sorted(neg, key=lambda k: rewards[k]),
    }
    at = (q, m, place)
    states = (np.asarray(x[at]) for x in (found.right, found.wrong, found.vector))
    return Pair(question.order, meta, *states)


def _names(chosen: np.ndarray) -> list[int]:
    """[K + 1] bool to the k of the answers."""
    last = len(chosen) - 1
    return [GOLD if k == last else int(k) for k in np.flatnonzero(chosen)]
