"""Segments, rewards, sets and layer specs against the recordings of the original."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from esm.core.reward import reward
from esm.core.sets import SetRules, random_sets, rank_sets
from esm.layers import resolve_layers, top_third
from esm.segments import end_offsets
from tests.parity import esm_cases

UNITS = esm_cases.read("stage1_units.json")


def test_segments() -> None:
    for case in UNITS["segmentation"]:
        assert end_offsets(case["text"], case["delimiter"]) == case["end_offsets"], case


def test_rewards() -> None:
    with jax.enable_x64(True):
        for case in UNITS["reward"]:
            actual = reward(
                jnp.asarray([case["correct"]]),
                jnp.asarray([case["gen_tokens"]]),
                case["T_max"],
                case["eta0"],
            )
            np.testing.assert_allclose(actual[0], case["reward"], rtol=0, atol=1e-12)


_rank_sets = jax.jit(rank_sets, static_argnames="rules")


def test_sets_by_rank() -> None:
    width = max(len(case["rewards"]) for case in UNITS["rank_sets"]) + 1
    for case in UNITS["rank_sets"]:
        count = len(case["rewards"])
        sets = _rank_sets(
            np.pad(np.asarray(case["rewards"]), (0, width - count), constant_values=9.0),
            np.zeros(width, bool),
            (np.arange(width) < count)[None],
            rules=SetRules(case["K_pos"], case["K_neg"], contrast=False),
        )
        assert np.flatnonzero(sets.pos[0]).tolist() == sorted(case["pos"]), case
        assert np.flatnonzero(sets.neg[0]).tolist() == sorted(case["neg"]), case


def test_random_sets() -> None:
    for case in UNITS["random_sets"]:
        rng = np.random.default_rng(case["numpy_default_rng_seed"])
        actual = random_sets(case["valid_idx"], case["K_pos"], case["K_neg"], rng)
        assert actual == (case["pos"], case["neg"]), case


def _spec(value: Any) -> Any:
    return math.nan if value == "NaN" else value


def test_layer_specs() -> None:
    for case in UNITS["layer_specs"]:
        specs = [_spec(value) for value in case["specs"]]
        if "error" in case:
            with pytest.raises(UserError):
                resolve_layers(specs, case["num_layers"])
        else:
            assert resolve_layers(specs, case["num_layers"]) == tuple(case["layers"]), case


def test_top_third() -> None:
    for case in UNITS["top_third"]:
        assert top_third(case["num_layers"]) == tuple(case["layers"]), case
