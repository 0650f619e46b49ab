"""Heads: size, initial spread, exchange errors; running feature statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from reoac_jax.networks import (
    export_head,
    heads_apply,
    import_head,
    init_heads,
    init_stats,
    normalise,
    update_stats,
)


def test_size_and_initial_spread() -> None:
    actor, critic = init_heads(jax.random.key(0), 11 + 768)
    for head in (actor, critic):
        assert sum(leaf.size for leaf in jax.tree.leaves(head)) == 100_485
    for layer, fan_in in (("dense_0", 779), ("dense_1", 128)):
        for leaf in ("kernel", "bias"):
            values = np.asarray(actor[layer][leaf]) * np.sqrt(fan_in)
            assert np.abs(values).max() <= 1.0
            assert np.abs(values).max() > 0.2 and values.std() > 0.1
    assert not np.array_equal(actor["dense_1"]["bias"], critic["dense_1"]["bias"])


def test_dropout_needs_a_key() -> None:
    actor, _ = init_heads(jax.random.key(0), 5)
    x = jnp.ones((3, 5))
    plain = heads_apply(actor, x, dropout=0.5)
    np.testing.assert_array_equal(plain, heads_apply(actor, x))
    assert np.any(plain != heads_apply(actor, x, dropout=0.5, key=jax.random.key(1)))


def test_import_names_what_is_wrong() -> None:
    actor, _ = init_heads(jax.random.key(0), 5)
    tensors = export_head(actor, "actor")
    with pytest.raises(UserError, match="q_head"):
        import_head(tensors, "critic")
    with pytest.raises(UserError, match=r"net\.3"):
        import_head({**tensors, "net.3.weight": np.zeros((5, 3))}, "actor")


def test_statistics_in_parts_equal_the_whole() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(50, 3)) * [1.0, 5.0, 0.0] + [0.0, -4.0, 2.0]).astype(np.float32)
    mask = rng.random(50) < 0.7
    dirty = np.where(mask[:, None], rows, np.nan).astype(np.float32)
    stats = init_stats(3)
    np.testing.assert_array_equal(normalise(stats, jnp.asarray(rows)), rows)
    update = jax.jit(update_stats)
    for start in range(0, 50, 10):
        part = slice(start, start + 10)
        stats = update(stats, dirty[part], mask[part])
    kept = rows[mask]
    np.testing.assert_allclose(stats.count, mask.sum())
    np.testing.assert_allclose(stats.mean, kept.mean(0), atol=1e-5)
    np.testing.assert_allclose(stats.square / stats.count, kept.var(0), rtol=1e-4, atol=1e-6)
    scaled = np.asarray(normalise(stats, jnp.asarray(kept)))
    np.testing.assert_allclose(scaled.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(0), [1.0, 1.0, 0.0], atol=1e-4)
    unchanged = update(stats, dirty[:10], np.zeros(10, bool))
    np.testing.assert_allclose(unchanged.mean, stats.mean, rtol=1e-6)


def test_statistics_carry_no_gradient() -> None:
    stats = update_stats(init_stats(2), jnp.asarray([[0.0, 1.0], [2.0, 5.0]]))
    grad = jax.grad(lambda s: normalise(s, jnp.ones((1, 2))).sum())(stats)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grad))
