"""SEDD: scores, score entropy and reverse steps of every recorded network."""

import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone import dit, score_entropy
from tests.parity import dit_cases
from tests.parity.e2d2_cases import assert_close

each_folder = pytest.mark.parametrize("folder", dit_cases.folder_cases("sedd"))


def log_score(case, ids, t):
    """log s [B, L, V] of a batch at times t [B]."""
    output = dit_cases.scored(case, ids, t).logits
    sigma = case.cfg.schedule.sigma(jnp.asarray(t))
    return score_entropy.log_score(output, jnp.asarray(ids), sigma, case.cfg.scale_by_sigma)


def test_fixtures_are_found():
    assert dit_cases.folder_cases("sedd")


@each_folder
def test_forward(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "forward")
    out = dit_cases.scored(case, data["xt"], data["t"])
    assert_close(out.aux["states"], data["hidden_states"][1:])
    # The MDLM code's baseline returns the head's output as `logits`.
    raw = data["network_output"] if "network_output" in data else data["logits"]
    if "model_output" in data:
        assert_close(log_score(case, data["xt"], data["t"]), data["model_output"])
    else:
        assert_close(log_score(case, data["xt"], data["t"]), data["log_score"])
    assert_close(out.logits, raw)
    t = jnp.asarray(data["t"])
    assert_close(case.cfg.schedule.sigma(t), data["sigma"])
    assert_close(case.cfg.schedule.sigma_prime(t), data["dsigma"])
    assert_close(dit.condition(case.params, case.cfg.schedule.sigma(t)), data["cond"])


@each_folder
def test_loss(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "forward")
    t = jnp.asarray(data["t"])
    entropy = score_entropy.score_entropy(
        log_score(case, data["xt"], data["t"]),
        jnp.asarray(data["xt"]),
        jnp.asarray(data["x0"]),
        case.cfg.schedule.sigma(t),
        case.cfg.graph,
    )
    recorded = [data[k] for k in ("loss_per_token", "score_entropy_per_token") if k in data]
    assert len(recorded) == 1
    assert_close(entropy * case.cfg.schedule.sigma_prime(t)[:, None], recorded[0])


@each_folder
def test_reverse_steps(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "sampler")
    schedule, graph = case.cfg.schedule, case.cfg.graph
    ids, t = jnp.asarray(data["xt"]), jnp.asarray(dit_cases.first_column(data["t"]))
    span = float(data["step_size"] if "step_size" in data else data["dt"])
    score = jnp.exp(log_score(case, data["xt"], t))
    assert_close(score, data["score"])
    removed = schedule.sigma(t) - schedule.sigma(t - span)
    if "dsigma" in data:
        assert_close(removed, data["dsigma"][:, 0])
    if "staggered_score" in data:
        assert_close(score_entropy.staggered_score(score, removed, graph), data["staggered_score"])
    analytic = score_entropy.analytic_weights(score, ids, removed, graph)
    assert_close(analytic, data["analytic_probs"])
    if "euler_probs" in data:
        euler = score_entropy.euler_weights(score, ids, span * schedule.sigma_prime(t), graph)
        assert_close(euler, data["euler_probs"])


@each_folder
def test_denoising(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "sampler")
    (name,) = [key for key in data if key.startswith("denoiser_probs")]
    if "denoiser_t" in data:
        t = dit_cases.first_column(data["denoiser_t"])
    else:
        value = float(name.removeprefix("denoiser_probs_t").replace("p", "."))
        t = np.full(len(data["xt"]), value, np.float32)
    sigma = case.cfg.schedule.sigma(jnp.asarray(t))
    score = jnp.exp(log_score(case, data["xt"], t))
    ours = score_entropy.denoising_weights(score, jnp.asarray(data["xt"]), sigma, case.cfg.graph)
    columns = data[name].shape[-1]  # SEDD's code drops the column of the mask, MDLM's zeroes it
    assert_close(ours[..., :columns], data[name])
    assert float(jnp.sum(jnp.abs(ours[..., columns:]))) == 0.0


@each_folder
def test_recorded_schedule(folder):
    case, data = dit_cases.load(folder), dit_cases.recorded(folder, "sampler")
    if "noise_t" not in data:
        pytest.skip("no noise table in this folder")
    t = jnp.asarray(data["noise_t"])
    assert_close(case.cfg.schedule.sigma(t), data["noise_total"])
    assert_close(case.cfg.schedule.sigma_prime(t), data["noise_rate"])
