"""The transformers engine against rows that are recomputed from scratch at every token."""

import dataclasses

import numpy as np
import pytest

from common.engines.base import NO_TOOL, Decoding, Toolbox
from common.engines.hf_engine import HfEngine
from common.errors import UserError
from common.lm.weights import save_model
from tests.common import engine_cases as cases
from tests.common.lm_models import BASE, random_model
from tests.common.test_engines_jax import ALL, MIXED_PLAN, PROMPTS

NO = NO_TOOL
CFG = dataclasses.replace(BASE, num_layers=3)
pytestmark = pytest.mark.torch


@pytest.fixture(name="model", scope="module")
def random_weights():
    return random_model(CFG)


@pytest.fixture(name="engine", scope="module")
def hf_engine(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "model"
    save_model(directory, model)
    return HfEngine(directory, cases.token_bytes(CFG.vocab_size), sample_slots=3)


@pytest.fixture(name="tools", scope="module")
def toolbox(model):
    return cases.random_tools(model, [1, 2, 1])


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.3, marks=pytest.mark.slow)])
def test_segments_probes_and_states(engine, model, tools, temperature):
    decoding = Decoding(temperature, 0.95 if temperature else 1.0, (cases.STOP,), seed=3)
    options = cases.settings(decoding=decoding)
    stream, rows = cases.play(engine, model, options, tools, PROMPTS, MIXED_PLAN)
    assert [work.prefill for work in stream.work()] == [row.start for row in rows]
    assert any(work.reread for work in stream.work())


def test_persistent_traces(engine, model, tools):
    options = cases.settings(scope="persistent")
    plan = [
        ([NO, 0, 1], [0, 2.0, 0.5], [6, 6, 6], ALL, None),
        ([2, NO, NO], [1.5, 0, 0], [5, 5, 5], ALL, [[0, 1], [NO, NO], [NO, NO]]),
        ([NO, NO, NO], [0, 0, 0], [20, 5, 20], [True, False, True], None),
    ]
    stream, _ = cases.play(engine, model, options, tools, PROMPTS, plan)
    assert all(work.reread == 0 for work in stream.work())


def test_refilled_slots(engine, model, tools):
    """A new row beside rows that go on."""
    options = cases.settings()
    stream = engine.open(options, tools)
    stream.refill([0, 1, 2], [PROMPTS[0], PROMPTS[0], PROMPTS[1]], [1, 2, 3])
    assert [work.prefill for work in stream.work()] == [3, 0, 5]
    none = np.full(3, NO), np.zeros(3, np.float32)
    first = stream.commit(*none, np.full(3, 7), np.full(3, True))
    stream.refill([1], [PROMPTS[2]], [7])
    rows = [cases.PlainRow(model, options, tools, PROMPTS[i], 0) for i in (0, 2, 1)]
    rows[0].ids += first[0].token_ids
    rows[2].ids += first[2].token_ids
    cases.check_query(stream, rows, np.ones(3, bool), 2e-5)


def test_samples_and_states(engine, model, tools):
    """More rollouts than slots, drawn as the other engines draw them."""
    decoding = Decoding(1.0, 0.9, (cases.STOP,), seed=5)
    rows = [[0, 1, 2, 3], [4]]
    results = engine.sample(PROMPTS[:2], rows, decoding, 12)
    for prompt, row_ids, rollouts in zip(PROMPTS, rows, results, strict=False):
        for row, rollout in zip(row_ids, rollouts, strict=True):
            options = cases.settings(decoding=decoding)
            plain = cases.PlainRow(model, options, None, prompt, row)
            cases.assert_same(rollout, plain.generate(NO, 0.0, 12, False, keep=True))
    sequences, asked = [PROMPTS[1] * 3, PROMPTS[0]], [[14, 0, 3, 0], [2]]
    got = engine.states_at(sequences, asked, [1, 0])
    for ids, where, states in zip(sequences, asked, got, strict=True):
        for position, state in zip(where, states, strict=True):
            row = cases.PlainRow(model, cases.settings(), tools, ids[: position + 1], 0)
            np.testing.assert_allclose(state, row.query(), atol=1e-5)


def test_no_hook_is_left_behind(engine, tools):
    """Also not after a pass that failed."""
    stream = engine.open(cases.settings(), tools)
    with pytest.raises(IndexError):
        stream.refill([0], [[CFG.vocab_size + 5]], [0])
    assert not any(block._forward_hooks for block in engine.model.get_decoder().layers)


def test_refusals(engine, tools, tmp_path):
    with pytest.raises(UserError, match="layers"):
        engine.open(cases.settings(layers=(3,)), tools)
    with pytest.raises(UserError, match="entries"):
        engine.open(cases.settings(), Toolbox(("t",), np.zeros(1, int), np.zeros((1, 5))))
    with pytest.raises(UserError, match="cannot load"):
        HfEngine(tmp_path, [b"x"])
    with pytest.raises(UserError, match="refill"):
        engine.open(cases.settings(), tools).query(np.ones(3, bool))
