"""The halting recurrence: against plain Python, executions against each other, gradients."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from halting_jax.act import ActResult, act
from halting_jax.act_calls import act_calls
from halting_jax.act_progress import act_advance, act_finish, act_start
from halting_jax.act_step import EXECUTIONS, ActSettings, init_act
from halting_jax.cells import CELLS, input_product

ROWS, INPUTS, HIDDEN, LIMIT = 6, 3, 5, 7


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Differences between executions must be rounding, not single precision."""
    with jax.enable_x64(True):
        yield


def weights(cell: str, halt_bias: float = -1.0, sharpness: float = 4.0) -> Any:
    """Weights whose rows halt at different steps."""
    params = init_act(jax.random.key(1), cell, INPUTS, HIDDEN, halt_bias)
    params["halting"]["kernel"] *= sharpness
    return jax.tree.map(lambda x: x.astype(jnp.float64), params)


def inputs(cell: str, rows: int = ROWS) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """x [B, I] and a state with every entry the cell has."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, INPUTS)))
    state = tuple(
        jnp.asarray(rng.normal(size=(rows, HIDDEN))) for _ in range(CELLS[cell].num_states)
    )
    return x, state


def settings(cell: str, execution: str = "while", **changes: Any) -> ActSettings:
    return ActSettings(cell, LIMIT, execution=execution, chunk=3, **changes)


def call(params: Any, x: jax.Array, state: Any, how: ActSettings, **options: Any) -> ActResult:
    return act(params, input_product(params["cell"], x), state, how, **options)


# ----------------------------------------------------------------------------- plain Python
def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def plain_cell(cell: str, params: Any, x: Any, first: bool, state: list[Any]) -> list[Any]:
    """One step of one row, written from the published equations."""
    weights = params["cell"]
    a = np.append(x, float(first)) @ weights["input"]["kernel"] + weights["input"]["bias"]
    u = state[0] @ weights["state"]["kernel"] + weights["state"]["bias"]
    if cell == "tanh_rnn":
        return [np.tanh(a + u)]
    h = HIDDEN
    if cell == "gru":
        r, z = sigmoid((a + u)[:h]), sigmoid((a + u)[h : 2 * h])
        n = np.tanh(a[2 * h :] + r * u[2 * h :])
        return [(1 - z) * n + z * state[0]]
    i, f, g, o = np.split(a + u, 4)
    c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
    return [sigmoid(o) * np.tanh(c), c]


def plain_act(cell: str, params: Any, x: Any, state: list[Any]) -> tuple[list[Any], int, float]:
    """Graves 2016 for one row: mixed state, N, R."""
    kernel, bias = params["halting"]["kernel"][:, 0], params["halting"]["bias"][0]
    halting: list[float] = []
    states: list[list[Any]] = []
    for n in range(1, LIMIT + 1):
        state = plain_cell(cell, params, x, n == 1, state)
        states.append(state)
        halting.append(float(sigmoid(state[0] @ kernel + bias)))
        if sum(halting) >= 1 - 0.01:
            break
    remainder = 1 - sum(halting[:-1])
    p = [*halting[:-1], remainder]
    mixed = [sum(w * s[k] for w, s in zip(p, states, strict=True)) for k in range(len(state))]
    return mixed, len(states), remainder


@pytest.mark.parametrize("cell", CELLS)
def test_equations(cell: str) -> None:
    params, (x, state) = weights(cell, -1.5), inputs(cell)
    result = jax.device_get(call(params, x, state, settings(cell)))
    params = jax.device_get(params)
    found = set()
    for row in range(ROWS):
        mixed, steps, remainder = plain_act(
            cell, params, np.asarray(x[row]), [np.asarray(s[row]) for s in state]
        )
        for got, wanted in zip(result.state, mixed, strict=True):
            np.testing.assert_allclose(got[row], wanted, atol=1e-12)
        assert result.steps[row] == steps
        np.testing.assert_allclose(result.remainder[row], remainder, atol=1e-12)
        np.testing.assert_allclose(result.cost[row], steps + remainder, atol=1e-12)
        found.add(steps)
    assert len(found) > 1
    assert result.mass[-1] == pytest.approx(ROWS)


@pytest.mark.parametrize("count", [1, LIMIT + 3])
def test_fixed_steps_repeat_the_cell(count: int) -> None:
    params, (x, state) = weights("lstm"), inputs("lstm")
    valid = jnp.arange(ROWS) != 2
    how = settings("lstm")
    result = jax.device_get(call(params, x, state, how, valid=valid, fixed_steps=count))
    params = jax.device_get(params)
    for row in range(ROWS):
        last = [np.asarray(s[row]) for s in state]
        for n in range(count if row != 2 else 0):
            last = plain_cell("lstm", params, np.asarray(x[row]), n == 0, last)
        for got, wanted in zip(result.state, last, strict=True):
            np.testing.assert_allclose(got[row], wanted, atol=1e-12)
    np.testing.assert_array_equal(result.steps, np.where(valid, count, 0))
    assert result.executed == count and not np.any(result.cost)


# ------------------------------------------------------------------------------- executions
def graded(cell: str, execution: str, num_states: int, halt_bias: float) -> Any:
    """Values and gradients by everything differentiable, one row invalid."""
    params, (x, state) = weights(cell, halt_bias), inputs(cell)
    valid = jnp.arange(ROWS) != 1
    rng = np.random.default_rng(1)
    probe = [jnp.asarray(rng.normal(size=s.shape)) for s in state]

    def objective(params: Any, x: jax.Array, state: Any) -> Any:
        result = call(params, x, state, settings(cell, execution), valid=valid)
        value = sum(jnp.sum(a * b) for a, b in zip(result.state, probe, strict=False))
        return value + jnp.sum(result.cost * jnp.arange(1, ROWS + 1)), result

    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))
    return jax.device_get(run(params, x, state[:num_states]))


@pytest.mark.parametrize(
    ("cell", "num_states", "halt_bias"), [("gru", 1, -1.0), ("lstm", 2, -1.5), ("lstm", 1, -1.0)]
)
def test_executions_agree(cell: str, num_states: int, halt_bias: float) -> None:
    runs = {execution: graded(cell, execution, num_states, halt_bias) for execution in EXECUTIONS}
    (_, wanted), wanted_grads = runs["scan"]
    steps = int(wanted.steps.max())
    assert steps > 3 and np.any(wanted.steps < steps)
    # "while" stops with the slowest row, "chunked" at the end of its chunk.
    assert [int(runs[e][0][1].executed) for e in ("while", "chunked", "scan")] == [
        steps,
        min(3 * -(-steps // 3), LIMIT),
        LIMIT,
    ]
    for execution in ("while", "chunked"):
        (_, result), grads = runs[execution]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
            (dataclasses.replace(result, executed=0), grads),
            (dataclasses.replace(wanted, executed=0), wanted_grads),
        )
    # The row that is not valid: nothing happens, and gradients pass it by.
    assert wanted.steps[1] == wanted.cost[1] == 0
    np.testing.assert_array_equal(wanted_grads[1][1], 0)
    np.testing.assert_array_equal(wanted.state[0][1], inputs(cell)[1][0][1])


def test_one_trace_serves_all_counts() -> None:
    traces = 0

    @jax.jit
    def run(bias: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        params, (x, state) = weights("gru"), inputs("gru")
        params["halting"]["bias"] = bias

        def cost(params: Any) -> jax.Array:
            result = call(params, x, state, settings("gru"))
            return jnp.sum(result.cost), result.executed

        return jax.grad(cost, has_aux=True)(params)[1]

    counts = [int(run(jnp.full((1,), bias))) for bias in (40.0, -1.0, -40.0)]
    assert counts[0] == 1 < counts[1] and counts[2] == LIMIT
    assert traces == 1


# -------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_only_rows_that_ponder_move_the_halting_unit(execution: str) -> None:
    params, (x, state) = weights("tanh_rnn", 1.0, 40.0), inputs("tanh_rnn")

    def by_halting() -> Any:
        def cost(halting: Any, row: int) -> Any:
            how = settings("tanh_rnn", execution)
            result = call(params | {"halting": halting}, x, state, how)
            return result.cost[row] + jnp.sum(result.state[0][row]), result.steps

        return jax.jit(jax.vmap(jax.grad(cost, has_aux=True), (None, 0)))(
            params["halting"], jnp.arange(ROWS)
        )

    grads, steps = jax.device_get(by_halting())
    at_once = steps[0] == 1
    assert 0 < at_once.sum() < ROWS
    for leaf in jax.tree.leaves(grads):
        per_row = np.abs(leaf).reshape(ROWS, -1).sum(axis=1)
        np.testing.assert_array_equal(per_row[at_once], 0)
        assert np.all(per_row[~at_once] > 0)


def test_ponder_gradient_is_minus_the_halting_probabilities() -> None:
    """d(N + R)/dh^n is -1 for n < N and 0 for n = N; through the bias, dh/db = h (1 - h)."""
    params, (x, state) = weights("tanh_rnn"), inputs("tanh_rnn")
    params["cell"]["state"]["kernel"] *= 0  # states without memory: h^n depends on n = 1 alone

    def cost(bias: jax.Array) -> Any:
        halting = {"kernel": params["halting"]["kernel"], "bias": bias}
        result = call(params | {"halting": halting}, x, state, settings("tanh_rnn"))
        return jnp.sum(result.cost), result.steps

    slope, steps = jax.grad(cost, has_aux=True)(params["halting"]["bias"])
    flag, a = params["cell"]["input"]["kernel"][-1], input_product(params["cell"], x)
    u = params["cell"]["state"]["bias"]
    kernel, bias = params["halting"]["kernel"][:, 0], params["halting"]["bias"]
    h = [jax.nn.sigmoid(jnp.tanh(a + f + u) @ kernel + bias) for f in (flag, 0 * flag)]
    wanted = -sum(
        h[n > 0][row] * (1 - h[n > 0][row])
        for row in range(ROWS)
        for n in range(int(steps[row]) - 1)
    )
    np.testing.assert_allclose(slope[0], wanted, atol=1e-12)


# ---------------------------------------------------------------------------------- numerics
def test_halting_stays_in_float32_with_bfloat16_products() -> None:
    single = jax.tree.map(lambda x: np.asarray(x, np.float32), (weights("gru"), inputs("gru")))
    with jax.enable_x64(False):
        params, (x, state) = jax.tree.map(jnp.asarray, single)
        full = call(params, x, state, settings("gru"))
        how = settings("gru", dtype="bfloat16")
        product = input_product(params["cell"], x, "bfloat16")

        def cost(params: Any) -> Any:
            result = act(params, product, state, how)
            return jnp.sum(result.cost), result

        grads, half = jax.grad(cost, has_aux=True)(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, half.cost, half.state))} == {
        np.dtype("float32")
    }
    np.testing.assert_allclose(half.state[0], full.state[0], atol=0.05)
    assert np.any(np.asarray(half.state[0]) != np.asarray(full.state[0]))


@pytest.mark.parametrize(
    "changes",
    [{"cell": "elman"}, {"time_limit": 0}, {"epsilon": 1.0}, {"execution": "loop"}, {"chunk": 0}],
    ids=str,
)
def test_bad_settings_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=str(next(iter(changes.values())))):
        ActSettings(**changes)


# -------------------------------------------------------------------------------- many calls
def frames() -> tuple[jax.Array, jax.Array]:
    """x [B, C, I] and which calls are valid: all, none, holes, a prefix."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 5, INPUTS)))
    valid = [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [1, 1, 0, 0, 0]]
    return x, jnp.asarray(valid, bool)


@pytest.mark.parametrize(("execution", "num_states"), [("while", 2), ("while", 1), ("chunked", 2)])
def test_calls_in_sequence(execution: str, num_states: int) -> None:
    params, (_, state) = weights("lstm"), inputs("lstm", 4)
    state = state[:num_states]
    x, valid = frames()

    def objective(params: Any, x: jax.Array, state: Any, execution: str) -> Any:
        how = settings("lstm", execution)
        products = input_product(params["cell"], x)
        calls = act_calls(params, products, state, how, valid=valid)
        return jnp.sum(calls.hidden**2) + jnp.sum(calls.state[-1]) + jnp.sum(calls.cost), calls

    def run(execution: str) -> Any:
        grad = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
        return jax.device_get(jax.jit(grad, static_argnums=3)(params, x, state, execution))

    (_, wanted), wanted_grads = run("scan")
    (_, calls), grads = run(execution)
    assert wanted.executed == 5 * LIMIT
    if execution == "while":  # every row at its own pace
        assert calls.executed == wanted.steps.sum(axis=1).max() < wanted.steps.max(axis=0).sum()
    else:
        assert calls.executed < wanted.executed
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
        (dataclasses.replace(calls, executed=0), grads),
        (dataclasses.replace(wanted, executed=0), wanted_grads),
    )
    np.testing.assert_array_equal(calls.steps > 0, valid)
    np.testing.assert_array_equal(calls.hidden[1], np.broadcast_to(state[0][1], (5, HIDDEN)))
    np.testing.assert_array_equal(grads[1][~np.asarray(valid)], 0)


@pytest.mark.parametrize("pieces", [1, 3])
def test_calls_in_pieces(pieces: int) -> None:
    params, (_, state) = weights("lstm"), inputs("lstm", 4)
    x, valid = frames()
    products = input_product(params["cell"], x)
    wanted = act_calls(params, products, state, settings("lstm", "scan"), valid=valid)
    progress = act_start(products, state, settings("lstm"), valid)
    advance = jax.jit(act_advance, static_argnums=2)
    rounds = 0
    while np.any(progress.carry.running):
        # Rows may be in any order.
        progress = jax.tree.map(lambda leaf: leaf[::-1], advance(params, progress, pieces))
        rounds += 1
    if rounds % 2:
        progress = jax.tree.map(lambda leaf: leaf[::-1], progress)
    calls = act_finish(progress)
    total = int(jnp.max(jnp.sum(wanted.steps, axis=1)))
    assert rounds == -(-total // pieces) and calls.executed == total
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
        dataclasses.replace(calls, executed=0),
        dataclasses.replace(wanted, executed=0),
    )
