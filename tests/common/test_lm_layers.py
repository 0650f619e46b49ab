"""Products of 16-bit operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.lm import layers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_products_are_summed_in_float32_and_rounded_once(dtype, rows):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(rows, 300)), dtype)
    y = jnp.asarray(rng.normal(size=(300, 7)), dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    wide = layers.matmul(x, y, round_to=jnp.float32)
    assert wide.dtype == jnp.float32 and wide.shape == (rows, 7)
    np.testing.assert_allclose(wide, exact, atol=1e-4)
    narrow = layers.matmul(x, y)
    assert narrow.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(narrow, wide.astype(dtype))


def test_a_dense_map_rounds_to_what_is_asked():
    x = jnp.ones((2, 1, 5), jnp.bfloat16)
    kernel = jnp.full((5, 3, 2), 0.3)
    y = layers.dense(x, kernel)
    assert y.shape == (2, 1, 3, 2) and y.dtype == jnp.bfloat16
    y = layers.dense(x, kernel, round_to=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 5 * float(jnp.bfloat16(0.3)), rtol=1e-6)


def test_gradients_of_16_bit_products():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.bfloat16)
    y = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.bfloat16)

    def loss(x, y):
        return jnp.sum(layers.matmul(x, y).astype(jnp.float32) ** 2)

    found = jax.grad(loss, argnums=(0, 1))(x, y)
    wanted = jax.grad(loss, argnums=(0, 1))(x.astype(jnp.float32), y.astype(jnp.float32))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.03 * float(jnp.abs(b).max()))
