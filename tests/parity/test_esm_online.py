"""The whole online policy on the scripted engine against the recordings of the original."""

import functools
from typing import Any

import numpy as np
import pytest

from common.engines.base import Decoding
from common.engines.scripted import ScriptedEngine, read_script
from esm.controller import Answer, Limits, Question, answer_questions
from esm.datasets import TaskExample
from esm.grading import grade
from esm.memory import Memory, make_memory
from esm.policies import MemoryPolicy, NullPolicy, Policy, PolicySettings
from esm.results import answer_row, rollout_row
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


def _example(index: int) -> TaskExample:
    example = WORLD["examples"][index]
    return TaskExample("gsm8k", example["id"], "", example["gold_field"], {"split": "test"})


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
    return {answer.number: answer for answer in found}


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
        made = answer_row(_example(index), answer, row["text"])
        for key in ("task", "example_id", "budget_used", "finish_reason"):
            assert made[key] == row[key], (where, key)
        _assert_same(answer.steps, row["steps"], where)


@pytest.mark.parametrize("slots", [1, 10])
def test_the_number_of_slots_does_not_matter(slots: int) -> None:
    assert _answers(RUNS[0], slots) == _answers(RUNS[0], 4)


@pytest.mark.parametrize("run", [pytest.param(run, id=run["name"]) for run in RUNS])
def test_greedy_rows(run: dict[str, Any]) -> None:
    engine = _engine()
    prompts = [engine.encode(example["prompt"]) for example in WORLD["examples"]]
    rows = [[i] for i in range(len(prompts))]
    found = engine.sample(prompts, rows, Decoding(), run["T_max"])
    for index, (expected, [rollout]) in enumerate(zip(run["greedy"], found, strict=True)):
        text = engine.decode(rollout.token_ids)
        row = rollout_row(_example(index), rollout, text, 1)
        for key in ("task", "example_id", "tokens_used", "finish_reason", "text"):
            assert row[key] == expected[key], key


@pytest.mark.parametrize("kind", ["rows", "greedy"])
@pytest.mark.parametrize("grader", ["strict", "legacy"])
def test_verdicts(kind: str, grader: str) -> None:
    for run in RUNS:
        for index, row in enumerate(run[kind]):
            verdict = grade(
                _example(index), row["text"], row["finish_reason"], "gsm8k_0shot", grader
            )
            assert verdict.correct == row["correct"] == verdict.correct_legacy, row
            assert verdict.gold == row["gold"]
            if grader == "legacy":
                assert verdict.pred == row["pred"]


def test_the_end_of_the_text_ends_the_answer() -> None:
    """An end token right behind a delimiter: the original went on and steered past the end."""
    content = esm_cases.read("online_eos.json")
    engine = ScriptedEngine(read_script(esm_cases.path("online_eos.json")))
    first = next(iter(content["generate"]))
    budget = int(first.split("||")[2])
    limits = Limits(1, 10, budget, budget + 1, WORLD["delimiter"])
    question = Question(0, 0, engine.encode(content["prompt"]))
    decoding = Decoding(stop_ids=engine.script.stop_ids)
    [answer] = answer_questions(engine, NullPolicy(4), [question], limits, decoding)
    desired = content["desired"]
    assert engine.decode(answer.token_ids) == desired["text"]
    assert len(answer.token_ids) == desired["tokens_used"]
    assert len(answer.steps) == desired["n_steps"] and answer.finish == "eos"
    row = answer_row(_example(0), answer, desired["text"])
    assert row["finish_reason"] == desired["finish_reason"] and not row["truncated"]
    verdict = grade(_example(0), desired["text"], "stop", "gsm8k_0shot", "strict")
    assert (verdict.pred, verdict.correct) == (desired["pred"], desired["correct"])
