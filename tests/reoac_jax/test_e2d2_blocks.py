"""Scoring block by block with caches against recomputing everything, and against block decoding."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.backbone.e2d2 import E2D2Config
from reoac_jax.backbone.e2d2_decode import generate
from reoac_jax.defaults import finalize, get_default_config
from reoac_jax.rollout import rollout_plus
from reoac_jax.samplers import confidence_decode
from reoac_jax.scratch import make_backbone
from tests.reoac_jax.toy_setting import (
    SPECIAL,
    tiny_network,
    toy_agent,
    toy_settings,
    toy_tables,
)

WIDTH, GEN, SIZE = 8, 12, 4
NETWORK = dataclasses.replace(
    tiny_network("left_to_right"),
    num_encoder_layers=3,
    num_decoder_layers=2,
    kv_layers=(),
    length=WIDTH + GEN,
)
SHARED = dataclasses.replace(
    NETWORK, share_kv=True, tie_encoder_decoder=True, kv_layers=(1, 2), qk_norm=False
)
NETWORKS = pytest.mark.parametrize("network", [NETWORK, SHARED], ids=["last_hidden", "shared_kv"])


def lively(backbone: Backbone) -> Any:
    """Random parameters large enough for sure and varied predictions."""
    params = jax.jit(backbone.init)(jax.random.key(3))
    return jax.tree.map(lambda x: 3.0 * x if x.ndim > 1 else x, params)


def canvas_of(lengths: list[int]) -> Canvas:
    """Rows with random prompts of these lengths and masked canvases; row i always has the same."""
    tokens = np.full((len(lengths), WIDTH + GEN), SPECIAL.pad_id, np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = np.random.default_rng(length).integers(0, SPECIAL.eos_id, length)
        tokens[row, length : length + GEN] = SPECIAL.mask_id
    keys = np.zeros((len(lengths), WIDTH), bool)
    return Canvas(
        jnp.asarray(tokens),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(keys),
        jnp.asarray(lengths, jnp.uint32),
    )


@NETWORKS
def test_logits_of_the_active_block_are_those_of_recomputing_everything(
    network: E2D2Config,
) -> None:
    """Prompts that end with a block; rows that stand in different blocks; one is complete."""
    backbone = make_backbone(network, block_cache=True)
    assert backbone.blocks is not None
    params, canvas = lively(backbone), canvas_of([4, 8, 8, 4])
    rng = np.random.default_rng(0)
    target = rng.integers(0, SPECIAL.eos_id, (4, GEN))
    context, cache = jax.jit(backbone.blocks.begin)(params, canvas)
    score, whole = jax.jit(backbone.blocks.score), jax.jit(backbone.score)
    written = np.zeros((4, GEN), bool)
    written[3] = True
    for _ in range(GEN):
        gen_ids = jnp.asarray(np.where(written, target, SPECIAL.mask_id), jnp.int32)
        block, cache = score(context, cache, canvas, gen_ids)
        full = whole(params, backbone.begin(params, canvas), canvas, gen_ids, jnp.ones(4))
        spread = block.spread(block.hidden, GEN, 0.0)
        editable = np.asarray(full.editable)
        for row in range(3):
            if written[row].all():
                continue
            places = np.flatnonzero(editable[row])
            np.testing.assert_array_equal(np.sort(np.asarray(block.places[row])), places)
            np.testing.assert_allclose(
                spread[row, places], full.hidden[row, places], rtol=3e-4, atol=3e-4
            )
        for row in range(3):  # one to three further tokens of the active block, any order
            places = np.flatnonzero(editable[row] & ~written[row])
            written[row, rng.permutation(places)[: row + 1]] = True


@pytest.mark.parametrize(
    ("network", "lengths"),
    [
        (NETWORK, [1, 3, 4, 6, 8]),
        (SHARED, [1, 3, 4, 6, 8]),
        (SHARED, [4, 8, 8, 8, 4, 4, 8, 8, 4, 4]),
    ],
    ids=["last_hidden", "shared_kv", "shared_kv, all finish together"],
)
def test_the_plain_sampler_writes_what_block_decoding_writes(
    network: E2D2Config, lengths: list[int]
) -> None:
    """Finished rows are encoded a quarter of the batch at a time; ten have no four quarters."""
    backbone = make_backbone(network, block_cache=True)
    params = lively(backbone)
    canvas = canvas_of(lengths)
    done = jax.jit(functools.partial(confidence_decode, backbone, num_steps=GEN))(params, canvas)
    expected = generate(
        params, network, canvas.tokens[:, :WIDTH], canvas.prompt_len, max_new_tokens=GEN
    )
    assert np.unique(np.asarray(done.gen_ids)).size > 4
    for row, length in enumerate(lengths):
        # Block decoding reads masks behind the canvas when its last block is cut.
        whole = (length + GEN) // SIZE * SIZE - length
        keep = min(int(expected.lengths[row]), whole)
        np.testing.assert_array_equal(done.gen_ids[row, :keep], expected.tokens[row, :keep])


@pytest.mark.parametrize("branching", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rollout_is_that_of_recomputing_everything(branching: bool) -> None:
    """Aligned prompts and no look at other blocks: the same decisions, canvases and costs."""
    cached, plain = make_backbone(SHARED, block_cache=True), make_backbone(SHARED)
    params, canvas = lively(cached), canvas_of([4, 8, 4, 8])
    settings = toy_settings(
        max_steps=10,
        gen_len=GEN,
        use_hidden=False,
        selection_mode="fixed:O_SCOPE",
        branching=branching,
        branch_k=1,
        planned_steps=(1,) if branching else (),
        stop_at_eos=False,
    )
    agent, tables = toy_agent(settings, cached, "plus"), toy_tables()

    def run(backbone: Backbone) -> Any:
        rollout = jax.jit(functools.partial(rollout_plus, backbone, settings, tables))
        return rollout(params, agent, canvas, jax.random.key(0))

    found, expected = run(cached), run(plain)
    np.testing.assert_array_equal(found.num_steps, expected.num_steps)
    # Operators look at places outside the block too, which caches do not score: only the last,
    # completing step may write other tokens there.
    first = slice(0, 3)
    np.testing.assert_array_equal(
        found.steps.gen_before[:, first], expected.steps.gen_before[:, first]
    )


def test_rows_do_not_depend_on_their_neighbours() -> None:
    backbone = make_backbone(SHARED, block_cache=True)
    params = lively(backbone)
    settings = toy_settings(max_steps=8, gen_len=GEN, selection_mode="sample")
    agent, tables = toy_agent(settings, backbone, "plus"), toy_tables()
    rollout = jax.jit(functools.partial(rollout_plus, backbone, settings, tables))
    lengths = [1, 5, 8, 3]
    together = rollout(params, agent, canvas_of(lengths), jax.random.key(0))
    for row, length in enumerate(lengths):
        alone = rollout(params, agent, canvas_of([length]), jax.random.key(0))
        np.testing.assert_array_equal(together.final_ids[row], alone.final_ids[0])
        np.testing.assert_array_equal(together.steps.operator[row], alone.steps.operator[0])
        assert not np.any(np.asarray(alone.final_ids[0]) == SPECIAL.mask_id) or np.any(
            np.asarray(alone.final_ids[0]) == SPECIAL.eos_id
        )


def test_networks_that_do_not_write_block_after_block_are_refused() -> None:
    for mode in ("blockwise", "single_block"):
        with pytest.raises(UserError, match=f"score_mode=left_to_right, not {mode}"):
            make_backbone(dataclasses.replace(NETWORK, score_mode=mode), block_cache=True)


def test_the_config_refuses_what_caches_cannot_do() -> None:
    """They pass no gradient, and the original's rules rewrite any position."""
    for key, value, shown in (
        ("finetune_mode", "full", "not plus and full"),
        ("algo", "paper", "not paper and none"),
    ):
        config = get_default_config()
        config.backbone.block_cache, config.finetune_mode = True, "none"
        config.update({key: value})
        with pytest.raises(UserError, match=shown):
            finalize(config)
