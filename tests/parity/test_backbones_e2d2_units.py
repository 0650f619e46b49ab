"""Noise schedules, posterior, re-masking and noise times of E2D2 against the recorded ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone import e2d2, noise
from tests.parity.e2d2_cases import arrays, assert_close, e2d2_root

UNITS = e2d2_root() / "units"
# The original returns the pair of this schedule in swapped order.
SWAPPED = ("exponential",)


def recorded_schedules():
    """(name, options, alpha, alpha') of every recorded schedule."""
    data = arrays(UNITS / "noise.npz")
    for key in sorted(data):
        name = key.removesuffix("_first")
        if name == key:
            continue
        first, second = data[f"{name}_first"], data[f"{name}_second"]
        options = {}
        if name.startswith("exp"):
            name, options = "exponential", {"exponent": float(name.removeprefix("exp"))}
        if name in SWAPPED:
            first, second = second, first
        yield pytest.param(name, options, data["t"], first, second, id=name)


@pytest.mark.parametrize(("name", "options", "t", "alpha", "alpha_prime"), recorded_schedules())
def test_schedules(name, options, t, alpha, alpha_prime):
    schedule = noise.make_schedule(name, **options)
    assert_close(schedule.alpha(jnp.asarray(t)), alpha)
    assert_close(schedule.alpha_prime(jnp.asarray(t)), alpha_prime)


def test_subs_and_posterior():
    data = arrays(UNITS / "posterior.npz")
    mask_id = int(data["mask_id"])
    log_probs = e2d2.subs_log_probs(
        jnp.asarray(data["raw_logits"]), jnp.asarray(data["xt"]), mask_id
    )
    assert_close(log_probs, data["log_probs"])
    q = noise.reverse_posterior(log_probs, data["alpha_t"], data["alpha_s"], mask_id)
    assert_close(q, data["q_xs"])


def test_remasking_of_blocks_without_a_mask():
    data = arrays(UNITS / "remask.npz")
    out = noise.remask_empty_blocks(
        jnp.asarray(data["xt_in"]),
        jnp.asarray(data["input_ids"]),
        jnp.asarray(data["context_mask"], bool),
        jnp.asarray(data["num_draw"]),
        jnp.asarray(data["rand_draw"]),
        mask_id=int(data["mask_id"]),
        block_size=int(data["block_size"]),
    )
    np.testing.assert_array_equal(out, data["xt_out"])


@pytest.mark.parametrize("spread", [False, True], ids=["independent", "low-discrepancy"])
def test_noise_times(spread):
    data = arrays(UNITS / "t_sampling.npz")
    prefix = f"anti{int(spread)}_block"
    sizes = sorted({int(k[len(prefix) :].split("_")[0]) for k in data if k.startswith(prefix)})
    assert sizes
    for size in sizes:
        uniform, want = (data[f"{prefix}{size}_{part}"] for part in ("u", "t"))
        times = noise.spread_times(jnp.asarray(uniform)) if spread else noise.floor_times(uniform)
        if size:
            times = noise.repeat_blocks(times[:, data[f"{prefix}{size}_perm"]], size)
        elif want.ndim == 2:
            want = np.diagonal(want)  # the original broadcasts to [B, B]; its diagonal is right
        assert_close(times, want)
