"""The best token of a few states, against the summary of ordinary logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone.few_rows import best_tokens, padded_rows
from reoac_jax.sampling import summarise_scores


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("vocab", "suppressed"), [(7, 6), (256, -1), (300, 0), (5003, 2501), (5003, 5002), (5003, -1)]
)
def test_agrees_with_the_summary_of_rows(vocab, suppressed, rows):
    rng = np.random.default_rng(vocab + rows)
    table = jnp.asarray(rng.normal(size=(vocab, 12)), jnp.float32)
    states = jnp.asarray(rng.normal(size=(rows, 12)), jnp.float32)
    if suppressed >= 0:
        # It would win everywhere if it were not left out.
        table = table.at[suppressed].set(9.0 * jnp.sign(states[0]))
    wanted = summarise_scores((states @ table.T)[None], suppress_id=suppressed)
    token, probability = jax.jit(best_tokens, static_argnums=2)(table, states, suppressed)
    np.testing.assert_array_equal(token, wanted.best[0])
    np.testing.assert_allclose(probability, wanted.confidence[0], rtol=1e-5)
    if suppressed >= 0:
        unlimited = jnp.argmax(states @ table.T, axis=1)
        assert int(unlimited[0]) == suppressed != int(token[0])


def test_the_first_of_equal_scores_wins():
    vocab = 3000
    table = jnp.zeros((vocab, 2)).at[jnp.asarray([17, 1800, 2999])].set(1.0)
    token, probability = best_tokens(table, jnp.ones((2, 2)), -1)
    assert token.tolist() == [17, 17]
    expected = np.exp(2.0) / (3 * np.exp(2.0) + vocab - 3)
    np.testing.assert_allclose(probability, expected, rtol=1e-5)


def test_large_scores_stay_finite():
    table = jnp.asarray([[1.0], [-1.0], [0.999]]) * 1e4
    token, probability = best_tokens(table, jnp.asarray([[1.0], [-1.0]]), -1)
    assert token.tolist() == [0, 1]
    np.testing.assert_allclose(probability, [1.0 / (1.0 + np.exp(-10.0)), 1.0], rtol=1e-4)


def test_rows_are_padded_to_powers_of_two():
    assert [padded_rows(n) for n in (1, 2, 3, 4, 5, 17, 32)] == [1, 2, 4, 4, 8, 32, 32]
