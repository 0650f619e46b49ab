"""The convolution over a grid, by itself and inside the Universal Transformer's transition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from halting_jax.grid_conv import grid_conv, init_grid_conv
from halting_jax.types import Batch, TaskShape
from halting_jax.universal_transformer import UtSettings, make_universal_transformer
from halting_jax.ut_torch_names import ut_rules

SETTINGS = UtSettings(
    hidden_size=8,
    embedding_size=8,
    heads=2,
    key_depth=8,
    value_depth=8,
    filter_size=12,
    max_hops=3,
    pos="2d",
    conv_size=3,
)
SIDE, CLASSES = 4, 6
SHAPE = TaskShape("grid", SIDE * SIDE, CLASSES, classes=CLASSES)


def _reference(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's grouped convolution."""
    side, channels = round(x.shape[1] ** 0.5), x.shape[2]
    out = jax.lax.conv_general_dilated(
        x.reshape(-1, side, side, channels),
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )
    return out.reshape(x.shape)


@pytest.mark.parametrize(("size", "side"), [(1, 3), (3, 4), (5, 3), (5, 6)])
def test_values_and_gradients_of_a_depthwise_convolution(size: int, side: int) -> None:
    keys = jax.random.split(jax.random.key(size), 3)
    x = jax.random.normal(keys[0], (2, side * side, 7))
    kernel = jax.random.normal(keys[1], (size, size, 7))
    slope = jax.random.normal(keys[2], x.shape)
    ours, pull = jax.vjp(grid_conv, x, kernel)
    theirs, wanted = jax.vjp(_reference, x, kernel)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for a, b in zip(pull(slope), wanted(slope), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_reduced_precision() -> None:
    """Values in x's dtype, the kernel's gradient in the kernel's."""
    x = jax.random.normal(jax.random.key(0), (2, 9, 4)).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4))
    out, pull = jax.vjp(grid_conv, x, kernel)
    into_x, into_kernel = pull(jnp.ones_like(out))
    assert (out.dtype, into_x.dtype, into_kernel.dtype) == (x.dtype, x.dtype, kernel.dtype)
    np.testing.assert_allclose(
        out.astype(np.float32), _reference(x.astype(jnp.float32), kernel), atol=0.1
    )


def test_starts_near_the_identity() -> None:
    kernel = np.asarray(init_grid_conv(jax.random.key(0), (3, 3, 50)))
    assert abs(kernel[1, 1].mean() - 1) < 0.1 and np.abs(kernel[0]).max() <= 1 / 3


def _batch(tokens: np.ndarray, mask: np.ndarray) -> Batch:
    rows = len(tokens)
    return Batch(
        inputs=jnp.asarray(tokens, jnp.int32),
        input_mask=jnp.asarray(mask),
        targets=jnp.zeros(tokens.shape, jnp.int32),
        target_mask=jnp.asarray(mask),
        decoder_inputs=jnp.zeros((rows, 0), jnp.int32),
        difficulty=jnp.zeros(rows, jnp.int32),
    )


def test_transition_reads_neighbours_and_no_padding() -> None:
    """Attention switched off: what a cell becomes after one hop depends on its neighbours alone."""
    model = make_universal_transformer(SHAPE, dataclasses.replace(SETTINGS, max_hops=1))
    params = model.init(jax.random.key(0))
    attention = params["encoder"]["block"]["attention"]
    silent = attention | {"output": jax.tree.map(jnp.zeros_like, attention["output"])}
    block = params["encoder"]["block"] | {"attention": silent}
    params = params | {"encoder": params["encoder"] | {"block": block}}
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, CLASSES, (1, SIDE**2)), np.ones((1, SIDE**2), bool)
    mask[0, -3:] = False
    run = jax.jit(model.apply)
    logits = run(params, _batch(tokens, mask)).logits
    for cell in range(SIDE**2):
        other = tokens.copy()
        other[0, cell] = (other[0, cell] + 1) % CLASSES
        moved = np.abs(run(params, _batch(other, mask)).logits - logits).max(axis=-1)[0] > 1e-7
        row, column = divmod(cell, SIDE)
        near = [
            mask[0, cell] and abs(i // SIDE - row) <= 1 and abs(i % SIDE - column) <= 1
            for i in range(SIDE**2)
        ]
        np.testing.assert_array_equal(moved[mask[0]], np.asarray(near)[mask[0]])


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (SHAPE, 2),
        (TaskShape("grid", 8, CLASSES, classes=CLASSES), 3),
        (TaskShape("vector", 9, 1), 3),
    ],
)
def test_what_does_not_fit_is_refused(shape: TaskShape, size: int) -> None:
    settings = dataclasses.replace(SETTINGS, conv_size=size, pos="1d")
    with pytest.raises(UserError, match=r"ut\.conv_size"):
        make_universal_transformer(shape, settings)


def test_the_original_has_no_convolution() -> None:
    with pytest.raises(UserError, match="conv_size"):
        ut_rules(SHAPE, SETTINGS)
