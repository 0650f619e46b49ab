"""Equal and different tokenizers, aligned columns, merged end-of-text ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from qstar.vocabulary import align, merge_columns, require_same, same_vocabulary, take_columns

THETA = {"a": 2, "b": 0, "c": 1, "only theta": 3}
T = {"a": 0, "c": 1, "b": 2, "pad": 3, "other": 4}


def test_equal_vocabularies_are_compared_in_full() -> None:
    assert same_vocabulary(THETA, dict(reversed(THETA.items())))
    require_same(THETA, dict(THETA))
    # Same size, same first tokens, one swapped pair far away.
    other = THETA | {"a": 3, "only theta": 2}
    with pytest.raises(UserError, match=r"4 and 4 tokens.*'a' \(2 / 3\).*vocab_align"):
        require_same(THETA, other)
    with pytest.raises(UserError, match="'only theta' \\(3 / none\\)|'other' \\(none / 4\\)"):
        require_same({"b": 0, "only theta": 3}, {"b": 0})


def test_aligned_columns() -> None:
    aligned = align(THETA, T)
    assert aligned.tokens == ("b", "c", "a")
    assert aligned.columns_theta.tolist() == [0, 1, 2, 3, -1, -1]
    assert aligned.columns_t.tolist() == [2, 1, 0, -1, 3, 4]
    assert aligned.allowed.tolist() == [True] * 3 + [False] * 3
    taken = take_columns(jnp.array([[1.0, 2.0, 3.0, 4.0, 99.0]]), aligned.columns_theta)
    assert taken[0].tolist() == [1.0, 2.0, 3.0, 4.0, -np.inf, -np.inf]
    with pytest.raises(UserError, match="no token in common"):
        align({"x": 0}, {"y": 0})


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_merged_columns_hold_the_probability_of_all(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 9)).astype(np.float32) * 4
    merged = merge_columns(jnp.asarray(logits), (5, 2, 7), temperature)
    scale = temperature or 1.0
    before = np.asarray(jax.nn.softmax(logits / scale, axis=-1))
    after = np.asarray(jax.nn.softmax(merged / scale, axis=-1))
    np.testing.assert_allclose(after[:, 5], before[:, [5, 2, 7]].sum(-1), rtol=1e-5)
    assert np.all(after[:, [2, 7]] == 0)
    others = [0, 1, 3, 4, 6, 8]
    np.testing.assert_allclose(after[:, others], before[:, others], rtol=1e-5)
