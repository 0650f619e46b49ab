"""Engines are refused by name and capability before anything of theirs is loaded."""

import pytest

from common.engines import factory
from common.engines.base import require_capabilities
from common.engines.factory import EngineOptions, check_engine, make_engine
from common.engines.hf_engine import HfEngine
from common.engines.jax_engine import JaxEngine
from common.engines.vllm_engine import VllmEngine
from common.errors import UserError
from common.lm.weights import save_model
from tests.common.lm_models import random_model


def test_declared_capabilities_are_those_of_the_engines():
    for engine in (JaxEngine, HfEngine, VllmEngine):
        assert factory.ENGINES[engine.name] == engine.capabilities


def test_refusals(monkeypatch):
    with pytest.raises(UserError, match="none of jax, hf, vllm"):
        check_engine("tpu")
    monkeypatch.setattr(factory, "ENGINES", {"jax": frozenset(("sample",))})
    with pytest.raises(UserError, match="cannot states, steer; use backend=jax or hf"):
        make_engine("jax", "/nowhere", [], needed=("sample", "states", "steer"))
    require_capabilities("jax", frozenset(("sample",)), ("sample",))


def test_the_default_engine(tmp_path):
    save_model(tmp_path / "m", random_model("llama"))
    engine = make_engine("jax", tmp_path / "m", [b"x"], EngineOptions(sample_slots=2), ("steer",))
    assert (engine.name, engine.num_layers, engine.hidden_size) == ("jax", 2, 16)
