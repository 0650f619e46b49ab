"""The vLLM backend for real: its tokens and diagnostics beside those of the JAX backend."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.lm.config import DecoderConfig
from common.lm.decoder import init_params
from common.lm.weights import Model, save_model
from qstar.backend import Request
from qstar.engine import JaxBackend, Plan
from qstar.law import LawSettings
from qstar.networks import DecoderNetwork
from qstar.slots import Columns, Decoding
from qstar.tilt import AlphaSettings
from tests.qstar.test_backend_transformers import drain

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SIZE, NEW = 60, 12
STOPS = list(range(6))
# vLLM's CPU attention wants heads of 32 or more.
CFG = DecoderConfig(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    max_positions=128,
)
COLUMNS = Columns(None, None, None, None, jnp.arange(SIZE) < len(STOPS))


def requests():
    rng = np.random.default_rng(0)
    return [
        Request(i, 0, *(rng.integers(6, SIZE, n).tolist() for n in lengths))
        for i, lengths in enumerate([(4, 9), (1, 3), (17, 2), (5, 5), (2, 30)])
    ]


@pytest.fixture(scope="module")
def models():
    return [Model(init_params(jax.random.key(i), CFG, stddev=0.3), CFG, (2,)) for i in range(2)]


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm") / "t"
    save_model(path, models[1])
    return path


@pytest.mark.parametrize(
    ("source", "temperature", "method"),
    [("both", 0.0, "kl_symmetry"), ("both", 1.0, "kl_symmetry"), ("t", 0.7, "fixed")],
)
def test_outputs_are_those_of_the_jax_backend(models, served, source, temperature, method):
    from qstar.backend_vllm import VllmBackend, start_engine
    from qstar.guide import Guide

    alpha = AlphaSettings(method, fixed=0.0)
    decoding = Decoding(alpha, LawSettings(), SIZE, NEW, temperature, source)
    network = DecoderNetwork(CFG)
    chosen = models if source == "both" else models[1:]
    plan = Plan((network,) * len(chosen), decoding)
    reference = JaxBackend(plan, [m.params for m in chosen], COLUMNS, 3, 5, 32)
    expected = drain(reference, requests())
    guided = (network, models[0].params) if source == "both" else (None, None)
    guide = Guide(decoding, COLUMNS, 3, 5, 64, *guided)
    engine = start_engine(str(served), "float32", guide, 64)
    backend = VllmBackend(engine, guide, decoding, STOPS, burst=8)
    found = drain(backend, requests())
    assert temperature != 1.0 or any(output.stopped for output in expected.values())
    for index, output in expected.items():
        assert found[index].columns.tolist() == output.columns.tolist(), index
        assert found[index].stopped == output.stopped
        for name, value in output.values.items():
            np.testing.assert_allclose(found[index].values[name], value, atol=2e-3, err_msg=name)
    # Abandoned sequences leave vLLM, and their slots can be used again.
    backend.prefill([1], requests()[:1])
    backend.step()
    backend.wait()
    backend.release([1])
    again = drain(backend, requests()[1:3])
    for index, output in again.items():
        assert output.columns.tolist() == expected[index].columns.tolist()
    assert dataclasses.is_dataclass(output) and not engine.has_unfinished_requests()
