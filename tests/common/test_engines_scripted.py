"""The scripted engine reads exactly what its table holds."""

import json

import numpy as np
import pytest

from common.engines.base import NO_TOOL, Decoding, StreamSettings, Toolbox, Work
from common.engines.scripted import ScriptedEngine, read_script
from common.errors import UserError

VOCAB = ["<eos>", "\n\n", " a", " b"]


@pytest.fixture(name="engine")
def written_script(tmp_path):
    def line(token_ids, finish):
        return {
            "token_ids": token_ids,
            "logprobs": [-0.5] * len(token_ids),
            "finish_reason": finish,
        }

    world = {
        "vocab": VOCAB,
        "eos_id": 0,
        "hidden_size": 2,
        "state_layers": [1, 3],
        "state_prefixes": ["Q a\n\n"],
        "generate": {
            "Q||null||9||1": line([2, 1], "stop"),
            "Q||null||9||0": line([2, 1, 0], "stop"),
            "Q a\n\n||null||2||1": line([3, 3], "length"),
            "Q a\n\n||t1||2||1": line([0], "stop"),
            "Q a\n\n||t1||7||1": line([3, 0], "stop"),
        },
    }
    (tmp_path / "w.json").write_text(json.dumps({"world": world}))
    states = np.arange(4, dtype=np.float32).reshape(1, 2, 2)
    np.savez(tmp_path / "w.npz", states=states)
    return ScriptedEngine(read_script(tmp_path / "w.json", tmp_path / "w.npz"))


def test_a_row_from_prompt_to_end(engine):
    tools = Toolbox(("t0", "t1"), np.asarray([1, 3], np.int32), np.zeros((2, 2), np.float32))
    settings = StreamSettings(2, 99, (3, 1), "\n\n", 2, 1, Decoding())
    stream = engine.open(settings, tools)
    prompt = engine.encode("Q")
    assert prompt == engine.encode("Q") == [len(VOCAB)]
    stream.refill([1], [prompt], [0])
    none, until = np.asarray([NO_TOOL, NO_TOOL]), np.asarray([True, True])
    idle, first = stream.commit(none, np.zeros(2), np.asarray([0, 9]), until)
    assert idle is None and first.token_ids == [2, 1] and first.finish == "delimiter"
    active = np.asarray([False, True])
    states = stream.query(active)
    assert not states[0].any() and states[1].tolist() == [[2, 3], [0, 1]]
    probe = stream.probe(np.asarray([[0], [1]]), np.ones((2, 1)), active)
    assert probe.lengths.tolist() == [[0, 0], [2, 1]]
    assert probe.mean_log_probs[1].tolist() == [-0.5, -0.5]
    assert probe.token_ids[1].tolist() == [[3, 3], [0, 0]]
    last = stream.commit(np.asarray([NO_TOOL, 1]), np.ones(2), np.asarray([0, 7]), until)[1]
    assert last.token_ids == [3, 0] and last.finish == "eos"
    assert stream.work() == [Work(), Work(prefill=1, commit=4, probe=3)]


def test_samples_and_states(engine):
    prompt = engine.encode("Q")
    seen = []
    [[rollout]] = engine.sample([prompt], [[4]], Decoding(), 9, lambda *line: seen.append(line))
    assert rollout.token_ids == [2, 1, 0] and rollout.finish == "eos"
    assert seen == [(0, 0, rollout)]
    [states] = engine.states_at([[*prompt, 2, 1, 0]], [[2]], [1])
    assert states.tolist() == [[[0, 1]]]
    assert engine.token_bytes() == [b"", b"\n\n", b" a", b" b"]


def test_what_is_not_in_the_script_is_an_error(engine):
    prompt = engine.encode("Q")
    with pytest.raises(UserError, match="no line"):
        engine.sample([prompt], [[0]], Decoding(), 8)
    with pytest.raises(UserError, match="no states"):
        engine.states_at([prompt], [[0]], [1])
    with pytest.raises(UserError, match="cannot read the script"):
        read_script("/nowhere.json")
