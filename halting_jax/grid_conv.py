"""Depth-wise convolution over a square grid of positions, as a sum of shifted products.

Written out because XLA's grouped convolution is an order of magnitude slower on a CPU, forwards and
backwards; on a GPU the shifted products fuse into one pass over memory.
"""

import functools
import math

import jax
import jax.numpy as jnp


def init_grid_conv(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Kernel [k, k, C] that passes its input on, plus small noise for the neighbours."""
    size = shape[0]
    noise = jax.random.uniform(key, shape, jnp.float32, -1.0 / size, 1.0 / size)
    return noise.at[size // 2, size // 2].add(1.0)


@jax.custom_vjp
def grid_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each channel of a grid convolved with its own kernel, zeros outside of the grid.

    y[b, (r, c), d] = sum_ij kernel[i, j, d] x[b, (r + i - h, c + j - h), d], h = (k - 1) / 2

    Args:
      x: [B, S, C] with S a square number, positions row by row; zero what is no part of a row.
      kernel: [k, k, C], k odd.

    Returns:
      [B, S, C] in x's dtype.
    """
    size = kernel.shape[0]
    padded, side = _padded(x, size), math.isqrt(x.shape[1])
    weights = kernel.astype(x.dtype)
    terms = [_window(padded, i, j, side) * weights[i, j] for i in range(size) for j in range(size)]
    return functools.reduce(jnp.add, terms).reshape(x.shape)


def _padded(x: jax.Array, size: int) -> jax.Array:
    """[B, S, C] -> [B, side + k - 1, side + k - 1, C] with a border of zeros."""
    side, border = math.isqrt(x.shape[1]), (size // 2, size // 2)
    grid = x.reshape(x.shape[0], side, side, x.shape[-1])
    return jnp.pad(grid, ((0, 0), border, border, (0, 0)))


def _window(padded: jax.Array, row: int, column: int, side: int) -> jax.Array:
    return padded[:, row : row + side, column : column + side]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return grid_conv(x, kernel), (x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dx convolves the slope with the turned kernel; dkernel[i, j] = sum of window(i, j) * slope.

    By itself JAX would add up k^2 padded copies of x's slope instead.
    """
    x, kernel = kept
    size, side = kernel.shape[0], math.isqrt(x.shape[1])
    padded = _padded(x, size)
    grid = slope.reshape(x.shape[0], side, side, x.shape[-1])
    # Sums over positions are kept in float32.
    sums = [
        jnp.einsum(
            "brcd,brcd->d",
            _window(padded, i, j, side),
            grid,
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )
        for i in range(size)
        for j in range(size)
    ]
    into_kernel = jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)
    return grid_conv(slope, kernel[::-1, ::-1]), into_kernel


grid_conv.defvjp(_forward, _backward)
