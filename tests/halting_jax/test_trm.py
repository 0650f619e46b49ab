"""The recursive model: against a plain loop, early exit, deep supervision, padding, learning."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from halting_jax import losses
from halting_jax.early_exit import with_early_exit
from halting_jax.trm import TrmSettings, make_trm, trm_objective
from halting_jax.trm_network import Latents, initial_latents, make_net
from halting_jax.trm_supervision import (
    TrmCarry,
    draw_min_steps,
    init_carry,
    scored_rows,
    supervise,
)
from halting_jax.types import Batch, Params, Task, TaskShape
from tests.halting_jax.plain_trm import plain_step

SIDE, CLASSES, ROWS = 3, 6, 16
LENGTH = SIDE * SIDE
SHAPE = TaskShape("grid", LENGTH, CLASSES, 1, CLASSES)
SMALL = TrmSettings(
    hidden_size=16,
    layers=1,
    heads=2,
    inner_cycles=2,
    cycles=2,
    supervision_steps=4,
    halt_bias=0.0,
    halt_exploration=0.0,
)
# Two layers in the comparison with the plain loop; elsewhere one compiles faster.
FULL = dataclasses.replace(SMALL, layers=2)


def _mlp(settings: TrmSettings) -> TrmSettings:
    return dataclasses.replace(settings, mixer="mlp", pos="learned")


def _task(shape: TaskShape = SHAPE) -> Task:
    def example_correct(logits: jax.Array, batch: Batch) -> jax.Array:
        return jnp.all(losses.correct_classes(logits, batch.targets) | ~batch.target_mask, axis=1)

    def example_loss(logits: jax.Array, batch: Batch) -> Any:
        return losses.masked_cross_entropy(logits, batch.targets, batch.target_mask)

    return Task(
        "grid", shape, None, example_loss, lambda *_: {}, example_correct, ("id",), "puz_acc"
    )


def _batch(seed: int = 0, rows: int = ROWS, valid: int = LENGTH) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, CLASSES, (rows, LENGTH)), jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(LENGTH) < valid, tokens.shape)
    targets = jnp.asarray(rng.integers(0, CLASSES, (rows, LENGTH)), jnp.int32)
    zeros = jnp.zeros(rows, jnp.int32)
    return Batch(tokens, mask, targets, mask, jnp.zeros((rows, 0), jnp.int32), zeros)


def _params(settings: TrmSettings, shape: TaskShape = SHAPE) -> Params:
    """Random weights with a halting head that tells rows apart."""
    params = jax.jit(make_trm(shape, settings).init)(jax.random.key(0))
    kernel = -jax.random.normal(jax.random.key(1), params["halt"]["kernel"].shape)
    return params | {"halt": {"kernel": kernel, "bias": jnp.full(1, 0.7)}}


def _rows(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _assert_close(actual: Any, expected: Any, atol: float = 2e-5) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=atol)


@pytest.mark.parametrize(
    "settings",
    [
        FULL,
        _mlp(SMALL),
        pytest.param(dataclasses.replace(SMALL, conv_size=3), marks=pytest.mark.slow),
    ],
    ids=["attention", "mlp", "convolution"],
)
def test_gradient_flows_through_the_last_cycle_only(settings: TrmSettings) -> None:
    """Values and all gradients equal those of the plain loop with its cut before each cycle."""
    net, params, batch = make_net(SHAPE, settings), _params(settings), _batch(rows=2)
    task = _task()

    def ours(params: Params) -> tuple[jax.Array, Any]:
        logits, q, used, carry = supervise(
            net, params, init_carry(settings, batch), batch, jax.random.key(0)
        )
        cells, halting, _ = scored_rows(task, logits, q, used)
        return cells.total / cells.count + 0.5 * halting.total / halting.count, (logits, q, carry)

    def plain(params: Params) -> tuple[jax.Array, Any]:
        start = initial_latents(settings, 1, LENGTH)
        logits, q, y, z = jax.vmap(
            lambda tokens: plain_step(params, settings, tokens, start.y[0], start.z[0])
        )(batch.inputs)
        log_p = jnp.log(jnp.take_along_axis(jax.nn.softmax(logits), batch.targets[..., None], -1))
        right = jnp.all(jnp.argmax(logits, -1) == batch.targets, axis=1)
        bce = -jnp.where(right, jnp.log(jax.nn.sigmoid(q)), jnp.log(jax.nn.sigmoid(-q)))
        return -log_p.mean() + 0.5 * bce.mean(), (logits, q, y, z)

    (loss, (logits, q, carry)), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (expected, (logits_2, q_2, y, z)), grads_2 = jax.jit(jax.value_and_grad(plain, has_aux=True))(
        params
    )
    _assert_close(
        (loss, logits, q, carry.latents.y, carry.latents.z), (expected, logits_2, q_2, y, z)
    )
    _assert_close(grads, grads_2)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


# --------------------------------------------------------------------------------------------------
# Inference


@functools.cache
def _applied(settings: TrmSettings) -> Callable[..., Any]:
    return jax.jit(make_trm(SHAPE, settings).apply, static_argnums=2)


def _mixed_halting() -> tuple[Params, Batch]:
    """Weights and rows that halt after different numbers of steps, some at the limit."""
    params, batch = _params(SMALL), _batch()
    steps = np.asarray(_applied(SMALL)(params, batch, 0).ponder.steps[:, 0])
    assert len(set(steps)) >= 3, "the rows of this test must halt at different steps"
    return params, batch


def test_shapes_and_ponder() -> None:
    """Everything has the shape and dtype that tasks and the trainer rely on."""
    out = _applied(SMALL)(_params(SMALL), _batch(), 0)
    assert out.logits.shape == (ROWS, LENGTH, CLASSES) and out.logits.dtype == jnp.float32
    for name in ("cost", "steps", "remainder"):
        value = getattr(out.ponder, name)
        assert value.shape == (ROWS, 1) and value.dtype == jnp.float32
    assert out.ponder.forced.dtype == out.ponder.mask.dtype == jnp.bool_
    assert bool(out.ponder.mask.all()) and not bool(out.ponder.cost.any())
    assert out.ponder.mass.shape == (0,)


def test_early_stop_keeps_the_answer() -> None:
    """A row that halted after k steps answers as in a run of exactly k steps."""
    params, batch = _mixed_halting()
    run = _applied(SMALL)
    out = run(params, batch, 0)
    steps = np.asarray(out.ponder.steps[:, 0]).astype(int)
    for count in sorted(set(steps)):
        rows = np.flatnonzero(steps == count)
        fixed = run(params, batch, int(count))
        _assert_close(out.logits[rows], fixed.logits[rows])
    assert int(out.ponder.executed) == steps.max()
    at_limit = steps == SMALL.supervision_steps
    assert np.all(np.asarray(out.ponder.forced[:, 0]) <= at_limit)


def test_stops_exactly_where_the_halting_logit_turns_positive() -> None:
    """Steps and forced rows follow from the halting logits of the plain loop."""
    params, batch = _mixed_halting()
    out = _applied(SMALL)(params, batch, 0)
    plain = jax.jit(lambda tokens, y, z: plain_step(params, SMALL, tokens, y, z))
    for row in range(4):
        start = initial_latents(SMALL, 1, LENGTH)
        y, z, taken, halted = start.y[0], start.z[0], 0, False
        while taken < SMALL.supervision_steps and not halted:
            logits, q, y, z = plain(batch.inputs[row], y, z)
            taken, halted = taken + 1, bool(q > 0)
        assert int(out.ponder.steps[row, 0]) == taken
        assert bool(out.ponder.forced[row, 0]) is not halted
        _assert_close(out.logits[row], logits, atol=1e-4)


def test_without_halting_all_steps_are_taken() -> None:
    """halt_at_eval=False equals a fixed number of steps, also beyond N_sup."""
    params, batch = _params(SMALL), _batch()
    patient = dataclasses.replace(SMALL, halt_at_eval=False)
    out = _applied(patient)(params, batch, 0)
    fixed = _applied(SMALL)(params, batch, SMALL.supervision_steps)
    _assert_close(out, fixed)
    assert bool(jnp.all(out.ponder.steps == SMALL.supervision_steps))
    longer = _applied(SMALL)(params, batch, 7)
    assert int(longer.ponder.executed) == 7 and bool(jnp.all(longer.ponder.steps == 7))


def test_rows_do_not_depend_on_each_other() -> None:
    """A batch equals its rows one by one, and in pieces."""
    params, batch = _mixed_halting()
    run = _applied(SMALL)
    whole = run(params, batch, 0)
    for index in range(0, ROWS, 4):
        alone = run(params, _rows(batch, slice(index, index + 1)), 0)
        _assert_close(alone.logits[0], whole.logits[index])
        assert float(alone.ponder.steps[0, 0]) == float(whole.ponder.steps[index, 0])


def test_rows_that_leave_the_batch() -> None:
    """Step-by-step inference with compaction gives what apply gives, and computes less."""
    params, batch = _mixed_halting()
    model = make_trm(SHAPE, SMALL)
    out, row_steps = jax.jit(with_early_exit(model))(params, batch)
    whole = _applied(SMALL)(params, batch, 0)
    _assert_close(out.logits, whole.logits)
    np.testing.assert_array_equal(out.ponder.steps, whole.ponder.steps)
    np.testing.assert_array_equal(out.ponder.forced, whole.ponder.forced)
    assert row_steps < ROWS * int(whole.ponder.executed)


@pytest.mark.parametrize(
    "settings",
    [SMALL, _mlp(SMALL), dataclasses.replace(SMALL, conv_size=3)],
    ids=["attention", "mlp", "convolution"],
)
def test_padding_never_matters(settings: TrmSettings) -> None:
    """Whatever stands at masked cells changes neither answers nor gradients."""
    params, batch = _params(settings), _batch(valid=LENGTH - 3)
    other = dataclasses.replace(
        batch,
        inputs=jnp.where(batch.input_mask, batch.inputs, 1_000_000),
        targets=jnp.where(batch.target_mask, batch.targets, -100),
    )
    net, task = make_net(SHAPE, settings), _task()

    @jax.jit
    def graded(params: Params, batch: Batch) -> Any:
        def loss(params: Params) -> Any:
            carry = init_carry(settings, batch)
            logits, q, used, _ = supervise(net, params, carry, batch, jax.random.key(0))
            cells, halting, extra = scored_rows(task, logits, q, used)
            return cells.total + halting.total, (cells, halting, extra)

        return jax.value_and_grad(loss, has_aux=True)(params)

    _assert_close(graded(params, batch), graded(params, other), atol=0)
    run = _applied(settings)
    valid = slice(0, LENGTH - 3)
    out, out_2 = run(params, batch, 0), run(params, other, 0)
    np.testing.assert_array_equal(out.logits[:, valid], out_2.logits[:, valid])
    np.testing.assert_array_equal(out.ponder.steps, out_2.ponder.steps)


def test_filling_rows_cost_and_count_nothing() -> None:
    """A row without valid cells takes no step, is not counted and makes room in training."""
    params, batch = _params(SMALL), _batch()
    absent = jnp.arange(ROWS) == 2
    mask = batch.input_mask & ~absent[:, None]
    batch = dataclasses.replace(batch, input_mask=mask, target_mask=mask)
    out = _applied(SMALL)(params, batch, 0)
    np.testing.assert_array_equal(out.ponder.mask[:, 0], ~absent)
    assert float(out.ponder.steps[2, 0]) == 0 and bool(jnp.all(jnp.isfinite(out.logits)))
    objective, first = trm_objective(_task(), make_trm(SHAPE, SMALL), SMALL)
    scored = jax.jit(objective)(params, first(batch), batch, jax.random.key(0), jnp.zeros(()))
    assert bool(scored.carry.halted[2]) and not bool(scored.outputs.ponder.mask[2, 0])
    assert int(scored.terms["halting"].ratio.count) == ROWS - 1
    assert all(bool(jnp.isfinite(term.ratio.total)) for term in scored.terms.values())


def test_one_trace_per_shape() -> None:
    """Another batch, other weights and another key compile nothing new; the carry is donated."""
    settings, traces = SMALL, []
    net = make_net(SHAPE, settings)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Params, carry: TrmCarry, fresh: Batch, key: jax.Array) -> TrmCarry:
        traces.append(0)
        return supervise(net, params, carry, fresh, key)[3]

    carry = init_carry(settings, _batch())
    for seed in range(3):
        carry = step(_params(settings), carry, _batch(seed), jax.random.key(seed))
    assert len(traces) == 1


def test_reduced_precision_keeps_float32_outputs() -> None:
    """bfloat16 is for activations: logits and halting stay float32 and close."""
    half = dataclasses.replace(SMALL, dtype="bfloat16", halt_at_eval=False)
    params, batch = _params(SMALL), _batch()
    low, full = _applied(half)(params, batch, 1), _applied(SMALL)(params, batch, 1)
    assert low.logits.dtype == jnp.float32
    assert float(jnp.abs(low.logits - full.logits).max()) < 0.3


@pytest.mark.parametrize(
    ("shape", "change", "words"),
    [
        (TaskShape("vector", 8, 8), {}, "grids"),
        (SHAPE, {"heads": 3}, "heads"),
        (SHAPE, {"heads": 8}, "fours"),
        (TaskShape("grid", 8, 6, 1, 6), {}, "square"),
        (SHAPE, {"mixer": "mlp"}, "rope2d"),
        (SHAPE, {"mixer": "convolution"}, "convolution"),
        (SHAPE, {"conv_size": 2}, "odd"),
        (TaskShape("grid", 8, 6, 1, 6), {"conv_size": 3, "pos": "learned"}, "square"),
        (SHAPE, {"cycles": 0}, "cycles"),
        (SHAPE, {"halt_exploration": 1.5}, "halt_exploration"),
    ],
)
def test_settings_that_do_not_fit(shape: TaskShape, change: dict[str, Any], words: str) -> None:
    """One line names what is wrong."""
    with pytest.raises(UserError, match=words) as caught:
        make_trm(shape, dataclasses.replace(SMALL, **change))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Deep supervision


def test_halted_rows_are_replaced_by_fresh_ones() -> None:
    """Only halted rows take fresh examples, new latents and a new count."""
    net, params = make_net(SHAPE, SMALL), _params(SMALL)
    never = params | {"halt": jax.tree.map(lambda x: x - 1e6, params["halt"])}
    old, fresh, key = _batch(1), _batch(2), jax.random.key(0)
    step = jax.jit(lambda carry, fresh: supervise(net, never, carry, fresh, key))
    *_, used, first = step(init_carry(SMALL, old), old)
    _assert_close(used, old)
    assert bool(jnp.all(first.steps == 1)) and not bool(jnp.any(first.halted))

    halted = jnp.arange(ROWS) % 2 == 0
    marked = dataclasses.replace(first, halted=halted)
    logits, _, used, second = step(marked, fresh)
    _assert_close(_rows(used, halted), _rows(fresh, halted))
    _assert_close(_rows(used, ~halted), _rows(old, ~halted))
    np.testing.assert_array_equal(second.steps, jnp.where(halted, 1, 2))
    # Replaced rows start over, the others go on from their own latents.
    start_over = step(init_carry(SMALL, fresh), fresh)
    go_on = step(first, fresh)
    _assert_close(logits[halted], start_over[0][halted])
    _assert_close(logits[~halted], go_on[0][~halted])


def test_rows_leave_by_belief_or_at_the_limit() -> None:
    """q > 0 ends a row, but not before its own minimum; the limit ends every row."""
    settings = dataclasses.replace(SMALL, halt_exploration=1.0)
    net, batch, key = make_net(SHAPE, settings), _batch(), jax.random.key(3)
    params = _params(settings)
    sure = params | {"halt": {"kernel": 0 * params["halt"]["kernel"], "bias": jnp.ones(1)}}
    unsure = params | {"halt": {"kernel": 0 * params["halt"]["kernel"], "bias": -jnp.ones(1)}}
    step = jax.jit(lambda params, carry: supervise(net, params, carry, batch, key)[3])
    need = draw_min_steps(settings, key, jnp.arange(ROWS))
    assert set(np.asarray(need)) == {2, 3, 4}
    carry = init_carry(settings, batch)
    for count in range(1, settings.supervision_steps + 1):
        carry = step(sure, dataclasses.replace(carry, halted=carry.halted & (count == 1)))
        np.testing.assert_array_equal(carry.halted, need <= count)
        np.testing.assert_array_equal(carry.believed, need <= count)
    carry = init_carry(settings, batch)
    for count in range(1, settings.supervision_steps + 1):
        carry = step(unsure, carry)
        assert bool(jnp.all(carry.halted)) is (count == settings.supervision_steps)
        assert not bool(jnp.any(carry.believed))
    assert bool(jnp.all(draw_min_steps(SMALL, key, jnp.arange(ROWS)) == 1))


def test_a_shard_equals_its_part_of_the_batch() -> None:
    """Draws follow the row number, so a batch may be split over devices."""
    settings = dataclasses.replace(SMALL, halt_exploration=0.5)
    net, params, key = make_net(SHAPE, settings), _params(settings), jax.random.key(0)
    step = jax.jit(lambda carry, fresh: supervise(net, params, carry, fresh, key))
    batch = _batch(rows=8)
    carry = init_carry(settings, batch)
    whole = step(carry, batch)
    assert len(set(np.asarray(whole[3].min_steps))) > 1
    half = slice(4, 8)
    _assert_close(step(_rows(carry, half), _rows(batch, half)), _rows(whole, half))


def test_objective_terms() -> None:
    """The trainer gets both losses, the batch in use, and the steps of rows that leave."""
    settings = dataclasses.replace(SMALL, supervision_steps=1)
    task = _task()
    objective, first = trm_objective(task, make_trm(SHAPE, settings), settings)
    batch, params = _batch(), _params(settings)
    scored = jax.jit(objective)(params, first(batch), batch, jax.random.key(0), jnp.zeros(()))
    net = make_net(SHAPE, settings)
    again = jax.jit(lambda carry: supervise(net, params, carry, batch, jax.random.key(0)))
    logits, q, *_ = again(first(batch))
    terms = scored.terms
    assert set(terms) == {"classification", "halting", "ponder"}
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    _assert_close(terms["classification"].ratio.value, cross_entropy.mean())
    # No random row is right, so the halting head should say no to all.
    _assert_close(terms["halting"].ratio.value, jax.nn.softplus(q).mean())
    assert float(terms["halting"].weight) == settings.halt_loss_weight
    np.testing.assert_array_equal(scored.outputs.ponder.forced[:, 0], q <= 0)
    assert bool(scored.outputs.ponder.mask.all()) and int(scored.carry.steps.sum()) == ROWS
    _assert_close(scored.used, batch)


def test_latents_start_orthogonal_and_unit() -> None:
    """Both start vectors have unit root mean square and do not overlap."""
    y, z = Latents(*(v[0, 0] for v in initial_latents(SMALL, 1, 1)))
    _assert_close((jnp.mean(y**2), jnp.mean(z**2), jnp.mean(y * z)), (1.0, 1.0, 0.0))


def _mazes(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Mazes with a shortest path of at least `side` moves; tokens and labels int32 [count, S]."""
    rng = np.random.default_rng(0)
    made: list[tuple[np.ndarray, np.ndarray]] = []
    while len(made) < count:
        is_open = rng.random(side * side) > 0.35
        start = int(rng.integers(side * side))
        came_from, front = {start: start}, [start]
        for cell in front:  # breadth first: the list grows while it is read
            row, column = divmod(cell, side)
            for r, c in (
                (row - 1, column),
                (row, column - 1),
                (row + 1, column),
                (row, column + 1),
            ):
                there = r * side + c
                inside = 0 <= r < side and 0 <= c < side
                if inside and is_open[there] and there not in came_from:
                    came_from[there] = cell
                    front.append(there)
        path = [front[-1]]
        while path[-1] != start:
            path.append(came_from[path[-1]])
        if len(path) <= side:
            continue
        tokens = np.where(is_open, 2, 1)
        tokens[start], tokens[path[0]] = 3, 4
        label = tokens.copy()
        label[path[1:-1]] = 5
        made.append((tokens, label))
    tokens, labels = (np.stack(part).astype(np.int32) for part in zip(*made, strict=True))
    return tokens, labels


@pytest.mark.slow
def test_learns_sixteen_mazes_by_heart() -> None:
    """A few hundred optimiser steps fit 16 mazes, and the halting head knows it."""
    tokens, labels = (jnp.asarray(x) for x in _mazes(16, 6))
    full = jnp.ones(tokens.shape, bool)
    empty = jnp.zeros((16, 0), jnp.int32)
    batch = Batch(tokens, full, labels, full, empty, jnp.zeros(16, jnp.int32))
    shape = TaskShape("grid", 36, 6, 1, 6)
    settings = TrmSettings(
        hidden_size=32, heads=2, inner_cycles=2, cycles=2, supervision_steps=4, halt_bias=-2.0
    )
    model = make_trm(shape, settings)
    objective, first = trm_objective(_task(shape), model, settings)
    optimizer = optax.adamw(3e-3, weight_decay=0.01)

    @jax.jit
    def train(params: Params, state: Any, carry: TrmCarry, key: jax.Array) -> Any:
        def step(loop: Any, key: jax.Array) -> Any:
            params, state, carry = loop

            def loss(params: Params) -> Any:
                scored = objective(params, carry, batch, key, jnp.zeros(()))
                return sum(t.weight * t.ratio.value for t in scored.terms.values()), scored.carry

            grads, carry = jax.grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, carry), None

        return jax.lax.scan(step, (params, state, carry), jax.random.split(key, 50))[0]

    params = jax.jit(model.init)(jax.random.key(0))
    loop = (params, optimizer.init(params), first(batch))
    evaluate = jax.jit(model.apply)
    for call in range(8):
        loop = train(*loop, jax.random.key(call))
        out = evaluate(loop[0], batch)
        right = jnp.all(jnp.argmax(out.logits, -1) == labels, axis=1)
        if bool(right.all()) and not bool(out.ponder.forced.any()):
            return
    pytest.fail(f"{int(right.sum())} of 16 mazes right, forced {int(out.ponder.forced.sum())}")
