"""The recursive model once more: one example at a time, Python loops, complex rotations."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from halting_jax.trm import TrmSettings
from halting_jax.types import Params


def _norm(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _turn(x: jax.Array, theta: float) -> jax.Array:
    """Channel j and j + K/2 of a head are a complex number, turned by row or column."""
    half, side = x.shape[1] // 2, math.isqrt(len(x))
    cells = np.arange(len(x))
    frequencies = theta ** (-2 * np.arange(half // 2) / half)
    angles = [np.outer(place, frequencies) for place in (cells // side, cells % side)]
    number = (x[:, :half] + 1j * x[:, half:]) * jnp.exp(1j * np.concatenate(angles, axis=1))
    return jnp.concatenate([number.real, number.imag], axis=1)


def _swiglu(p: Params, x: jax.Array) -> jax.Array:
    gate = x @ p["gate"]["kernel"]
    return (gate / (1 + jnp.exp(-gate)) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]


def _network(params: Params, settings: TrmSettings, h: jax.Array) -> jax.Array:
    """f on one example, h [S, H]."""
    for i in range(settings.layers):
        layer = params[f"layer_{i}"]
        if settings.mixer == "mlp":
            mixed = _swiglu(layer["mixer"], h.T).T
        else:
            attn, mixed = layer["attn"], jnp.zeros_like(h)
            for head in range(settings.heads):
                q, k, v = (h @ attn[name]["kernel"][:, head] for name in ("q", "k", "v"))
                q, k = _turn(q, settings.rope_theta), _turn(k, settings.rope_theta)
                scores = jnp.exp(q @ k.T / q.shape[1] ** 0.5)
                weights = scores / scores.sum(axis=1, keepdims=True)
                mixed += weights @ v @ attn["o"]["kernel"][head]
        h = _norm(h + mixed)
        h = _norm(h + _transition(layer, h))
    return h


def _transition(layer: Params, h: jax.Array) -> jax.Array:
    if "conv" not in layer:
        return _swiglu(layer["mlp"], h)
    mlp, kernel = layer["mlp"], layer["conv"]["kernel"]
    inner = jax.nn.silu(h @ mlp["gate"]["kernel"]) * (h @ mlp["up"]["kernel"])
    border, side = len(kernel) // 2, math.isqrt(len(h))
    mixed = []
    for row, column in np.ndindex(side, side):
        cells = [
            kernel[i - row + border, j - column + border] * inner[i * side + j]
            for i, j in np.ndindex(side, side)
            if abs(i - row) <= border and abs(j - column) <= border
        ]
        mixed.append(sum(cells))
    return jnp.stack(mixed) @ mlp["down"]["kernel"]


def plain_step(
    params: Params, settings: TrmSettings, tokens: jax.Array, y: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One supervision step of one example; gradient through the last cycle only."""
    x = params["embedding"][tokens] * settings.hidden_size**0.5
    if settings.pos == "learned":
        x = (x + params["position_embedding"] * settings.hidden_size**0.5) / 2**0.5
    for _ in range(settings.cycles):
        y, z = jax.lax.stop_gradient((y, z))
        for _ in range(settings.inner_cycles):
            z = _network(params, settings, z + x + y)
        y = _network(params, settings, y + z)
    logits = y @ params["readout"]["kernel"] + params["readout"]["bias"]
    q = y.mean(axis=0) @ params["halt"]["kernel"] + params["halt"]["bias"]
    return logits, q[0], y, z
