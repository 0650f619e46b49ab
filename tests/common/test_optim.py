"""AdamW against a plain NumPy version and PyTorch; schedules; averaging."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.optim import ema_update, make_optimizer, make_schedule


def run_steps(tx: optax.GradientTransformation, start: np.ndarray, grads: np.ndarray) -> np.ndarray:
    params = {"w": jnp.asarray(start)}
    state = tx.init(params)

    @jax.jit
    def step(params: dict, state: optax.OptState, grad: jax.Array) -> tuple[dict, optax.OptState]:
        updates, state = tx.update({"w": grad}, state, params)
        return optax.apply_updates(params, updates), state

    for grad in grads:
        params, state = step(params, state, jnp.asarray(grad))
    return np.asarray(params["w"])


def plain_adamw(start: np.ndarray, grads: np.ndarray, **kw: float) -> np.ndarray:
    p = start.astype(np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads.astype(np.float64), start=1):
        if kw["clip"]:
            g = g * min(1.0, kw["clip"] / np.sqrt((g**2).sum()))
        m = kw["b1"] * m + (1 - kw["b1"]) * g
        v = kw["b2"] * v + (1 - kw["b2"]) * g**2
        update = (m / (1 - kw["b1"] ** t)) / (np.sqrt(v / (1 - kw["b2"] ** t)) + kw["eps"])
        p = p - kw["lr"] * (update + kw["wd"] * p)
    return p


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_adamw_is_the_formula(clip: float, wd: float) -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(size=6).astype(np.float32)
    grads = rng.normal(size=(5, 6)).astype(np.float32)
    tx = make_optimizer(0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=wd, grad_clip=clip)
    expected = plain_adamw(start, grads, lr=0.05, b1=0.8, b2=0.95, eps=1e-3, wd=wd, clip=clip)
    np.testing.assert_allclose(run_steps(tx, start, grads), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.torch
def test_defaults_are_those_of_torch() -> None:
    import torch

    rng = np.random.default_rng(1)
    start = rng.normal(size=5).astype(np.float32)
    grads = rng.normal(size=(4, 5)).astype(np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    for grad in grads:
        weight.grad = torch.tensor(grad)
        optimizer.step()
    ours = run_steps(make_optimizer(1e-2), start, grads)
    np.testing.assert_allclose(ours, weight.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_decay_mask_leaves_parameters_out() -> None:
    tx = make_optimizer(0.1, weight_decay=0.5, decay_mask={"a": True, "b": False})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0.0)


def test_schedules() -> None:
    constant = make_schedule(0.3)
    assert float(constant(0)) == float(constant(1000)) == np.float32(0.3)
    warm = make_schedule(1.0, warmup=4)
    np.testing.assert_allclose([warm(n) for n in range(6)], [0.25, 0.5, 0.75, 1, 1, 1])
    cosine = make_schedule(2.0, warmup=2, schedule="cosine", total_steps=10)
    np.testing.assert_allclose(
        [cosine(n) for n in (0, 1, 2, 6, 10, 99)], [1, 2, 2, 1, 0, 0], atol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "learning rate"),
        ({"learning_rate": 1.0, "betas": (0.9, 1.0)}, "betas"),
        ({"learning_rate": 1.0, "eps": 0.0}, "eps"),
        ({"learning_rate": 1.0, "weight_decay": -0.1}, "weight decay"),
        ({"learning_rate": 1.0, "grad_clip": -1.0}, "grad_clip"),
        ({"learning_rate": 1.0, "schedule": "linear"}, "schedule must be one of"),
        ({"learning_rate": 1.0, "schedule": "cosine"}, "total_steps"),
        ({"learning_rate": 1.0, "warmup": -1}, "warmup"),
    ],
)
def test_bad_values(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_optimizer(**arguments)


def test_average_follows_the_early_rule_then_the_decay() -> None:
    average = {"w": jnp.zeros(2), "h": jnp.zeros(2, jnp.bfloat16)}
    params = {"w": jnp.ones(2), "h": jnp.ones(2, jnp.bfloat16)}
    first = ema_update(average, params, 0, 0.99)
    np.testing.assert_allclose(first["w"], 0.9, rtol=1e-6)  # d = 1/10
    later = ema_update(average, params, 10**6, 0.99)
    np.testing.assert_allclose(later["w"], 0.01, rtol=1e-5)
    assert first["h"].dtype == jnp.bfloat16
