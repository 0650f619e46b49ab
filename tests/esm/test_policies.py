"""What a policy does to answers, on an engine that invents its text."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from common.engines.base import Decoding, Rollout
from common.engines.scripted import Key, Script, ScriptedEngine
from esm.controller import Answer, Limits, Question, answer_questions
from esm.memory import RANDOM_SUFFIX, Memory, make_memory
from esm.policies import MemoryPolicy, NullPolicy, Policy, PolicySettings, StaticPolicy, center_keys

VOCAB = ("<eos>", "\n\n", " a", " b", " c")
HIDDEN, LAYERS, T, M = 5, (1, 3), 14, 3


class _Lines(Mapping[Key, Rollout]):
    """A line for every question, decided by its hash; a tool changes the text."""

    def __getitem__(self, key: Key) -> Rollout:
        text, tool, limit, until = key
        ids: list[int] = []
        while len(ids) < limit:
            seed = f"{text}/{tool}/{len(ids)}".encode()
            draw = hashlib.sha256(seed).digest()[0] % 20
            ids.append(draw if draw < 2 else 1 if draw < 6 else 2 + draw % 3)
            if ids[-1] == 0:
                return Rollout(ids, [-0.1] * len(ids), "eos")
            if ids[-1] == 1 and until:
                return Rollout(ids, [-0.2 - len(ids)] * len(ids), "delimiter")
        return Rollout(ids, [-0.3] * len(ids), "length")

    def __iter__(self) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        return 1


class _States(Mapping[str, np.ndarray]):
    """States decided by the text's hash."""

    def __getitem__(self, text: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
        return np.random.default_rng(seed).normal(size=(len(LAYERS), HIDDEN)) + 0.7

    def __iter__(self) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        return 1

    def __contains__(self, text: object) -> bool:
        return True


def _engine() -> ScriptedEngine:
    return ScriptedEngine(Script(VOCAB, (0,), _Lines(), LAYERS, _States(), 4, HIDDEN))


def _memory(count: int = 18) -> Memory:
    rng = np.random.default_rng(0)
    rows = [
        {
            "tool_id": i,
            "tool_name": f"tool{i}",
            "layer": LAYERS[i % 2],
            "control_point_m": 1 + i % 2,
            "quality": float(rng.uniform(0.5, 1.5)),
            "has_vector": i % 3 > 0,
        }
        for i in range(count)
    ]
    keys, vectors = rng.normal(size=(2, count, HIDDEN)) + 0.7
    return make_memory(keys, vectors, rows)


def _answer(policy: Policy, slots: int = 3, tail_chunk: int = 0) -> dict[int, Answer]:
    engine = _engine()
    questions = [Question(i, i, engine.encode(f"<q{i}>")) for i in range(8)]
    limits = Limits(slots, M, T, T + 1, "\n\n", tail_chunk=tail_chunk)
    decoding = Decoding(stop_ids=(0,))
    return {a.number: a for a in answer_questions(engine, policy, questions, limits, decoding)}


def _settings(**changes: Any) -> PolicySettings:
    base = {"k_retrieve": 6, "num_tools": 2, "probe_tokens": 2, "min_sim": -1.0, "k_scale": 0.5}
    return PolicySettings(**{**base, **changes})


def _tokens(answers: dict[int, Answer]) -> list[list[int]]:
    return [answers[i].token_ids for i in sorted(answers)]


def test_steering_changes_something() -> None:
    plain, steered = _answer(NullPolicy(HIDDEN)), _answer(MemoryPolicy(_memory(), _settings()))
    assert _tokens(plain) != _tokens(steered)
    assert any(step["chosen"] != "null" for a in steered.values() for step in a.steps)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tools": 0},
        {"min_sim": 1.1},
        {"k_scale": 0.0},
        {"k_scale": -1.0},
        {"k_retrieve": 0},
        {"max_tool_m": 0},
        {"min_entries": 99},
    ],
    ids=str,
)
def test_what_cannot_act_equals_no_memory(changes: dict[str, Any]) -> None:
    plain = _answer(NullPolicy(HIDDEN))
    assert _tokens(_answer(MemoryPolicy(_memory(), _settings(**changes)))) == _tokens(plain)


def test_an_empty_memory_equals_no_memory() -> None:
    answers = _answer(MemoryPolicy(_memory(0), _settings()))
    assert _tokens(answers) == _tokens(_answer(NullPolicy(HIDDEN)))
    reasons = {step.get("mem_reason") for a in answers.values() for step in a.steps}
    assert reasons == {None, "empty_memory"}


@pytest.mark.parametrize("variant", ["esm", "random_use_memory", "use_random_memory"])
def test_slots_and_chunks_do_not_matter(variant: str) -> None:
    policy = MemoryPolicy(_memory(), _settings(variant=variant))
    assert _answer(policy, slots=1) == _answer(policy, slots=3)


def test_sums_and_budgets() -> None:
    for answer in _answer(MemoryPolicy(_memory(), _settings())).values():
        assert sum(step["spent_commit"] for step in answer.steps) == len(answer.token_ids) <= T
        assert sum(step["spent_probe"] for step in answer.steps) == answer.probe_tokens
        assert answer.truncated == (len(answer.token_ids) == T and answer.finish != "eos")
        points = [step["m"] for step in answer.steps]
        assert points == list(range(1, len(points) + 1)) and len(points) <= M + 1


def test_random_use_differs_and_random_vectors_keep_their_length() -> None:
    memory = _memory()
    best = _answer(MemoryPolicy(memory, _settings()))
    drawn = _answer(MemoryPolicy(memory, _settings(variant="random_use_memory", seed=3)))
    chosen = [[s["chosen"] for a in run.values() for s in a.steps[:2]] for run in (best, drawn)]
    assert chosen[0] != chosen[1]
    tools = memory.toolbox(random_seed=1)
    count = len(memory.names)
    assert tools.names[count:] == tuple(name + RANDOM_SUFFIX for name in memory.names)
    lengths = np.linalg.norm(tools.vectors, axis=1)
    np.testing.assert_allclose(lengths[count:], lengths[:count], rtol=1e-5)
    again = memory.toolbox(random_seed=1)
    np.testing.assert_array_equal(again.vectors, tools.vectors)
    assert not np.allclose(memory.toolbox(random_seed=2).vectors[count:], tools.vectors[count:])
    steps = _answer(MemoryPolicy(memory, _settings(variant="use_random_memory")))
    # The log names the tool that was decided on; the stream was given its noise.
    assert all(RANDOM_SUFFIX not in s["chosen"] for a in steps.values() for s in a.steps)


def test_static_acts_at_every_control_point() -> None:
    memory = _memory()
    policy = StaticPolicy(memory, 3, 0.7, _settings())
    mean = memory.vectors[(memory.layer == 3) & ~memory.is_null].mean(axis=0)
    np.testing.assert_allclose(policy.toolbox.vectors[0], mean, atol=1e-6)
    for answer in _answer(policy).values():
        for step in answer.steps:
            steered = step.get("mem_m", 0) >= 1
            assert (step["chosen"] != "null") == steered
            assert step["chosen_scale"] == (0.7 if steered else 0.0)


def test_relative_strengths_and_probe_scales() -> None:
    memory = _memory()
    raw = _answer(MemoryPolicy(memory, _settings(probe_tokens=0)))
    rel = _answer(MemoryPolicy(memory, _settings(probe_tokens=0, alpha_norm="rel")))
    number = next(i for i in raw if len(raw[i].steps) > 1 and raw[i].steps[1]["chosen"] != "null")
    first, other = raw[number].steps[1], rel[number].steps[1]
    assert first["chosen"] == other["chosen"]
    tool = memory.names.index(first["chosen"])
    ratio = other["chosen_scale"] / first["chosen_scale"]
    engine = _engine()
    segment = raw[number].token_ids[: raw[number].steps[0]["spent_commit"]]
    prefix = [*engine.encode(f"<q{number}>"), *segment]
    state = engine.state(prefix, (int(memory.layer[tool]),))[0]
    expected = np.linalg.norm(state) / np.linalg.norm(memory.vectors[tool])
    assert abs(ratio - expected) < 1e-4 * expected
    with_commit = _answer(MemoryPolicy(memory, _settings(probe_scale="commit")))
    assert set(with_commit) == set(raw)


def test_centred_keys_lose_their_common_part() -> None:
    memory = _memory()
    for kind in ("layer", "layer_m"):
        keys, means = center_keys(memory, kind)
        assert keys is not None and means is not None
        np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, atol=1e-5)
        assert abs(float((keys @ keys.T).mean())) < float((memory.keys @ memory.keys.T).mean())
        assert _answer(MemoryPolicy(memory, _settings(key_center=kind)))
    assert center_keys(memory, "none") == (None, None)
