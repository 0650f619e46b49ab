"""The JAX engine against rows that are recomputed from scratch at every token."""

import dataclasses

import jax
import numpy as np
import pytest

from common.engines import jax_decode, jax_probe, jax_rows, jax_slots
from common.engines.base import NO_TOOL, Decoding, Toolbox, Work
from common.engines.jax_engine import JaxEngine
from common.errors import UserError
from tests.common import engine_cases as cases
from tests.common.lm_models import BASE, random_model

NO = NO_TOOL
CFG = dataclasses.replace(BASE, num_layers=3)
PROGRAMS = (
    jax_decode.decode_chunk,
    jax_probe.probe_branches,
    jax_probe.adopt_null,
    jax_rows.read_prompts,
    jax_rows.copy_prompts,
    jax_rows.read_pending,
    jax_rows.reread,
    jax_rows.steer,
    jax_rows.grow_cache,
)
PROMPTS = [[7, 11, 12], [13, 14, 15, 16, 17], [18]]
ALL = [True] * 3
MIXED_PLAN = [
    ([NO, 0, 1], [0, 2.0, 0.5], [6, 6, 6], ALL, [[0, 1], [2, NO], [NO, NO]]),
    ([NO, NO, 2], [0, 0, 1.5], [3, 9, 5], ALL, [[2, 1], [0, 2], [1, NO]]),
    ([1, NO, 0], [0.7, 0, 1.0], [5, 0, 4], [True, True, False], None),
    ([NO, 2, NO], [0, 1.0, 0], [2, 7, 5], [True, True, False], [[0, NO], [1, 0], [2, 0]]),
]


@pytest.fixture(name="model", scope="module")
def random_weights():
    return random_model(CFG)


@pytest.fixture(name="engine", scope="module")
def jax_engine(model):
    return JaxEngine(model, cases.token_bytes(CFG.vocab_size), sample_slots=4)


@pytest.fixture(name="tools", scope="module")
def toolbox(model):
    return cases.random_tools(model, [1, 2, 1])


def counted():
    """Programs compiled so far."""
    return [program._cache_size() for program in PROGRAMS]


def no_tools(slots):
    return np.full(slots, NO), np.zeros(slots, np.float32)


def commit_null(stream, budget, until=True):
    """Every slot by one unsteered segment."""
    slots = stream.settings.slots
    budgets, ends = np.full(slots, budget), np.full(slots, until)
    return stream.commit(*no_tools(slots), budgets, ends)


def test_segments_probes_and_states(engine, model, tools):
    """Two layers of tools, rows of all lengths, idle rows, tails, reused and dropped probes."""
    cases.play(engine, model, cases.settings(), tools, PROMPTS, MIXED_PLAN)
    before = counted()
    other = Toolbox(tools.names, tools.layers, -tools.vectors)
    stream, rows = cases.play(engine, model, cases.settings(), other, PROMPTS[::-1], MIXED_PLAN)
    assert counted() == before, "another stream of the same shapes was compiled again"
    for work, row in zip(stream.work(), rows, strict=True):
        assert work.prefill == row.start
    assert any(work.probe_reused for work in stream.work())
    assert any(work.reread for work in stream.work())


def test_drawn_tokens(engine, model, tools):
    decoding = Decoding(1.3, 0.95, (cases.STOP,), seed=3)
    options = cases.settings(decoding=decoding)
    cases.play(engine, model, options, tools, PROMPTS, MIXED_PLAN)


def test_persistent_traces_small_chunks_and_a_growing_cache(model, tools, monkeypatch):
    """The steered cache stays: one steering per row, as the plain rows know only one."""
    monkeypatch.setattr(jax_slots, "FIRST_CAPACITY", 8)
    engine = JaxEngine(model, cases.token_bytes(CFG.vocab_size), chunk=3)
    options = cases.settings(scope="persistent")
    plan = [
        ([NO, 0, 1], [0, 2.0, 0.5], [6, 6, 6], ALL, None),
        ([2, NO, NO], [1.5, 0, 0], [5, 5, 5], ALL, [[0, 1], [NO, NO], [NO, NO]]),
        ([NO, NO, NO], [0, 0, 0], [20, 5, 20], [True, False, True], None),
    ]
    stream, _ = cases.play(engine, model, options, tools, PROMPTS, plan)
    assert all(work.reread == 0 for work in stream.work())


def test_a_probe_changes_nothing(engine, tools):
    stream = engine.open(cases.settings(), tools)
    stream.refill(range(3), PROMPTS, range(3))
    commit_null(stream, 4)
    active = np.asarray([True, False, True])
    stream.query(active)
    before = jax.device_get(stream._slots.rows)
    stream.probe(np.asarray([[0, 1], [2, NO], [1, 2]]), np.ones((3, 2), np.float32), active)
    after = jax.device_get(stream._slots.rows)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


@pytest.mark.parametrize("probed", [False, True])
def test_unsteered_segments_are_plain_decoding(engine, tools, probed):
    """Segments with and without probes between them, a tail, and `sample`: the same tokens."""
    stream = engine.open(cases.settings(), tools)
    stream.refill(range(3), PROMPTS, range(3))
    texts, alive = [[] for _ in PROMPTS], np.ones(3, bool)
    for until in (True, True, False):
        if probed:
            stream.probe(np.asarray([[0, 1]] * 3), np.ones((3, 2), np.float32), alive)
        left = np.asarray([20 - len(ids) for ids in texts])
        budgets = np.where(alive, left if not until else np.minimum(left, 8), 0)
        for slot, result in enumerate(stream.commit(*no_tools(3), budgets, np.full(3, until))):
            if result is not None:
                texts[slot] += result.token_ids
                alive[slot] = result.finish != "eos"
    plain = engine.sample(PROMPTS, [[0]] * 3, Decoding(stop_ids=(cases.STOP,)), 20)
    assert texts == [rollout.token_ids for [rollout] in plain]
    tokens = np.asarray([len(ids) for ids in texts])
    for work, count in zip(stream.work(), tokens, strict=True):
        reads = work.commit + max(work.probe_reused - 1, 0) if not probed else None
        assert reads is None or reads == count - 1
        assert bool(work.probe_reused) == probed


def test_a_cleared_segment_equals_a_fresh_stream(engine, model, tools):
    """The next state, the next probe and the next segment know nothing of the steering."""
    pieces = JaxEngine(model, cases.token_bytes(CFG.vocab_size), chunk=3)
    stream = pieces.open(cases.settings(), tools)
    stream.refill(range(3), PROMPTS, range(3))
    first = stream.commit(
        np.asarray([0, 1, 2]), np.full(3, 2.0, np.float32), np.full(3, 7), np.full(3, True)
    )
    fresh = engine.open(cases.settings(), tools)
    longer = [prompt + part.token_ids for prompt, part in zip(PROMPTS, first, strict=True)]
    fresh.refill(range(3), longer, range(3))
    active = np.ones(3, bool)
    np.testing.assert_allclose(stream.query(active), fresh.query(active), atol=1e-5)
    for got, want in zip(commit_null(stream, 8, False), commit_null(fresh, 8, False), strict=True):
        cases.assert_same(got, want)


def test_counts(engine, tools):
    """Every position of a steered, a probed and an unsteered segment."""
    decoding = Decoding()  # nothing ends a row, and no delimiter does
    stream = engine.open(cases.settings(slots=1, delimiter="zz", decoding=decoding), tools)
    stream.refill([0], [PROMPTS[1]], [0])
    assert stream.work() == [Work(prefill=5)]
    active, one = np.ones(1, bool), np.ones((1, 2), np.float32)
    commit_null(stream, 6)
    assert stream.work() == [Work(prefill=5, commit=5)]
    stream.probe(np.asarray([[0, 1]]), one, active)
    assert stream.work() == [Work(prefill=5, commit=6, probe=3 + 4 + 4)]
    commit_null(stream, 6)  # three of its tokens are read already, the fourth and fifth are not
    assert stream.work() == [Work(prefill=5, commit=8, probe=11, probe_reused=4)]
    stream.commit(np.asarray([0]), np.ones(1, np.float32), np.asarray([6]), np.asarray([True]))
    # The segment's last token, then the steered pass over it, then five tokens.
    assert stream.work() == [Work(prefill=5, commit=15, probe=11, probe_reused=4)]
    stream.query(active)
    assert stream.work() == [Work(prefill=5, commit=16, probe=11, reread=5, probe_reused=4)]


def test_refilled_slots_share_prompts(engine, model, tools):
    """A prompt that a slot still holds is copied, also back into the slot itself."""
    options = cases.settings()
    stream = engine.open(options, tools)
    stream.refill([0, 1, 2], [PROMPTS[0], PROMPTS[0], PROMPTS[1]], [1, 2, 3])
    assert [work.prefill for work in stream.work()] == [3, 0, 5]
    commit_null(stream, 7)
    stream.refill([0, 1, 2], [PROMPTS[1], PROMPTS[2], PROMPTS[0]], [4, 5, 6])
    assert [work.prefill for work in stream.work()] == [0, 1, 0]
    commit_null(stream, 3)
    stream.refill([2], [PROMPTS[0]], [7])
    rows = [cases.PlainRow(model, options, tools, PROMPTS[i], 0) for i in (1, 2, 0)]
    for slot, row in enumerate(rows[:2]):
        row.ids = list(stream._slots.tokens[slot])
    cases.check_query(stream, rows, np.ones(3, bool), 1e-5)
    cases.assert_same(
        commit_null(stream, 5, False)[2], rows[2].generate(NO, 0.0, 5, False, keep=True)
    )


def test_samples_do_not_depend_on_slots(engine, model):
    """More rollouts than slots: forks, refills; a row's tokens are its own."""
    decoding = Decoding(1.0, 0.9, (cases.STOP,), seed=5)
    seen = {}
    rows = [[0, 1, 2, 3], [4], [5, 6, 7]]
    results = engine.sample(
        PROMPTS, rows, decoding, 12, lambda i, j, rollout: seen.__setitem__((i, j), rollout)
    )
    assert seen == {(i, j): r for i, line in enumerate(results) for j, r in enumerate(line)}
    [[alone]] = engine.sample([PROMPTS[2]], [[6]], decoding, 12)
    cases.assert_same(results[2][1], alone)
    options = cases.settings(decoding=decoding)
    plain = cases.PlainRow(model, options, None, PROMPTS[0], 3)
    cases.assert_same(results[0][3], plain.generate(NO, 0.0, 12, False, keep=True))
    assert len({tuple(rollout.token_ids) for rollout in results[0]}) > 1


def test_a_resumed_task_computes_the_same_bits(engine):
    """Fewer rows alone would run in fewer slots: another program, other last bits."""
    decoding = Decoding(1.0, 0.9, (cases.STOP,), seed=5)
    whole = engine.sample(PROMPTS, [[0], [1], [2]], decoding, 12)
    left = engine.sample(PROMPTS, [[], [1], []], decoding, 12, task_rows=3)
    assert left == [[], whole[1], []]  # log-probabilities included


def test_states_at(engine, model, tools):
    sequences = [PROMPTS[1] * 3, PROMPTS[2] * 40]
    got = engine.states_at(sequences, [[0, 14, 3], [39]], [1, 0])
    assert [states.shape for states in got] == [(3, 2, 16), (1, 2, 16)]
    for ids, where, states in zip(sequences, [[0, 14, 3], [39]], got, strict=True):
        for position, state in zip(where, states, strict=True):
            row = cases.PlainRow(model, cases.settings(), tools, ids[: position + 1], 0)
            np.testing.assert_allclose(state, row.query(), atol=1e-5)
    assert engine.states_at([[1]], [[]], [0])[0].shape == (0, 1, 16)


def test_refusals(engine, tools):
    with pytest.raises(UserError, match="layers"):
        engine.open(cases.settings(layers=(3,)), tools)
    with pytest.raises(UserError, match="entries"):
        engine.open(cases.settings(), Toolbox(("t",), np.zeros(1, int), np.zeros((1, 5))))
    with pytest.raises(UserError, match="positions"):
        engine.open(cases.settings(capacity=129), tools)
    stream = engine.open(cases.settings(capacity=8), tools)
    with pytest.raises(UserError, match="capacity"):
        stream.refill([0], [[7] * 9], [0])
    with pytest.raises(UserError, match="refill"):
        stream.query(np.ones(3, bool))
    stream.refill([0], [[7] * 6], [0])
    with pytest.raises(UserError, match="cannot hold"):
        stream.commit(*no_tools(3), np.asarray([3, 0, 0]), np.full(3, True))
    with pytest.raises(UserError, match="positions of the model"):
        engine.sample([[7]], [[0]], Decoding(), 128)
    with pytest.raises(UserError, match="sequence"):
        engine.states_at([[7]], [[1]], [0])
