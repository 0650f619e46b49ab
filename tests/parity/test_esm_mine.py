"""Mining, from rollouts and states to pairs, against the recordings of the original."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from esm.core.sets import SetRules
from esm.layers import resolve_layers, top_third
from esm.pairs import (
    GOLD,
    MineRules,
    Pair,
    Rollouts,
    candidate_rows,
    choose_sets,
    keep_best,
    pair_keys,
    pairs_of,
)
from esm.segments import end_offsets
from tests.parity import esm_cases

CONTENT = esm_cases.read("mine.json")
WORLD = CONTENT["world"]
ARRAYS = esm_cases.arrays("mine.npz")
BATCH = 4


@functools.cache
def _questions() -> list[Rollouts]:
    """The recorded answers, one token per character."""
    questions = []
    for order, example in enumerate(WORLD["examples"]):
        answers: list[dict[str, Any]] = [
            {**rollout, "token_ids": [*map(ord, rollout["text"])]}
            for rollout in example["rollouts"]
        ]
        answers.append(
            {
                "k": GOLD,
                "correct": example["gold_correct"],
                "gen_tokens": example["gold_gen_tokens"],
                "text": example["gold_text"],
                "token_ids": [*map(ord, example["gold_text"])],
            }
        )
        ends = [[e - 1 for e in end_offsets(a["text"], WORLD["delimiter"])] for a in answers]
        # The prompt is one token that names the question.
        questions.append(
            Rollouts(order, example["id"], example["task"], [order], list(answers), ends)
        )
    return questions


def _states_at(
    layers: Sequence[int], sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """The recorded states of the asked prefixes, and an error for any other."""
    results = []
    for ids, where in zip(sequences, positions, strict=True):
        question = _questions()[ids[0]]
        place = next(
            place
            for place, answer in enumerate(question.answers)
            if answer is not None and list(ids[1:]) == answer["token_ids"][: len(ids) - 1]
        )
        answer = question.answers[place]
        assert answer is not None
        name = "gold" if answer["k"] == GOLD else str(answer["k"])
        points = [question.ends[place].index(position - 1) + 1 for position in where]
        rows = [WORLD["state_index"][f"{question.example_id}/{name}/{m}"] for m in points]
        results.append(ARRAYS["states"][rows][:, list(layers)])
    return results


def _mine(run: dict[str, Any]) -> list[Pair]:
    config = run["config"]
    rules = MineRules(
        sets=SetRules(
            k_pos=config["K_pos"],
            k_neg=config["K_neg"],
            contrast=config.get("require_correct_and_incorrect", True),
            min_correct=config.get("min_correct_rollouts", 1),
            min_incorrect=config.get("min_incorrect_rollouts", 1),
            positive_source=config.get("pos_source", "rollout"),
        ),
        method=config.get("method", "contrastive"),
        max_points=run["M"],
        max_tokens=config["max_new_tokens"],
        eta0=config["eta0"],
        quality="reward_gap",
        keep=config["keep_top_C"],
        seed=0,
    )
    specs = config["candidate_layers"]
    count = WORLD["num_layers"]
    layers = top_third(count) if specs is None else resolve_layers(specs, count)
    pairs: list[Pair] = []
    for start in range(0, len(_questions()), BATCH):
        part = _questions()[start : start + BATCH]
        found, _ = pairs_of(
            part,
            choose_sets(part, rules),
            layers,
            functools.partial(_states_at, layers),
            WORLD["hidden_size"],
            rules,
            BATCH,
        )
        pairs += found
    return keep_best(pairs, rules.keep)


@pytest.mark.parametrize("run", [pytest.param(run, id=run["name"]) for run in CONTENT["runs"]])
def test_pairs(run: dict[str, Any]) -> None:
    pairs = _mine(run)
    assert len(pairs) == len(run["pairs"])
    assert len(list(candidate_rows(pairs))) == run["n_candidate_rows"]
    # The recording breaks ties by the id of the question.
    order = sorted(
        range(len(pairs)),
        key=lambda i: (
            -round(pairs[i].meta["quality"], 9),
            pairs[i].meta["example_id"],
            pairs[i].meta["control_point_m"],
            pairs[i].meta["layer"],
        ),
    )
    keys, vectors = pair_keys([pairs[i] for i in order], WORLD["hidden_size"])
    for i, expected in zip(order, run["pairs"], strict=True):
        for key, value in expected.items():
            actual = pairs[i].meta[key]
            if isinstance(value, float):
                assert abs(actual - value) < 1e-9, key
            else:
                assert actual == value, key
    name = run["name"]
    for actual, what in ((keys[0::2], "h_wrong"), (keys[1::2], "h_right"), (vectors, "delta")):
        np.testing.assert_allclose(actual, ARRAYS[f"{name}__{what}"], rtol=0, atol=2e-6)
