"""Noise schedules, times and corruption."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from reoac_jax.backbone import noise

each_schedule = pytest.mark.parametrize("name", noise.SCHEDULES)
GRID = jnp.linspace(0.05, 0.95, 19)


@each_schedule
def test_ends_of_the_schedule(name):
    alpha = noise.make_schedule(name).alpha(jnp.asarray([0.0, 1.0]))
    np.testing.assert_allclose(alpha, [1.0, 0.0], atol=2e-3)
    assert np.all(np.diff(noise.make_schedule(name).alpha(GRID)) < 0)


@each_schedule
def test_derivative_against_autodiff(name):
    schedule = noise.make_schedule(name)
    slope = jax.vmap(jax.grad(schedule.alpha))(GRID)
    np.testing.assert_allclose(schedule.alpha_prime(GRID), slope, rtol=1e-4)


@each_schedule
def test_inverse_and_sigma(name):
    schedule = noise.make_schedule(name)
    # geometric: alpha near 1 has lost digits of sigma.
    np.testing.assert_allclose(schedule.inverse(schedule.alpha(GRID)), GRID, atol=3e-5)
    np.testing.assert_allclose(jnp.exp(-schedule.sigma(GRID)), schedule.alpha(GRID), rtol=1e-5)
    slope = jax.vmap(jax.grad(schedule.sigma))(GRID)
    np.testing.assert_allclose(schedule.sigma_prime(GRID), slope, rtol=1e-4)


def test_unknown_schedule():
    with pytest.raises(UserError, match="'quadratic'.*linear"):
        noise.make_schedule("quadratic")


def test_times_hit_every_slice_once():
    times = noise.sample_times(jax.random.key(0), batch=8, blocks=5, block_size=3)
    assert times.shape == (8, 15)
    per_block = np.asarray(times).reshape(8, 5, 3)
    assert np.all(per_block == per_block[..., :1])
    slices = np.floor((per_block[..., 0] - noise.TIME_EPS) / (1 - noise.TIME_EPS) * 40)
    assert sorted(slices.ravel().astype(int)) == list(range(40))


def test_times_of_a_split_batch_are_those_of_the_whole():
    uniform = jax.random.uniform(jax.random.key(1), (6, 4))
    whole = noise.spread_times(uniform)
    parts = [noise.spread_times(uniform[i : i + 2], row_offset=i, total_rows=6) for i in (0, 2, 4)]
    np.testing.assert_allclose(whole, jnp.concatenate(parts), rtol=1e-6)


def test_corruption_rate_and_protected_positions():
    ids = jnp.ones((64, 40), jnp.int32)
    prompt = jnp.arange(40)[None] < 10
    alpha = jnp.full(ids.shape, 0.3)
    noisy = noise.corrupt(
        jax.random.key(2), ids, alpha, mask_id=9, keep_mask=jnp.broadcast_to(prompt, ids.shape)
    )
    assert np.all(noisy[:, :10] == 1)
    assert abs(float(jnp.mean(noisy[:, 10:] == 9)) - 0.7) < 0.03
    free = jnp.zeros_like(ids, bool)
    assert np.all(noise.corrupt(jax.random.key(3), ids, alpha * 0, mask_id=9, keep_mask=free)[:, 0])


def test_no_block_is_left_without_a_mask():
    ids = jnp.ones((50, 12), jnp.int32)
    prompt = jnp.broadcast_to(jnp.arange(12) < 4, ids.shape)
    noisy = noise.noise_blocks(
        jax.random.key(4), ids, prompt, jnp.full(ids.shape, 0.95), mask_id=9, block_size=4
    )
    masked = np.asarray(noisy == 9).reshape(50, 3, 4).sum(-1)
    assert np.all(masked[:, 0] == 0) and np.all(masked[:, 1:] >= 1)
    assert set(masked[:, 1:].ravel()) == {1, 2, 3, 4}  # sometimes every token, sometimes one


def test_posterior_is_a_distribution():
    logits = jax.random.normal(jax.random.key(5), (3, 7)).at[:, 6].set(-1e9)
    q = noise.reverse_posterior(jax.nn.log_softmax(logits), jnp.float32(0.2), jnp.float32(0.5), 6)
    np.testing.assert_allclose(q.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(q[:, 6], 0.5 / 0.8, rtol=1e-5)


def test_likelihood_bound_of_the_linear_schedule():
    # The closed form of the linear schedule is -a / t.
    a = -jax.random.uniform(jax.random.key(6), (2, 19))
    t = jnp.broadcast_to(GRID, a.shape)
    bound = noise.likelihood_bound(a, noise.make_schedule("linear"), t)
    np.testing.assert_allclose(bound, -a / t, rtol=1e-4)
    weight = jnp.ones_like(a).at[1, 5:].set(0)
    want = (bound[0].mean() + bound[1, :5].mean()) / 2
    np.testing.assert_allclose(noise.mean_over_rows(bound, weight), want, rtol=1e-5)
