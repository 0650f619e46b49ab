"""MDLM: network, SUBS, likelihood bound, sampler distributions, schedules, against recordings."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone import dit, noise, reverse_process, score_entropy
from tests.parity import dit_cases
from tests.parity.e2d2_cases import arrays, assert_close
from tests.parity.fixtures import fixture_root

UNITS = fixture_root() / "backbones" / "mdlm" / "units"
each_folder = pytest.mark.parametrize("folder", dit_cases.folder_cases("mdlm"))
SCHEDULES = {
    "loglinear": "loglinear",
    "linear": "linear_sigma",
    "geometric": "geometric",
    "cosine": "cosine_floor",
    "cosinesqr": "cosine_squared",
}


def test_fixtures_are_found():
    assert dit_cases.folder_cases("mdlm")


@each_folder
def test_forward(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "forward")
    out = dit_cases.scored(case, data["xt"], data["t"])
    assert_close(out.aux["states"], data["hidden_states"][1:])
    assert_close(out.hidden, data["hidden_states"][-1])
    assert_close(out.logits, data["logits"])
    assert_close(out.log_probs, data["model_output"])
    embedded = case.params["embed"]["embedding"][data["xt"]]
    assert_close(embedded, data["hidden_states"][0])


@each_folder
def test_condition_and_noise_level(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "forward")
    schedule = case.cfg.schedule
    t = jnp.asarray(data["t"])
    assert_close(schedule.sigma(t), data["sigma"])
    assert_close(schedule.sigma_prime(t), data["dsigma"])
    seen = schedule.sigma(t) * case.cfg.time_conditioning
    assert_close(seen, data["sigma_seen_by_network"])
    assert_close(dit.condition(case.params, seen), data["cond"])


@each_folder
def test_likelihood_bound(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "forward")
    log_probs = dit_cases.scored(case, data["xt"], data["t"]).log_probs
    true = jnp.take_along_axis(log_probs, jnp.asarray(data["x0"])[..., None], axis=-1)[..., 0]
    bound = noise.likelihood_bound(true, case.cfg.schedule, jnp.asarray(data["t"])[:, None])
    assert_close(bound, data["nelbo_per_token"])


@each_folder
def test_sampler_distributions(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "sampler")
    t, dt = dit_cases.first_column(data["t"]), np.float32(data["dt"])
    log_probs = dit_cases.scored(case, data["xt"], t).log_probs
    assert_close(jnp.exp(log_probs), data["p_x0"])
    schedule = case.cfg.schedule
    for method, name in (("ancestral", "ddpm_q_xs"), ("cached", "ddpm_cache_q_xs")):
        # The recorded weights have the sum m(t): they are the posterior times m(t), and in them
        # the mask keeps the share of positions that do not move.
        share = t if method == "cached" else reverse_process.masked_share(schedule, jnp.asarray(t))
        earlier = share * (1.0 - reverse_process.move_chance(schedule, t, t - dt, method))
        alphas = (1.0 - share)[:, None, None], (1.0 - earlier)[:, None, None]
        posterior = noise.reverse_posterior(log_probs, *alphas, case.cfg.mask_id)
        assert_close(posterior * np.asarray(share)[:, None, None], data[name])


@each_folder
def test_scores_and_analytic_step(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "sampler")
    xt, t = jnp.asarray(data["xt"]), jnp.asarray(dit_cases.first_column(data["t"]))
    schedule = case.cfg.schedule

    def score(t):
        log_probs = dit_cases.scored(case, data["xt"], t).log_probs
        return jnp.exp(score_entropy.log_score_of_subs(log_probs, xt, schedule.sigma(t)))

    assert_close(score(t), data["score"])
    removed = schedule.sigma(t) - schedule.sigma(t - float(data["dt"]))
    weights = score_entropy.analytic_weights(score(t), xt, removed, "absorb")
    assert_close(weights, data["analytic_probs"])
    (name,) = [key for key in data if key.startswith("denoiser_probs_t")]
    last = jnp.full_like(t, float(name.removeprefix("denoiser_probs_t").replace("p", ".")))
    sigma = schedule.sigma(last)
    denoised = score_entropy.denoising_weights(score(last), xt, sigma, "absorb")
    assert_close(denoised, data[name])


@each_folder
@pytest.mark.slow
def test_half_precision_predicts_the_same_tokens(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "forward")
    half = case._replace(cfg=dataclasses.replace(case.cfg, dtype="bfloat16"))
    exact = np.array(dit_cases.scored(case, data["xt"], data["t"]).logits)
    rough = np.array(dit_cases.scored(half, data["xt"], data["t"]).logits)
    best, other = exact.argmax(-1), rough.argmax(-1)
    gap = exact.max(-1) - np.take_along_axis(exact, other[..., None], axis=-1)[..., 0]
    flipped = best != other
    # Random networks have many near ties: every flip is one, and the rest agrees.
    assert np.all(gap[flipped] < 0.05 * exact.std()) and flipped.mean() < 0.03


def recorded_schedules():
    """(name, options) of every recorded schedule: the options are part of the recorded name."""
    data = arrays(UNITS / "noise.npz")
    for key in sorted(data):
        prefix = key.removesuffix("_sigma")
        if prefix == key:
            continue
        name, *bounds = prefix.split("_")
        options = dict(zip(("sigma_min", "sigma_max"), map(float, bounds), strict=False))
        yield pytest.param(prefix, noise.make_schedule(SCHEDULES[name], **options), id=prefix)


@pytest.mark.parametrize(("prefix", "schedule"), recorded_schedules())
def test_schedules(prefix, schedule):
    data = arrays(UNITS / "noise.npz")
    t = jnp.asarray(data["t"])
    assert_close(schedule.sigma(t), data[f"{prefix}_sigma"])
    assert_close(schedule.sigma_prime(t), data[f"{prefix}_dsigma"])
    if f"{prefix}_importance_t" in data:
        # Schedules that start without noise start at eps, so that the logarithm exists.
        low = float(schedule.sigma(jnp.float32(0.0))) or noise.TIME_EPS
        high = float(schedule.sigma(jnp.float32(1.0)))
        ours = noise.importance_times(t, schedule, low, high)
        assert_close(ours, data[f"{prefix}_importance_t"])


def test_noise_times():
    data = arrays(UNITS / "t_sampling.npz")
    assert_close(noise.spread_times(jnp.asarray(data["anti1_u"])), data["anti1_t"])
    assert_close(noise.floor_times(jnp.asarray(data["anti0_u"])), data["anti0_t"])
