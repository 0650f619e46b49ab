"""Greedy decodes recorded in the fixtures, through the transformers backend."""

import json
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from qstar.backend import Request
from qstar.backend_transformers import TransformersBackend
from qstar.law import LawSettings
from qstar.slots import Columns, Decoding
from qstar.tilt import AlphaSettings
from qstar.torch_rows import load_torch_model
from tests.parity.fixtures import fixture_root

pytestmark = pytest.mark.torch
TINY = fixture_root() / "qstar" / "tiny"
RUNS = json.loads((TINY / "expected.json").read_text())["runs"]
TOLERANCES = {"alpha": 1e-4, "kl_theta": 1e-4, "kl_t": 1e-4, "log_ess_theta": 1e-3}
TOLERANCES["log_ess_t"] = 1e-3


@cache
def load(name):
    return load_torch_model(TINY / name, "float32", "cpu")


def stop_ids(*names):
    found: set[int] = set()
    for name in names:
        ids = json.loads((TINY / name / "generation_config.json").read_text())["eos_token_id"]
        found |= set(ids if isinstance(ids, list) else [ids])
    return found


def vocabulary_size():
    return len(json.loads((TINY / "tok_t" / "tokenizer.json").read_text())["model"]["vocab"])


def drain(backend, requests):
    """Runs every request, refilling slots as they become free; outputs by sample."""
    waiting, held, outputs = list(requests)[::-1], {}, {}
    while waiting or held:
        free = [s for s in range(backend.slots) if s not in held][: len(waiting)]
        if free:
            new = [waiting.pop() for _ in free]
            held.update(zip(free, new, strict=True))
            backend.prefill(free, new)
        backend.step(leave_at=1)
        finished = np.flatnonzero(backend.wait().done).tolist()
        for slot, output in zip(finished, backend.read(finished), strict=True):
            outputs[held.pop(slot).sample_idx] = output
        backend.release(finished)
    return outputs


def make(run, slots, **changes):
    names = dict.fromkeys([run["theta"], run["t"]])
    size = vocabulary_size()
    stops = np.isin(np.arange(size), sorted(stop_ids(*names)))
    decoding = Decoding(
        alpha=AlphaSettings(run["alpha_method"], fixed=run["fixed_alpha"]),
        law=LawSettings(),
        size=size,
        max_new_tokens=run["max_new_tokens"],
        temperature=float(run["temperature"]),
        force_first=run["force_first_token"],
        **changes,
    )
    columns = Columns(None, None, None, None, jnp.asarray(stops))
    return TransformersBackend([load(name) for name in names], decoding, columns, slots, seed=0)


def requests_of(run):
    return [
        Request(i, 0, row["prompt_ids_theta"], row["prompt_ids_t"])
        for i, row in enumerate(run["rows"])
    ]


def cheap(run):
    """Compiled in a second; the others take several."""
    return run["alpha_method"] == "fixed"


@pytest.mark.parametrize(
    "number",
    [n if cheap(r) else pytest.param(n, marks=pytest.mark.slow) for n, r in enumerate(RUNS)],
)
def test_greedy_tokens_and_diagnostics(number):
    run = RUNS[number]
    outputs = drain(make(run, slots=3), requests_of(run))
    for i, row in enumerate(run["rows"]):
        assert outputs[i].columns.tolist() == row["tokens"], (number, i)
        assert outputs[i].stopped == (row["finish_reason"] == "stop")
        for name, tolerance in TOLERANCES.items():
            error = np.abs(outputs[i].values[name] - np.array(row[name]))
            assert error.max() <= tolerance, (number, i, name, error.max())


def test_a_model_alone_is_its_own_greedy_continuation():
    import torch

    run = RUNS[0]
    backend = make(run, slots=2, source="t")
    backend._models = [m for m in backend._models if m.model is load(run["t"])]
    requests = requests_of(run)[:2]
    outputs = drain(backend, requests)
    for request in requests:
        text = list(request.prompt_t)
        for token in outputs[request.sample_idx].columns:
            with torch.no_grad():
                logits = load(run["t"])(torch.tensor([text])).logits[0, -1]
            assert int(logits[: vocabulary_size()].argmax()) == token
            text.append(int(token))


def test_sampled_texts_do_not_depend_on_slots_and_abandoned_slots_are_free():
    run = {**RUNS[0], "temperature": 1.0, "max_new_tokens": 6, "alpha_method": "fixed"}
    requests = requests_of(run)
    whole = drain(make(run, slots=3), requests)
    backend = make(run, slots=3)
    backend.prefill([2], [requests[0]])
    backend._burst = 2
    backend.step()
    assert backend.wait().counts.tolist() == [0, 0, 2]
    assert backend.read([2])[0].columns.tolist() == whole[0].columns[:2].tolist()
    backend.release([2])
    assert backend.describe()["weight_bytes"] > 0
    again = drain(backend, requests[::-1])
    for i, output in whole.items():
        assert again[i].columns.tolist() == output.columns.tolist()
