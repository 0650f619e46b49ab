"""The canvas layout and the score modes of the forward contract."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone import e2d2
from reoac_jax.backbone.base import Backbone, Canvas, Scores, masked_mean
from tests.reoac_jax.toy_setting import (
    GEN,
    PROMPT,
    SPECIAL,
    VOCAB,
    tiny_e2d2,
    toy_backbone,
    toy_canvas,
)

ROWS = [0, 3, 5]
LENGTHS = [1, 4, 6]


def test_layout() -> None:
    canvas = toy_canvas(ROWS, padding=5)
    assert (canvas.prompt_width, canvas.gen_len) == (PROMPT, GEN)
    gen_ids = jnp.arange(3 * GEN, dtype=jnp.int32).reshape(3, GEN)
    filled = canvas.with_gen(gen_ids)
    assert filled.gen_ids().tolist() == gen_ids.tolist()
    assert (canvas.gen_ids() == SPECIAL.mask_id).all()  # the first one is unchanged
    for row, length in enumerate(LENGTHS):
        width = PROMPT + GEN
        assert canvas.gen_index[row].tolist() == list(range(length, length + GEN))
        assert canvas.prompt_mask[row].tolist() == [j < length for j in range(PROMPT)]
        assert canvas.context_mask[row].tolist() == [j < length for j in range(width)]
        assert canvas.attention_mask[row].tolist() == [j < length + GEN for j in range(width)]
        before, after = np.asarray(canvas.tokens[row]), np.asarray(filled.tokens[row])
        np.testing.assert_array_equal(before[:length], after[:length])
        np.testing.assert_array_equal(after[length : length + GEN], gen_ids[row])
        np.testing.assert_array_equal(before[length + GEN :], after[length + GEN :])
        np.testing.assert_array_equal(canvas.prompt_ids[row], before[:PROMPT])


def test_masked_mean() -> None:
    x = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.asarray([[True, False, True], [False] * 3])
    np.testing.assert_allclose(masked_mean(x, mask), [[2.0, 3.0], [0.0, 0.0]])


def test_suppressed_mask() -> None:
    backbone = toy_backbone()
    params = backbone.init(jax.random.key(0))
    hidden = jnp.ones((2, 3, backbone.hidden_size))
    logits = backbone.logits(params, hidden)
    assert logits.shape == (2, 3, VOCAB)
    assert (logits[..., SPECIAL.mask_id] == e2d2.NEG_INF).all()
    plain = dataclasses.replace(backbone, suppress_mask=False)
    assert plain.suppress_id == -1
    np.testing.assert_array_equal(plain.logits(params, hidden), backbone.head(params, hidden))


@pytest.fixture(scope="module", params=["single_block", "blockwise", "left_to_right"])
def scored(request: pytest.FixtureRequest) -> tuple[Backbone, Scores, Scores, Scores]:
    """Scores of a batch, of its rows among others with other padding, and of one changed token."""
    backbone = tiny_e2d2(request.param)
    params = jax.jit(backbone.init)(jax.random.key(0))

    @jax.jit
    def score(canvas: Canvas, gen_ids: jax.Array) -> Scores:
        context = backbone.begin(params, canvas)
        return backbone.score(params, context, canvas, gen_ids, jnp.ones(3))

    gen_ids = np.full((3, GEN), SPECIAL.mask_id, np.int32)
    gen_ids[:, 0] = 4
    changed = gen_ids.copy()
    changed[:, 1] = 9
    other = toy_canvas([8, 3, 0], padding=2)
    return (
        backbone,
        score(toy_canvas(ROWS), jnp.asarray(gen_ids)),
        score(other, jnp.asarray(gen_ids)),
        score(toy_canvas(ROWS), jnp.asarray(changed)),
    )


def test_rows_are_independent_of_padding(scored: tuple) -> None:
    backbone, first, other, _ = scored
    assert first.hidden.shape == (3, GEN, backbone.hidden_size)
    for mine, theirs in ((0, 2), (1, 1)):
        for field in ("hidden", "pooled_prompt", "pooled_canvas"):
            left, right = getattr(first, field)[mine], getattr(other, field)[theirs]
            np.testing.assert_allclose(left, right, atol=1e-5, err_msg=field)


def test_pools_are_means_of_states(scored: tuple) -> None:
    backbone, first, _, changed = scored
    np.testing.assert_allclose(first.pooled_canvas, first.hidden.mean(axis=1), atol=1e-5)
    same_prompt = np.allclose(first.pooled_prompt, changed.pooled_prompt, atol=1e-6)
    # Only the single block has a prompt state that cannot depend on the canvas behind it.
    assert same_prompt or backbone.score_mode != "single_block"
    assert not np.allclose(first.pooled_canvas, changed.pooled_canvas, atol=1e-6)


def test_which_positions_see_a_change(scored: tuple) -> None:
    """Canvas column 1 changed: everything sees it in one block, earlier blocks never do."""
    backbone, first, _, changed = scored
    moved = np.abs(np.asarray(first.hidden - changed.hidden)).max(axis=2) > 1e-6
    for row, length in enumerate(LENGTHS):
        if backbone.score_mode == "single_block":
            assert moved[row].all()
        else:
            size = backbone.block_size
            own = (length + 1) // size
            block = (length + np.arange(GEN)) // size
            assert not moved[row][block < own].any() and moved[row][block == own].all()


def test_open_positions(scored: tuple) -> None:
    backbone, first, _, _ = scored
    if backbone.score_mode != "left_to_right":
        assert first.editable is None
        return
    for row, length in enumerate(LENGTHS):
        block = (length + np.arange(GEN)) // backbone.block_size
        # Column 0 is written, column 1 is the first mask: its block is open.
        assert first.editable[row].tolist() == (block == block[1]).tolist()
