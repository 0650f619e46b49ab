"""PonderNet: its distribution, its loss against plain Python, its answers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from halting_jax.act_rnn import ActRnnSettings, make_act_rnn
from halting_jax.pondernet import (
    PonderNetModel,
    kl_to_prior,
    log_halting,
    log_prior,
    pondernet_loss,
    pondernet_objective,
)
from halting_jax.types import Batch, Ratio, Task, TaskShape

ROWS, BITS, LIMIT, PRIOR = 6, 4, 5, 0.3
SHAPE = TaskShape("vector", BITS, BITS)


def example_loss(logits: jax.Array, batch: Batch) -> Ratio:
    """Squared distance, which suits any logits of shape [B]."""
    mask = batch.target_mask[:, 0]
    loss = (logits - batch.targets[:, 0]) ** 2
    return Ratio(jnp.where(mask, loss, 0), mask.astype(jnp.float32))


def made() -> tuple[PonderNetModel, Any]:
    model = make_act_rnn(
        SHAPE,
        ActRnnSettings(hidden_size=6, time_limit=LIMIT, halt_bias=-1.0, kind="pondernet"),
    )
    assert isinstance(model, PonderNetModel)
    params = jax.jit(model.init)(jax.random.key(0))
    params["act"]["halting"]["kernel"] *= 5
    return model, params


def batch_of() -> Batch:
    """Random bits; the last row is a filling."""
    rng = np.random.default_rng(0)
    real = np.arange(ROWS) < ROWS - 1
    return Batch(
        inputs=jnp.asarray(rng.normal(size=(ROWS, BITS)), jnp.float32),
        input_mask=jnp.broadcast_to(jnp.asarray(real)[:, None], (ROWS, BITS)),
        targets=jnp.asarray(rng.integers(0, 2, (ROWS, 1)), jnp.int32),
        target_mask=jnp.asarray(real)[:, None],
        decoder_inputs=jnp.zeros((ROWS, 0), jnp.int32),
        difficulty=jnp.ones(ROWS, jnp.int32),
    )


def test_distribution() -> None:
    logits = np.random.default_rng(1).normal(size=(LIMIT, ROWS))
    p = np.exp(log_halting(jnp.asarray(logits)))
    halting = 1 / (1 + np.exp(-logits))
    left = np.ones(ROWS)
    for n in range(LIMIT):
        wanted = left if n == LIMIT - 1 else halting[n] * left
        np.testing.assert_allclose(p[n], wanted, rtol=1e-5)
        left = left * (1 - halting[n])
    np.testing.assert_allclose(p.sum(axis=0), 1, rtol=1e-6)


def test_divergence_from_the_prior() -> None:
    q = np.exp(log_prior(PRIOR, LIMIT))
    geometric = np.array([PRIOR * (1 - PRIOR) ** n for n in range(LIMIT)])
    np.testing.assert_allclose(q, geometric / geometric.sum(), rtol=1e-5)
    p = np.random.default_rng(2).dirichlet(np.ones(LIMIT), size=3).T  # [M, 3]
    wanted = (p * np.log(p / q[:, None])).sum(axis=0)
    np.testing.assert_allclose(kl_to_prior(jnp.log(p), PRIOR), wanted, rtol=1e-4)
    np.testing.assert_allclose(kl_to_prior(jnp.log(q)[:, None], PRIOR), 0, atol=1e-6)
    for bad in (0.0, 1.0):
        with pytest.raises(UserError, match="act.prior"):
            log_prior(bad, LIMIT)


@pytest.mark.parametrize("size", [30.0, -30.0, 200.0, -200.0])
def test_certain_halting_keeps_gradients_finite(size: float) -> None:
    grad = jax.grad(lambda z: jnp.sum(kl_to_prior(log_halting(z), PRIOR)))
    assert np.all(np.isfinite(grad(jnp.full((LIMIT, 2), size))))


def test_loss_is_the_expected_loss_plus_divergence() -> None:
    model, params = made()
    batch = batch_of()
    assert model.unroll is not None
    unrolled = jax.jit(model.unroll)(params, batch)
    loss = jax.jit(pondernet_loss, static_argnums=(2, 3))(unrolled, batch, example_loss, PRIOR)
    p, logits = np.exp(unrolled.log_p), np.asarray(unrolled.logits)
    for row in range(ROWS - 1):
        target = int(batch.targets[row, 0])
        expected = sum(p[n, row] * (logits[n, row] - target) ** 2 for n in range(LIMIT))
        assert loss.expected.total[row] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(loss.expected.count, [1] * (ROWS - 1) + [0])
    assert loss.kl[-1] == 0 and np.all(loss.kl[:-1] > 0)
    np.testing.assert_array_equal(loss.outputs.ponder.cost[:, 0], loss.kl)


def test_each_part_moves_the_halting_unit() -> None:
    model, params = made()
    task = Task(
        name="squares",
        shape=SHAPE,
        sample=None,
        example_loss=example_loss,
        metrics=lambda logits, batch: {},
        example_correct=lambda logits, batch: logits > 0,
        eval_sets=(),
        selection_metric="",
    )
    objective = pondernet_objective(task, model, PRIOR, 0.25)

    def term(params: Any, name: str) -> Any:
        scored = objective(params, (), batch_of(), jax.random.key(0), jnp.float32(9))
        part = scored.terms[name]
        return part.weight * part.ratio.value, scored.terms

    run = jax.jit(jax.grad(term, has_aux=True), static_argnums=1)
    for name, weight in (("classification", 1.0), ("ponder", 0.25)):
        grads, terms = run(params, name)
        assert terms[name].weight == weight
        assert terms[name].ratio.count == ROWS - 1
        assert np.any(grads["act"]["halting"]["kernel"]) and np.any(
            grads["act"]["cell"]["state"]["kernel"]
        )
        # The divergence does not see the answers.
        assert np.any(grads["readout"]["kernel"]) == (name == "classification")


def test_answers_at_the_median_step() -> None:
    model, params = made()
    batch = batch_of()
    assert model.unroll is not None
    outputs = jax.jit(model.apply)(params, batch)
    unrolled = jax.jit(model.unroll)(params, batch)
    mass = np.cumsum(np.exp(unrolled.log_p), axis=0)
    steps = 1 + np.argmax(mass > 0.5, axis=0)
    steps[-1] = 0
    np.testing.assert_array_equal(outputs.ponder.steps[:, 0], steps)
    assert len(set(steps[:-1])) > 1 and outputs.ponder.executed == steps.max()
    for row in range(ROWS - 1):
        wanted = unrolled.logits[steps[row] - 1, row]
        assert outputs.logits[row] == pytest.approx(float(wanted), abs=1e-6)
    # What training reports is what inference would have answered.
    trained = pondernet_loss(unrolled, batch, example_loss, PRIOR).outputs
    np.testing.assert_allclose(trained.logits[:-1], outputs.logits[:-1], atol=1e-6)
    for name in ("steps", "remainder", "forced", "mask", "mass"):
        np.testing.assert_allclose(
            getattr(trained.ponder, name), getattr(outputs.ponder, name), atol=1e-6, err_msg=name
        )
    fixed = jax.jit(model.apply, static_argnums=2)(params, batch, 2)
    np.testing.assert_allclose(fixed.logits[:-1], unrolled.logits[1, :-1], atol=1e-6)


def test_sampled_steps_follow_the_distribution() -> None:
    model, params = made()
    assert model.unroll is not None and model.sample is not None
    count = 2000
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], count, axis=0), batch_of())
    sample, ids = jax.jit(model.sample), jnp.arange(count)
    steps = np.asarray(sample(params, batch, jax.random.key(5), ids).ponder.steps[:, 0], int)
    p = np.exp(jax.jit(model.unroll)(params, batch_of()).log_p[:, 0])
    share = np.bincount(steps, minlength=LIMIT + 1)[1:] / count
    assert np.all(np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / count) + 1e-9)
    # A row depends on its own number alone.
    turned = sample(params, batch, jax.random.key(5), ids[::-1]).ponder.steps[::-1, 0]
    np.testing.assert_array_equal(turned, steps)


def test_bundle_keeps_what_the_trainer_needs() -> None:
    model, params = made()
    names = {f.name for f in dataclasses.fields(model)}
    assert {"unroll", "sample", "halting_path"} <= names
    assert model.max_steps == LIMIT and "halting" in params["act"] and model.start is None
