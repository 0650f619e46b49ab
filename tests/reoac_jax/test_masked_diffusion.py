"""Noise levels, noising, and the training loss against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.masked_diffusion import (
    MIN_T,
    blockwise_t,
    canvas_loss,
    noise_canvas,
    stratified_t,
)
from tests.reoac_jax.toy_setting import (
    GEN,
    SPECIAL,
    made_up_targets,
    toy_backbone,
    toy_canvas,
    toy_params,
)

KEY = jax.random.key(11)
ROWS = [0, 1, 2, 3, 4, 5, 9, 10]


def test_levels_cover_all_strata() -> None:
    n = 16
    draw = jax.jit(lambda key: stratified_t(key, n, jnp.arange(n)))
    first = []
    for seed in range(8):
        t = np.asarray(draw(jax.random.key(seed)))
        assert (t >= MIN_T).all() and (t <= 1.0).all()
        u = np.sort((t - MIN_T) / (1.0 - MIN_T))
        assert np.floor(u * n + 1e-4).astype(int).tolist() == list(range(n))
        np.testing.assert_allclose(np.diff(u), 1.0 / n, atol=1e-5)
        first.append(t[0])
    assert np.std(first) > 0.1  # a row gets another stratum at every step


def test_levels_of_a_part_of_the_batch() -> None:
    whole = stratified_t(KEY, 8, jnp.arange(8))
    np.testing.assert_array_equal(stratified_t(KEY, 8, jnp.arange(4, 8)), whole[4:])


def test_block_levels() -> None:
    t = np.asarray(blockwise_t(KEY, 6, jnp.arange(6), length=10, block_size=4))
    assert t.shape == (6, 10)
    for block in (slice(0, 4), slice(4, 8), slice(8, 10)):
        assert (t[:, block] == t[:, block][:, :1]).all()
        np.testing.assert_allclose(np.diff(np.sort(t[:, block.start])), (1 - MIN_T) / 6, atol=1e-5)
    assert (t[:, 0] != t[:, 4]).any()


def test_noised_canvas() -> None:
    target = made_up_targets(list(range(300)))
    for level in (MIN_T, 0.3, 1.0):
        ids, hidden = map(np.asarray, noise_canvas(KEY, jnp.full(300, level), target, 29))
        assert hidden.any(axis=1).all()
        assert (ids[hidden] == 29).all() and (ids[~hidden] == np.asarray(target)[~hidden]).all()
        # One position at least is hidden, which lifts the mean a little above the level.
        expected = level + (1 - level) ** GEN / GEN
        assert hidden.mean() == pytest.approx(expected, abs=0.03)
    per_token = jnp.broadcast_to(jnp.arange(GEN) < 2, target.shape).astype(jnp.float32)
    _, hidden = map(np.asarray, noise_canvas(KEY, per_token, target, 29))
    assert hidden[:, :2].all() and not hidden[:, 2:].any()


def test_loss_equals_numpy_and_prompts_stay_clean() -> None:
    backbone = toy_backbone()
    params, canvas, target = toy_params(backbone), toy_canvas(ROWS), made_up_targets(ROWS)
    canvas = dataclasses.replace(
        canvas, row_id=jnp.arange(8, dtype=jnp.uint32) + 16
    )  # folded into 0..7
    loss, metrics = jax.jit(lambda p: canvas_loss(p, backbone, canvas, target, KEY, 8))(params)

    t_key, noise_key = jax.random.split(KEY)
    t = np.asarray(stratified_t(t_key, 8, jnp.arange(8)))
    draw = np.asarray(jax.random.uniform(noise_key, target.shape))
    numbers = {name: np.asarray(value, np.float64) for name, value in params.items()}
    total = count = right = 0.0
    for row, level in enumerate(t):
        length = int(canvas.prompt_len[row])
        hidden = draw[row] < level
        if not hidden.any():
            hidden[draw[row].argmin()] = True
        gold = np.asarray(target[row])
        tokens = [
            *np.asarray(canvas.tokens[row, :length]),
            *np.where(hidden, SPECIAL.mask_id, gold),
        ]
        embedded = numbers["embed"][tokens]
        mixed = embedded + numbers["position"][: len(tokens)] + embedded.mean(axis=0)
        states = np.tanh(mixed + level * numbers["time"])[length:]
        logits = states @ numbers["kernel"] + numbers["bias"]
        logits[:, SPECIAL.mask_id] = -np.inf
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= log_probs[np.arange(GEN), gold][hidden].sum()
        right += (log_probs.argmax(axis=1) == gold)[hidden].sum()
        count += hidden.sum()
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    assert float(metrics["pretrain/accuracy"]) == pytest.approx(right / count, abs=1e-6)
    assert float(metrics["pretrain/masked_share"]) == pytest.approx(count / target.size, abs=1e-6)


def test_canvas_content_and_padding_do_not_matter() -> None:
    backbone = toy_backbone()
    params, target = toy_params(backbone), made_up_targets(ROWS)
    call = jax.jit(lambda canvas: canvas_loss(params, backbone, canvas, target, KEY, 8)[0])
    clean = toy_canvas(ROWS)
    dirty = toy_canvas(ROWS, padding=5).with_gen(jnp.full((8, GEN), 7, jnp.int32))
    np.testing.assert_allclose(call(clean), call(dirty), rtol=1e-6)
