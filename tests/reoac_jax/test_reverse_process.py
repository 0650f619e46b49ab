"""Every sampler against an exact law: a small table whose posterior and scores are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaincc

from common.errors import UserError
from reoac_jax.backbone import noise
from reoac_jax.backbone.reverse_process import (
    LAST_TIME,
    SamplerSettings,
    ScoreSettings,
    sample_masked,
    sample_scores,
    semi_autoregressive,
)

SIZE, LENGTH, ROWS = 3, 2, 4000
MASK = SIZE
STATES = np.array(list(itertools.product(range(SIZE), repeat=LENGTH)), np.int32)  # [9, L]
LAW = np.array([0.30, 0.02, 0.08, 0.05, 0.15, 0.05, 0.01, 0.14, 0.20], np.float32)
ROW_ID = jnp.arange(ROWS, dtype=jnp.uint32)
SCHEDULE = noise.make_schedule("loglinear")


def posterior(ids):
    """log p(x0 at each position | visible tokens), [B, L, SIZE + 1]; the mask gets -1e9."""
    agrees = (ids[:, None] == STATES[None]) | (ids[:, None] == MASK)  # [B, 9, L]
    weight = jnp.all(agrees, axis=2) * LAW  # [B, 9]
    hot = jax.nn.one_hot(STATES, SIZE)  # [9, L, SIZE]
    probs = jnp.einsum("bs,sld->bld", weight / weight.sum(axis=1, keepdims=True), hot)
    return jnp.pad(
        jnp.log(jnp.maximum(probs, 1e-30)), ((0, 0), (0, 0), (0, 1)), constant_values=-1e9
    )


def chi_square_p_value(counts, expected):
    """Of counts against their expected values; cells of expectation 0 must be empty."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    assert np.all(counts[expected == 0] == 0)
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = np.sum((counts - expected) ** 2 / expected)
    return float(gammaincc((len(counts) - 1) / 2, statistic / 2))


def assert_follows_law(ids, law=LAW, states=STATES):
    """Chi-square test of drawn sequences [N, L] against a law over `states`."""
    ids = np.asarray(ids)
    counts = (ids[:, None] == states[None]).all(axis=2).sum(axis=0)
    assert counts.sum() == len(ids)
    assert chi_square_p_value(counts, law * len(ids)) > 1e-3
    # The same test notices a law that is slightly off.
    wrong = np.roll(law, 1) * 0.1 + law * 0.9
    assert chi_square_p_value(counts, wrong * len(ids)) < 1e-3


def masked_start(rows=ROWS):
    return jnp.full((rows, LENGTH), MASK, jnp.int32)


def draw(settings, ids, key, schedule=SCHEDULE):
    fn = jax.jit(
        lambda ids, key, row: sample_masked(
            lambda x, t: posterior(x), schedule, MASK, ids, key, row, settings
        )
    )
    return fn(ids, key, ROW_ID[: ids.shape[0]])


@pytest.mark.parametrize("method", ["ancestral", "cached", "first_hitting"])
def test_masked_samplers_follow_the_law(method):
    done = draw(SamplerSettings(method, num_steps=150), masked_start(), jax.random.key(3))
    assert_follows_law(done.ids)
    if method == "first_hitting":
        assert int(done.forwards) == LENGTH


def test_cached_sampler_asks_only_when_something_moves():
    settings = SamplerSettings("cached", num_steps=150)
    done = draw(settings, masked_start(8), jax.random.key(0))
    assert 1 <= int(done.forwards) <= 8 * LENGTH + 1
    assert not np.any(np.asarray(done.ids) == MASK)
    ancestral = draw(
        SamplerSettings("ancestral", num_steps=150), masked_start(8), jax.random.key(0)
    )
    assert int(ancestral.forwards) > int(done.forwards)


def test_times_of_first_hitting_are_those_of_the_schedule():
    # With one masked position, 1 - alpha at its time is uniform: seen by the prediction.
    schedule = noise.make_schedule("cosine_squared")
    settings = SamplerSettings("first_hitting")

    def logits(ids, t):
        # Token 0 early in time, token 1 late.
        early = (schedule.alpha(t) > 0.75)[:, None, None]
        token = jnp.where(early, 0, 1)
        return jnp.where(jnp.arange(SIZE + 1) == token, 0.0, -50.0) * jnp.ones((1, LENGTH, 1))

    ids = masked_start().at[:, 0].set(2)
    row = ROW_ID
    done = jax.jit(lambda k: sample_masked(logits, schedule, MASK, ids, k, row, settings))(
        jax.random.key(5)
    )
    share = float(jnp.mean(done.ids[:, 1] == 0))
    assert abs(share - 0.25) < 0.02
    assert np.all(np.asarray(done.ids[:, 0]) == 2)


def test_given_tokens_stay_and_condition_the_rest():
    ids = masked_start().at[:, 0].set(1)
    done = draw(SamplerSettings("cached", num_steps=100), ids, jax.random.key(1))
    rest = LAW[3:6] / LAW[3:6].sum()
    assert_follows_law(done.ids, rest, STATES[3:6])


def test_rows_do_not_depend_on_the_batch():
    settings = SamplerSettings("ancestral", num_steps=50)
    whole = draw(settings, masked_start(16), jax.random.key(7)).ids
    fn = jax.jit(
        lambda row: (
            sample_masked(
                lambda x, t: posterior(x),
                SCHEDULE,
                MASK,
                masked_start(4),
                jax.random.key(7),
                row,
                settings,
            ).ids
        )
    )
    part = fn(jnp.arange(8, 12, dtype=jnp.uint32))
    np.testing.assert_array_equal(whole[8:12], part)


def test_semi_autoregressive_windows_overlap():
    settings = SamplerSettings("first_hitting")

    @jax.jit
    def run(key):
        def one(ids, key):
            return sample_masked(
                lambda x, t: posterior(x), SCHEDULE, MASK, ids, key, ROW_ID, settings
            )

        return semi_autoregressive(one, masked_start(), key, windows=3, stride=1, mask_id=MASK)

    done = run(jax.random.key(2))
    assert done.ids.shape == (ROWS, LENGTH + 2)
    ids = np.asarray(done.ids)
    assert_follows_law(ids[:, :2])
    # Every further token follows its predecessor by the law's conditional.
    table = LAW.reshape(SIZE, SIZE)
    table = table / table.sum(axis=1, keepdims=True)
    for start in (1, 2):
        for first in range(SIZE):
            rows = ids[ids[:, start] == first]
            counts = np.bincount(rows[:, start + 1], minlength=SIZE)
            assert chi_square_p_value(counts, table[first] * len(rows)) > 1e-3
    with pytest.raises(UserError, match="stride 3"):
        semi_autoregressive(None, masked_start(2), None, windows=2, stride=3, mask_id=MASK)


# -------------------------------------------------------------------------------------------- SEDD
def absorbing_scores(ids, sigma):
    log_probs = posterior(ids)
    shifted = log_probs - jnp.log(jnp.expm1(sigma))[:, None, None]
    present = jnp.arange(SIZE + 1) == ids[..., None]
    return jnp.where(present, 0.0, shifted)


def uniform_scores(ids, sigma):
    """Exact log p_t(y) / p_t(x) of the uniform graph over SIZE tokens."""
    keep = jnp.exp(-sigma)[:, None, None]
    same = jnp.asarray(STATES)[None, :, :, None] == jnp.arange(SIZE)  # [1, 9, L, SIZE]
    kernel = keep[..., None] * same + (1 - keep[..., None]) / SIZE  # p(y_l | x0), [B, 9, L, SIZE]
    now = jnp.take_along_axis(kernel, ids[:, None, :, None], axis=3)[..., 0]  # [B, 9, L]
    joint = jnp.asarray(LAW)[None, :, None] * jnp.prod(now, axis=2, keepdims=True)  # [B, 9, 1]
    changed = jnp.sum(joint[..., None] * kernel / now[..., None], axis=1)  # [B, L, SIZE]
    return jnp.log(changed) - jnp.log(jnp.sum(joint, axis=1))[..., None]


CASES = {
    "absorb-analytic": (absorbing_scores, SCHEDULE, ScoreSettings("analytic", 100, "absorb")),
    "absorb-euler": (absorbing_scores, SCHEDULE, ScoreSettings("euler", 200, "absorb")),
    "uniform-analytic": (
        uniform_scores,
        noise.make_schedule("geometric", sigma_min=1e-3, sigma_max=8.0),
        ScoreSettings("analytic", 100, "uniform"),
    ),
    "uniform-euler": (
        uniform_scores,
        noise.make_schedule("geometric", sigma_min=1e-3, sigma_max=8.0),
        ScoreSettings("euler", 400, "uniform"),
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "uniform-euler" else []) for n in CASES],
)
def test_score_samplers_follow_the_law(name):
    scores, schedule, settings = CASES[name]
    start = masked_start()
    if settings.graph == "uniform":
        start = jax.random.randint(jax.random.key(8), (ROWS, LENGTH), 0, SIZE)
    fixed = jnp.zeros_like(start, bool)
    fn = jax.jit(lambda k: sample_scores(scores, schedule, start, fixed, k, ROW_ID, settings))
    done = fn(jax.random.key(4))
    assert int(done.forwards) == settings.num_steps + 1
    assert_follows_law(done.ids)


def test_given_tokens_condition_the_scores():
    scores, schedule, settings = CASES["absorb-analytic"]
    start = masked_start().at[:, 1].set(2)
    fixed = jnp.zeros_like(start, bool).at[:, 1].set(True)
    fn = jax.jit(lambda k: sample_scores(scores, schedule, start, fixed, k, ROW_ID, settings))
    done = fn(jax.random.key(6))
    assert_follows_law(done.ids, LAW[2::3] / LAW[2::3].sum(), STATES[2::3])


def test_the_scores_of_the_toy_law_are_consistent():
    # Reversing a transition and its reversal: s_y(x) s_x(y) = 1.
    ids = jnp.asarray(STATES)
    sigma = jnp.full(len(STATES), 0.7)
    score = jnp.exp(uniform_scores(ids, sigma))
    other = ids.at[:, 0].set((ids[:, 0] + 1) % SIZE)
    back = jnp.exp(uniform_scores(other, sigma))
    forth = score[jnp.arange(9), 0, other[:, 0]]
    np.testing.assert_allclose(forth * back[jnp.arange(9), 0, ids[:, 0]], 1.0, rtol=1e-5)


def test_settings_are_checked():
    with pytest.raises(UserError, match="'ddim'"):
        SamplerSettings("ddim")
    with pytest.raises(UserError, match="at least 1 step"):
        SamplerSettings(num_steps=0)
    with pytest.raises(UserError, match="'heun'"):
        ScoreSettings("heun")
    assert LAST_TIME < 1e-4
