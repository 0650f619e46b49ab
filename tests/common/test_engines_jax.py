"""The JAX engine against rows that are recomputed from scratch at every token."""

import dataclasses

import jax
import numpy as np
import pytest

from common.engines import jax_decode, jax_rows, jax_stream
from common.engines.base import NO_TOOL, Decoding, Toolbox
from common.engines.jax_engine import JaxEngine
from common.errors import UserError
from tests.common import engine_cases as cases
from tests.common.lm_models import BASE, random_model

NO = NO_TOOL
CFG = dataclasses.replace(BASE, num_layers=3)
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


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_segments_probes_and_states(engine, model, tools, temperature):
    """Two layers of tools, rows of all lengths, idle rows, tails, reused and dropped probes."""
    decoding = Decoding(temperature, 0.95 if temperature else 1.0, (cases.STOP,), seed=3)
    options = cases.settings(decoding=decoding)
    cases.play(engine, model, options, tools, PROMPTS, MIXED_PLAN)


def test_persistent_traces(engine, model, tools):
    """The steered cache stays: one steering per row, as the plain rows know only one."""
    options = cases.settings(scope="persistent")
    plan = [
        ([NO, 0, 1], [0, 2.0, 0.5], [6, 6, 6], ALL, None),
        ([2, NO, NO], [1.5, 0, 0], [5, 5, 5], ALL, [[0, 1], [NO, NO], [NO, NO]]),
        ([NO, NO, NO], [0, 0, 0], [9, 5, 5], [True, False, True], None),
    ]
    stream, _ = cases.play(engine, model, options, tools, PROMPTS, plan)
    assert all(work.reread == 0 for work in stream.work())
