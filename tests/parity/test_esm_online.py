"""The whole online policy on the scripted engine against the recordings of the original."""

import functools
from typing import Any

import numpy as np
import pytest

from common.engines.base import Decoding
from common.engines.scripted import ScriptedEngine, read_script
from esm.controller import Answer, Limits, Question, answer_questions
from esm.memory import Memory, make_memory
from esm.policies import MemoryPolicy, NullPolicy, Policy, PolicySettings
from tests.parity import esm_cases

CONTENT = esm_cases.read("online.json")
WORLD = CONTENT["world"]
RUNS = CONTENT["runs"]
TOLERANCE = 2e-6  # float32 against the original's mix of float32 and float64
NUMBERS = ("chosen_score", "chosen_scale", "null_ahat", "mem_top_sim", "score", "ahat", "sim")


@functools.cache
def _engine() -> ScriptedEngine:
    return ScriptedEngine(read_script(esm_cases.path("online.json"), esm_cases.path("online.npz")))


@functools.cache
def _memory() -> Memory:
    keys = esm_cases.arrays("online.npz")["keys"]
    rows = [{**e, "has_vector": e["vector_path"] is not None} for e in WORLD["entries"]]
    return make_memory(keys, np.zeros_like(keys), rows)


def _settings(online: dict[str, Any]) -> PolicySettings:
    names = {"L": "num_tools"}
    return PolicySettings(**{names.get(key, key): value for key, value in online.items()})


def _answers(run: dict[str, Any], slots: int) -> dict[int, Answer]:
    engine = _engine()
    settings = _settings(run["online"])
    policy: Policy = (
        NullPolicy(engine.hidden_size)
        if settings.variant == "no_memory"
        else MemoryPolicy(_memory(), settings)
    )
    limits = Limits(
        slots=slots,
        max_points=WORLD["M"],
        max_tokens=run["T_max"],
        capacity=run["T_max"] + 1,
        delimiter=WORLD["delimiter"],
    )
    questions = [
        Question(i, i, engine.encode(example["prompt"]))
        for i, example in enumerate(WORLD["examples"])
    ]
    decoding = Decoding(stop_ids=engine.script.stop_ids)
    found = answer_questions(engine, policy, questions, limits, decoding)
    return {answer.index: answer for answer in found}


def _assert_same(actual: Any, expected: Any, where: str) -> None:
    """Equal, numbers within the tolerance; keys the recording lacks do not count."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert key in actual, f"{where}: {key} is missing"
            _assert_same(actual[key], value, f"{where}.{key}")
        extra = set(actual) - set(expected) - {"note", "did_probe"}
        assert not extra, f"{where}: {extra}"
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for place, pair in enumerate(zip(actual, expected, strict=True)):
            _assert_same(*pair, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert actual is not None and abs(actual - expected) < TOLERANCE, (where, actual, expected)
    else:
        assert actual == expected, where


@pytest.mark.parametrize("slots", [4])
@pytest.mark.parametrize("run", [pytest.param(run, id=run["name"]) for run in RUNS])
def test_steps(run: dict[str, Any], slots: int) -> None:
    answers = _answers(run, slots)
    assert len(answers) == len(run["rows"])
    for index, row in enumerate(run["rows"]):
        answer = answers[index]
        where = f"{run['name']}/{row['example_id']}"
        assert _engine().decode(answer.token_ids) == row["text"], where
        assert len(answer.token_ids) == row["tokens_used"], where
        assert answer.probe_tokens == row["probe_tokens_used"], where
        _assert_same(answer.steps, row["steps"], where)


@pytest.mark.parametrize("slots", [1, 10])
def test_the_number_of_slots_does_not_matter(slots: int) -> None:
    assert _answers(RUNS[0], slots) == _answers(RUNS[0], 4)
