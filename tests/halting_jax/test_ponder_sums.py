"""Sums behind the statistics of halting give what the arrays themselves give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halting_jax.ponder_sums import PonderSums, histogram_quantile, ponder_report, ponder_sums
from halting_jax.types import Ponder


def _ponder(seed: int, rows: int, limit: int) -> Ponder:
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, limit + 1, (rows, 3)).astype(np.float32)
    return Ponder(
        cost=jnp.asarray(steps + rng.random((rows, 3)), jnp.float32),
        steps=jnp.asarray(steps),
        remainder=jnp.asarray(rng.random((rows, 3)), jnp.float32),
        forced=jnp.asarray(steps == limit),
        mask=jnp.asarray(rng.random((rows, 3)) < 0.7),
        mass=jnp.asarray(rng.random(limit), jnp.float32),
        executed=jnp.int32(limit),
    )


def test_report_equals_the_arrays() -> None:
    limit = 6
    parts = [_ponder(seed, rows, limit) for seed, rows in ((0, 5), (1, 8))]
    sums = [ponder_sums(part, limit) for part in parts]
    total: PonderSums = jax.device_get(jax.tree.map(jnp.add, *sums))
    report = ponder_report(total)
    chosen = [np.asarray(p.mask) for p in parts]

    def joined(name: str) -> np.ndarray:
        values = (np.asarray(getattr(p, name))[m] for p, m in zip(parts, chosen, strict=True))
        return np.concatenate(list(values))

    steps, rest = joined("steps"), joined("remainder")
    np.testing.assert_allclose(report["steps"], steps.mean(), rtol=1e-6)
    np.testing.assert_allclose(report["steps_p50"], np.quantile(steps, 0.5), rtol=1e-6)
    np.testing.assert_allclose(report["steps_p90"], np.quantile(steps, 0.9), rtol=1e-6)
    np.testing.assert_allclose(report["remainder_mean"], rest.mean(), rtol=1e-5)
    np.testing.assert_allclose(report["remainder_std"], rest.std(), rtol=1e-4)
    np.testing.assert_allclose(report["halt_forced_ratio"], (steps == limit).mean(), rtol=1e-6)
    np.testing.assert_allclose(report["ponder_mean"], joined("cost").mean(), rtol=1e-6)
    assert (
        report["n_updates_hist"].tolist()
        == np.bincount(steps.astype(int), minlength=limit + 1)[1:].tolist()
    )
    assert report["mean_inner_steps_executed"] == limit


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.73, 0.9, 1.0])
def test_quantile_of_counts(q: float) -> None:
    values = np.random.default_rng(3).integers(0, 9, 37)
    counts = np.bincount(values, minlength=9)
    assert histogram_quantile(counts, q) == pytest.approx(np.quantile(values, q))


def test_nothing_counted_is_no_error() -> None:
    empty = _ponder(0, 2, 4).replace(mask=jnp.zeros((2, 3), bool))  # type: ignore[attr-defined]
    report = ponder_report(jax.device_get(ponder_sums(empty, 4)))
    assert report["steps"] == 0.0 and report["steps_p90"] == 0.0


def test_fixed_steps_above_the_limit_are_told_as_they_are() -> None:
    ponder = _ponder(2, 6, 9)
    steps = np.asarray(ponder.steps)[np.asarray(ponder.mask)]
    report = ponder_report(jax.device_get(ponder_sums(ponder, 9)), max_steps=4)
    assert report["steps"] == pytest.approx(steps.mean()) and steps.max() > 4
    assert report["steps_p90"] == pytest.approx(np.quantile(steps, 0.9))
    clipped = np.minimum(steps, 4).astype(int)
    assert report["n_updates_hist"].tolist() == np.bincount(clipped, minlength=5)[1:].tolist()
