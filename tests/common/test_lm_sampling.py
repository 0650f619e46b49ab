"""Filters and draws against sorted NumPy versions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.lm.sampling import Sampling, draw, fold_rows, keep_mask, make_sampling, sample

ROWS, VOCAB = 4, 9
keep_both = jax.jit(keep_mask)
sample_jit = jax.jit(sample)


def sorted_keep(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The same rule by a stable sort, in float64."""
    order = np.argsort(-logits, kind="stable")
    order = order[np.isfinite(logits[order])]
    if 0 < top_k < len(logits):
        order = order[:top_k]
    if top_p < 1:
        p = np.exp(logits[order].astype(np.float64))
        mass = np.cumsum(p) / p.sum()
        order = order[: 1 + np.searchsorted(mass, top_p - 1e-6)]
    keep = np.zeros(len(logits), bool)
    keep[order] = True
    return keep


# Few distinct values, so that ties are the rule; masses far from any p that is asked for.
values = st.sampled_from([-np.inf, -20.0, -1.5, -0.0, 0.0, 0.5, 3.0])
rows = st.lists(
    st.lists(values, min_size=VOCAB, max_size=VOCAB).filter(lambda row: max(row) > -np.inf),
    min_size=ROWS,
    max_size=ROWS,
)


@settings(max_examples=60, deadline=None)
@given(
    rows,
    st.lists(st.integers(-1, VOCAB + 1), min_size=ROWS, max_size=ROWS),
    st.lists(st.sampled_from([0.013, 0.317, 0.611, 0.887, 1.0]), min_size=ROWS, max_size=ROWS),
)
def test_kept_tokens_are_those_of_a_sort(logits, top_k, top_p):
    logits = np.asarray(logits, np.float32)
    keep = np.asarray(
        keep_both(jnp.asarray(logits), jnp.asarray(top_k), jnp.asarray(top_p, jnp.float32))
    )
    for b in range(ROWS):
        np.testing.assert_array_equal(keep[b], sorted_keep(logits[b], top_k[b], top_p[b]))


def test_kept_tokens_of_a_large_vocabulary():
    logits = np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32) * 3
    top_k, top_p = [50, 700, -1], [1.0, 0.9, 0.5]
    keep = keep_both(jnp.asarray(logits), jnp.asarray(top_k), jnp.asarray(top_p, jnp.float32))
    for b in range(3):
        np.testing.assert_array_equal(keep[b], sorted_keep(logits[b], top_k[b], top_p[b]))


def test_filters_are_idempotent():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 300)), jnp.float32)
    keep = keep_mask(logits, jnp.asarray([40, 40]))
    again = keep_mask(jnp.where(keep, logits, -jnp.inf), jnp.asarray([40, 40]))
    np.testing.assert_array_equal(keep, again)


def test_draws_invert_the_cumulative_distribution():
    rng = np.random.default_rng(2)
    weights = rng.random((1, 1000)).astype(np.float32) * (rng.random((1, 1000)) < 0.3)
    uniform = rng.random(500).astype(np.float32)
    tokens = np.asarray(draw(jnp.tile(weights, (500, 1)), jnp.asarray(uniform)))
    total = np.cumsum(weights[0], dtype=np.float64)
    want = np.searchsorted(total, uniform * total[-1], side="right")
    assert (weights[0, tokens] > 0).all()
    # Single precision may place a draw that hits a boundary on its other side.
    assert (np.abs(total[tokens] - total[want]) < 2e-4 * total[-1]).all()
    assert (tokens == want).mean() > 0.98


def test_draws_never_take_an_impossible_token():
    weights = jnp.zeros((3, 600)).at[:, 511].set(1e-30).at[0, 3].set(1.0).at[2, 511].set(5.0)
    edge = jnp.asarray([1.0 - 2**-24, 0.0, 1.0 - 2**-24], jnp.float32)
    assert draw(weights, edge).tolist()[1:] == [511, 511]
    assert draw(weights, edge)[0] in (3, 511)


def test_the_law_of_the_samples():
    logits = jnp.asarray([[0.0, 1.0, -1.0, 2.0, -jnp.inf]])
    count = 4000
    keys = fold_rows(
        jnp.repeat(jax.random.key(3)[None], count), jnp.arange(count, dtype=jnp.uint32)
    )
    tokens, log_probs = sample_jit(
        jnp.tile(logits, (count, 1)), keys, make_sampling(count, temperature=2.0, top_k=3)
    )
    p = np.exp(np.asarray([0.0, 1.0, -np.inf, 2.0, -np.inf]) / 2.0)
    expected = count * p / p.sum()
    seen = np.bincount(tokens, minlength=5)
    assert seen[2] == seen[4] == 0
    kept = expected > 0
    assert ((seen - expected)[kept] ** 2 / expected[kept]).sum() < 13.8  # chi-squared, p = 1e-3
    np.testing.assert_allclose(
        log_probs, np.asarray(jax.nn.log_softmax(logits))[0, tokens], rtol=1e-5
    )


def test_temperature_zero_is_greedy_row_by_row():
    logits = jnp.asarray([[1.0, 5.0, 5.0], [1.0, 5.0, 5.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(logits, keys, Sampling())[0].tolist() == [1, 1]  # ties: the lowest id
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), 2)
        mixed = Sampling(jnp.asarray([0.0, 50.0]))
        assert sample_jit(logits, keys, mixed)[0][0] == 1
    assert make_sampling(2, 0.0, top_k=3) == Sampling()


def test_rows_do_not_depend_on_each_other():
    rng = np.random.default_rng(4)
    logits = jnp.asarray(rng.normal(size=(5, 700)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 5)
    every = make_sampling(5, 1.3, top_k=90, top_p=0.8)
    together, _ = sample_jit(logits, keys, every)
    spoiled, _ = sample_jit(logits.at[2].set(jnp.nan), keys, every)
    one = make_sampling(1, 1.3, top_k=90, top_p=0.8)
    for b in (0, 1, 3, 4):
        assert together[b] == spoiled[b] == sample(logits[b : b + 1], keys[b : b + 1], one)[0][0]
    assert 0 <= spoiled[2] < 700


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (0, 1.0), (9, 1.0)])
def test_disabled_filters_keep_everything(top_k, top_p):
    logits = jnp.arange(5.0)[None]
    keep = keep_mask(logits, jnp.asarray([top_k]), jnp.asarray([top_p]))
    assert keep.all()
