"""The head on counted positions only gives the value and gradients of the head on all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax import counted_loss as module
from reoac_jax.counted_loss import counted_loss
from reoac_jax.losses import token_log_probs

TOTAL, WIDTH, VOCAB = 11, 5, 7


def head(params: dict, hidden: jax.Array) -> jax.Array:
    return hidden @ params["kernel"]


def plain(params: dict, hidden: jax.Array, ids: jax.Array, weight: jax.Array) -> jax.Array:
    return -jnp.sum(weight * token_log_probs(head(params, hidden), ids))


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int, share: float) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    rng = np.random.default_rng(chunk)
    params = {"kernel": rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)}
    hidden = rng.normal(size=(TOTAL, WIDTH)).astype(np.float32)
    ids = rng.integers(0, VOCAB, TOTAL).astype(np.int32)
    weight = np.where(rng.random(TOTAL) < share, rng.normal(size=TOTAL), 0.0).astype(np.float32)

    def ours(params: dict, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, nll = counted_loss(head, params, hidden, ids, weight)
        return 3.0 * value, nll

    gradient = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))
    (value, nll), found = gradient(params, hidden)
    wanted_value, wanted = jax.value_and_grad(plain, argnums=(0, 1))(params, hidden, ids, weight)
    np.testing.assert_allclose(value, 3.0 * wanted_value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(ours)(params, hidden)[0], value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 3.0 * b, rtol=1e-4, atol=1e-5), found, wanted
    )
    counted = weight != 0
    log_probs = token_log_probs(head(params, hidden), ids)
    np.testing.assert_allclose(nll, np.where(counted, -log_probs, 0.0), rtol=1e-5, atol=1e-5)


def test_uncounted_rows_may_hold_anything() -> None:
    params = {"kernel": jnp.ones((WIDTH, VOCAB))}
    hidden = jnp.full((2, WIDTH), jnp.nan).at[0].set(1.0)
    weight = jnp.asarray([1.0, 0.0])
    gradient = jax.grad(lambda p: counted_loss(head, p, hidden, jnp.zeros(2, int), weight)[0])
    assert np.isfinite(gradient(params)["kernel"]).all()
