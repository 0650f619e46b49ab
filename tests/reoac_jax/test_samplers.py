"""Confidence decoding against a loop over rows in NumPy."""

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.samplers import Decoded, confidence_decode, top_token
from tests.reoac_jax.toy_setting import GEN, SPECIAL, toy_backbone, toy_canvas, toy_params

BACKBONE = toy_backbone()
PARAMS = toy_params(BACKBONE)
ROWS = [0, 2, 5]


def partly_written(rows: list[int]) -> Canvas:
    """Canvases of which row i already holds its first i tokens."""
    canvas = toy_canvas(rows)
    place = np.arange(GEN) < np.arange(len(rows))[:, None]
    return canvas.with_gen(jnp.where(place, 3, SPECIAL.mask_id).astype(jnp.int32))


def decode(backbone: Backbone, canvas: Canvas, **options: Any) -> Decoded:
    call = jax.jit(functools.partial(confidence_decode, backbone, **options))
    return jax.device_get(call(PARAMS, canvas))


@jax.jit
def probabilities(canvas: Canvas, gen_ids: jax.Array, t: jax.Array) -> jax.Array:
    hidden = BACKBONE.score(PARAMS, (), canvas, gen_ids, t).hidden
    return jax.nn.softmax(BACKBONE.logits(PARAMS, hidden), axis=-1)


def expected(
    canvas: Canvas, row: int, num_steps: int, threshold: float | None
) -> tuple[list[int], list[int]]:
    """Final ids of a row and how many positions each of its passes wrote."""
    gen = np.asarray(canvas.gen_ids())[row].tolist()
    counts = []
    for step in range(num_steps):
        masked = [j for j in range(GEN) if gen[j] == SPECIAL.mask_id]
        if not masked:
            break
        batch = jnp.broadcast_to(jnp.asarray(gen, jnp.int32), (len(ROWS), GEN))
        level = jnp.full(len(ROWS), len(masked) / GEN)
        probs = np.asarray(probabilities(canvas, batch, level))[row]
        order = sorted(masked, key=lambda j: -probs[j].max())
        left = num_steps - step
        if threshold is None:
            chosen = order[: math.ceil(len(masked) / left)]
        else:
            sure = [j for j in order if probs[j].max() >= threshold]
            chosen = order if left == 1 else (sure or order[:1])
        for j in chosen:
            gen[j] = int(probs[j].argmax())
        counts.append(len(chosen))
    return gen, counts


@pytest.mark.parametrize(("num_steps", "threshold"), [(4, None), (GEN, 0.7), (2, 2.0)])
def test_a_loop_over_rows_agrees(num_steps: int, threshold: float | None) -> None:
    canvas = partly_written(ROWS)
    found = decode(BACKBONE, canvas, num_steps=num_steps, threshold=threshold)
    spread = set()
    for row in range(len(ROWS)):
        gen, counts = expected(canvas, row, num_steps, threshold)
        assert found.gen_ids[row].tolist() == gen
        assert int(found.forwards[row]) == len(counts)
        spread.add(tuple(counts))
    assert (found.gen_ids != SPECIAL.mask_id).all()
    assert len(spread) > 1  # rows with different numbers of masks take different paces


def test_even_share_of_what_remains() -> None:
    assert expected(partly_written(ROWS), 0, 4, None)[1] == [2, 2, 1, 1]
    # Nothing reaches a threshold above 1: one position a pass, the rest at the last one.
    assert expected(partly_written(ROWS), 0, 3, 2.0)[1] == [1, 1, 4]


def test_nothing_to_write() -> None:
    canvas = toy_canvas(ROWS).with_gen(jnp.full((3, GEN), 4, jnp.int32))
    found = decode(BACKBONE, canvas, num_steps=4)
    assert (found.gen_ids == 4).all() and not found.forwards.any()


def test_last_pass_completes_closed_positions() -> None:
    """A backbone that opens two positions at a time cannot leave masks behind."""

    def score(*arguments: Any) -> Any:
        scores, gen_ids = BACKBONE.score(*arguments), arguments[3]
        first = jnp.argmax(gen_ids == SPECIAL.mask_id, axis=1)[:, None] // 2
        return scores._replace(editable=jnp.arange(GEN) // 2 == first)

    limited = dataclasses.replace(BACKBONE, score=cast(Any, score))
    canvas = toy_canvas(ROWS)
    found = decode(limited, canvas, num_steps=2)
    assert (found.gen_ids != SPECIAL.mask_id).all() and (found.forwards == 2).all()
    one = decode(limited, canvas, num_steps=GEN)
    level = jnp.ones(len(ROWS))
    first = np.asarray(probabilities(canvas, canvas.gen_ids(), level))[:, :2].max(axis=2)
    place = first.argmax(axis=1)
    best = np.asarray(probabilities(canvas, canvas.gen_ids(), level)).argmax(axis=2)
    # The first token comes from the open pair although others were surer.
    rows = np.arange(len(ROWS))
    assert (one.gen_ids[rows, place] == best[rows, place]).all()


def test_top_token() -> None:
    logits = jnp.asarray([[1.0, 3.0, 3.0], [0.0, -1e9, -1e9]])
    token, share = top_token(logits)
    assert token.tolist() == [1, 0]
    np.testing.assert_allclose(share, np.asarray(jax.nn.softmax(logits)).max(axis=1), rtol=1e-6)
