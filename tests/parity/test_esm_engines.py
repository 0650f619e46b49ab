"""Engines on the recorded small models: greedy and steered tokens, states of both scopes."""

import functools
import json

import numpy as np
import pytest

from common.engines.base import NO_TOOL, Decoding, StreamSettings, Toolbox
from tests.parity.fixtures import fixture_root

ROOT = fixture_root() / "esm" / "tiny_models"
MODELS = sorted(path.parent for path in ROOT.glob("*/expected.json"))
ATOL = 2e-3
BETWEEN_ENGINES = 1e-4
ENGINES = [pytest.param("hf", marks=pytest.mark.torch), "jax"]


@functools.cache
def recording(directory):
    """Recorded values and arrays."""
    with np.load(directory / "expected.npz") as arrays:
        return json.loads((directory / "expected.json").read_text()), dict(arrays)


@functools.cache
def load(name, directory):
    """An engine; its tokens have no text, so nothing ends a segment but the budget."""
    if name == "jax":
        from common.engines.jax_engine import JaxEngine
        from common.lm.weights import load_model

        return JaxEngine(load_model(directory), [])
    from common.engines.hf_engine import HfEngine

    return HfEngine(directory, [])


@functools.cache
def steered(name, directory, scope):
    """Every steering case in a slot of its own: results, and states behind them."""
    expected, arrays = recording(directory)
    cases, engine = expected["steer"], load(name, directory)
    count = len(cases)
    tools = Toolbox(
        tuple(str(k) for k in range(count)),
        np.asarray([case["layer"] for case in cases], np.int32),
        np.stack([arrays[f"s{k}_v"] for k in range(count)]),
    )
    prompts = [expected["prompts"][case["prompt"]] for case in cases]
    budgets = np.asarray([len(case["tokens"]) for case in cases])
    capacity = max(map(len, prompts)) + int(budgets.max())
    layers = tuple(range(engine.num_layers))
    settings = StreamSettings(count, capacity, layers, "\n\n", 1, 1, Decoding(), scope)
    stream = engine.open(settings, tools)
    stream.refill(range(count), prompts, range(count))
    strengths = np.asarray([case["alpha"] for case in cases], np.float32)
    results = stream.commit(np.arange(count), strengths, budgets, np.zeros(count, bool))
    return results, stream.query(np.ones(count, bool))


@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
@pytest.mark.parametrize("name", ENGINES)
def test_greedy(name, directory):
    expected, _ = recording(directory)
    cases = expected["greedy"]
    prompts = [expected["prompts"][case["prompt"]] for case in cases]
    longest = max(len(case["tokens"]) for case in cases)
    rows = [[0]] * len(cases)
    results = load(name, directory).sample(prompts, rows, Decoding(), longest)
    for case, [rollout] in zip(cases, results, strict=True):
        count = len(case["tokens"])
        assert rollout.token_ids[:count] == case["tokens"]
        np.testing.assert_allclose(rollout.log_probs[:count], case["logprobs"], atol=ATOL)


@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
@pytest.mark.parametrize("scope", ["segment", "persistent"])
@pytest.mark.parametrize("name", ENGINES)
def test_steering(name, scope, directory):
    """Tokens, and the state of their last one: read again clean, or behind the kept trace."""
    expected, arrays = recording(directory)
    results, states = steered(name, directory, scope)
    kind = "clean" if scope == "segment" else "persistent"
    for k, case in enumerate(expected["steer"]):
        assert results[k].token_ids == case["tokens"], k
        np.testing.assert_allclose(results[k].log_probs, case["logprobs"], atol=ATOL)
        np.testing.assert_allclose(states[k], arrays[f"s{k}_state_{kind}"], atol=ATOL)


@pytest.mark.torch
@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
def test_engines_agree(directory):
    """States of prompts, and what steering makes of them."""
    expected, _ = recording(directory)
    prompts = expected["prompts"]
    positions = [[len(prompt) - 1, 0] for prompt in prompts]
    engines = [load(name, directory) for name in ("jax", "hf")]
    layers = range(engines[0].num_layers)
    pairs = zip(*(e.states_at(prompts, positions, layers) for e in engines), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=BETWEEN_ENGINES)
    for scope in ("segment", "persistent"):
        (mine, states), (other, reference) = (
            steered(name, directory, scope) for name in ("jax", "hf")
        )
        np.testing.assert_allclose(states, reference, atol=BETWEEN_ENGINES)
        for a, b in zip(mine, other, strict=True):
            assert a.token_ids == b.token_ids
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=BETWEEN_ENGINES)


@pytest.mark.parametrize("directory", MODELS[:1], ids=lambda path: path.name)
@pytest.mark.parametrize("name", ENGINES)
def test_strength_zero_is_no_tool(name, directory):
    """A tool of strength 0 gives the greedy tokens."""
    expected, arrays = recording(directory)
    engine, case = load(name, directory), expected["greedy"][0]
    vector = arrays["s0_v"][None]
    tools = Toolbox(("zero",), np.zeros(1, np.int32), vector)
    prompt, budget = expected["prompts"][case["prompt"]], len(case["tokens"])
    settings = StreamSettings(2, len(prompt) + budget, (0,), "\n\n", 1, 1, Decoding())
    stream = engine.open(settings, tools)
    stream.refill([0, 1], [prompt, prompt], [0, 1])
    results = stream.commit(
        np.asarray([0, NO_TOOL]), np.zeros(2, np.float32), np.full(2, budget), np.full(2, False)
    )
    assert [result.token_ids for result in results] == [case["tokens"]] * 2
