"""Halting per position against plain Python loops, and the executions against each other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halting_jax import ut_act
from halting_jax.signals import Signals, make_signals
from halting_jax.ut_act import HaltingRule, HopFunctions

ROWS, LENGTH, WIDTH, HOPS = 4, 5, 3, 7
RULE = HaltingRule(HOPS, 0.01)
MASK = jnp.arange(LENGTH) < jnp.array([[5], [3], [4], [1]])
STATE = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, WIDTH))
SIGNALS = make_signals(LENGTH, WIDTH, HOPS)
WEIGHTS = {
    "halt": jnp.array([1.5, -2.5, 0.5]),
    "bias": jnp.float32(-2.0),
    "block": jnp.eye(WIDTH) * 0.8 + 0.1,
}


def functions(weights: Any, signals: Signals = SIGNALS) -> HopFunctions:
    """A block that mixes positions, so that halted ones are seen by the others."""

    def probability(state: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(state @ weights["halt"] + weights["bias"])

    def block(state: jax.Array) -> jax.Array:
        return jnp.tanh(state @ weights["block"]) + 0.1 * jnp.mean(state, axis=1, keepdims=True)

    return HopFunctions(signals, probability, block)


def begin() -> ut_act.HopCarry:
    return ut_act.start(STATE, MASK)


def plain_python(rule: HaltingRule) -> dict[str, np.ndarray]:
    """The rules position by position in float64, without masks."""
    weights = {name: np.asarray(w, np.float64) for name, w in WEIGHTS.items()}
    position, hop = (np.asarray(x, np.float64) for x in SIGNALS)
    shape = (ROWS, LENGTH)
    result = {name: np.zeros(shape) for name in ("steps", "remainder", "mass")}
    result["out"] = np.zeros((*shape, WIDTH))
    halted = ~np.asarray(MASK)
    for b in range(ROWS):
        x = np.asarray(STATE[b], np.float64)
        for t in range(rule.max_hops):
            x = x + position + hop[t]
            p = 1 / (1 + np.exp(-(x @ weights["halt"] + weights["bias"])))
            x = np.tanh(x @ weights["block"]) + 0.1 * x.mean(0)
            for s in range(LENGTH):
                if halted[b, s]:
                    continue
                mass = result["mass"][b, s]
                result["steps"][b, s] += 1
                if mass + p[s] > 1 - rule.epsilon:
                    u, halted[b, s] = 1 - mass, True
                    result["remainder"][b, s] = u
                else:
                    u = p[s]
                result["mass"][b, s] += u
                if rule.mix == "accumulated":
                    if t == rule.max_hops - 1:
                        u = 1 - mass
                    result["out"][b, s] += u * x[s]
                else:
                    result["out"][b, s] = u * x[s] + (1 - u) * result["out"][b, s]
    result["forced"] = ~halted
    return result


@pytest.mark.parametrize("mix", ["basic", "accumulated"])
def test_bookkeeping_equals_plain_python(mix: str) -> None:
    rule = dataclasses.replace(RULE, mix=mix)
    carry = jax.jit(lambda carry: ut_act.advance(carry, functions(WEIGHTS), rule, HOPS))(begin())
    ponder = ut_act.halting_ponder(carry, MASK)
    wanted = plain_python(rule)
    valid = np.asarray(MASK)
    counts = wanted["steps"][valid]
    assert wanted["forced"].any() and len(set(counts)) > 2  # halts early, late and by the limit
    np.testing.assert_array_equal(ponder.steps, wanted["steps"])
    np.testing.assert_array_equal(ponder.forced, wanted["forced"])
    np.testing.assert_allclose(ponder.remainder, wanted["remainder"], atol=1e-5)
    np.testing.assert_allclose(ponder.cost, wanted["steps"] + wanted["remainder"], atol=1e-5)
    np.testing.assert_allclose(carry.mass, wanted["mass"], atol=1e-5)
    np.testing.assert_allclose(carry.mixed[valid], wanted["out"][valid], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(carry.mixed)[~valid], 0)
    assert int(ponder.executed) == counts.max()


@pytest.mark.parametrize("bias", [-6.0, -2.0, 1.0])
def test_accumulated_weights_sum_to_one(bias: float) -> None:
    ones = HopFunctions(
        SIGNALS, functions(WEIGHTS | {"bias": bias}).probability, lambda state: state * 0 + 1
    )
    rule = dataclasses.replace(RULE, mix="accumulated")
    mixed = np.asarray(ut_act.advance(begin(), ones, rule, HOPS).mixed)
    np.testing.assert_allclose(mixed[np.asarray(MASK)], 1.0, atol=1e-6)
    np.testing.assert_array_equal(mixed[~np.asarray(MASK)], 0.0)


def test_basic_mix_is_not_convex() -> None:
    """Weights .3, .3, .4 leave the total mass .71, as in the published code."""
    third = HopFunctions(SIGNALS, lambda s: jnp.full(s.shape[:2], 0.3), lambda s: s * 0 + 1)
    carry = ut_act.advance(begin(), third, HaltingRule(HOPS, 0.15), HOPS)
    np.testing.assert_allclose(carry.mass[np.asarray(MASK)], 1.0, atol=1e-6)
    np.testing.assert_allclose(carry.mixed[np.asarray(MASK)], 1 - 0.7 * 0.7 * 0.6, atol=1e-6)


def test_executions_agree() -> None:
    def pieces(carry: ut_act.HopCarry) -> ut_act.HopCarry:
        for count in (1, 3, 2, 4):  # more than the limit: the rest must be idle
            carry = ut_act.advance(carry, functions(WEIGHTS), RULE, count)
        return carry

    whole = jax.jit(lambda c: ut_act.advance(c, functions(WEIGHTS), RULE, HOPS))(begin())
    for run in (pieces, lambda c: ut_act.run_out(c, functions(WEIGHTS), RULE)):
        other = jax.jit(run)(begin())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, other)


def test_rows_may_leave_and_meet_others_at_another_hop() -> None:
    f = functions(WEIGHTS)
    advance = jax.jit(lambda carry, count: ut_act.advance(carry, f, RULE, count), static_argnums=1)
    whole = advance(begin(), HOPS)
    early = advance(begin(), 2)
    keep = np.array([1, 3])
    # Two rows after two hops, and two rows that have not begun, in one batch.
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[keep], b[:2]]), early, begin())
    mixed = advance(mixed, HOPS)
    for place, row in enumerate([1, 3, 0, 1]):
        for name in ("mixed", "mass", "remainder", "updates", "running"):
            ours, theirs = getattr(mixed, name)[place], getattr(whole, name)[row]
            np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=name)


def test_the_block_is_skipped_once_everybody_halted() -> None:
    """A hop too many would meet a signal that is not finite."""
    hop = SIGNALS.hop.at[2:].set(jnp.nan)
    quick = functions(WEIGHTS | {"halt": jnp.zeros(WIDTH), "bias": jnp.float32(1.0)})
    quick = quick._replace(signals=Signals(SIGNALS.position, hop))
    for run in (
        lambda: ut_act.advance(begin(), quick, RULE, HOPS),
        lambda: ut_act.run_out(begin(), quick, RULE),
    ):
        carry = run()
        assert np.isfinite(carry.mixed).all() and int(carry.hop.max()) == 2
        np.testing.assert_array_equal(carry.updates, np.where(MASK, 2.0, 0.0))


def cost(weights: Any, rule: HaltingRule = RULE) -> jax.Array:
    carry = ut_act.advance(begin(), functions(weights), rule, rule.max_hops)
    return jnp.sum(jnp.where(MASK, ut_act.halting_ponder(carry, MASK).cost, 0))


def test_gradient_of_the_cost() -> None:
    """R falls as the mass before the last hop grows; counts carry no gradient."""
    gradient = jax.jit(jax.grad(cost))
    assert float(jnp.abs(gradient(WEIGHTS)["halt"]).max()) > 1e-3
    flat = {"halt": jnp.zeros(WIDTH), "bias": jnp.float32(-0.5), "block": WEIGHTS["block"]}
    p = jax.nn.sigmoid(-0.5)  # .378: halts at the third hop with R = 1 - 2 p
    wanted = -2 * p * (1 - p) * jnp.sum(MASK)
    np.testing.assert_allclose(gradient(flat)["bias"], wanted, rtol=1e-5)
    for bias in (7.0, -7.0):  # the first hop takes everything; nobody ever halts
        for value in jax.tree.leaves(gradient(flat | {"bias": jnp.float32(bias)})):
            np.testing.assert_array_equal(value, 0.0)


def test_rematerialised_gradients_are_equal() -> None:
    def loss(weights: Any, rule: HaltingRule) -> jax.Array:
        carry = ut_act.advance(begin(), functions(weights), rule, HOPS)
        ponder = ut_act.halting_ponder(carry, MASK)
        return jnp.sum(jnp.sin(carry.mixed)) + jnp.sum(jnp.where(MASK, ponder.cost, 0))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    stored, again = (gradient(WEIGHTS, dataclasses.replace(RULE, remat=r)) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stored, again)


def test_fixed_hops() -> None:
    f = functions(WEIGHTS)
    state = STATE
    for t in range(4):
        state = f.block(ut_act.add_signals(state, SIGNALS, jnp.int32(t)))
    run = jax.jit(lambda s: ut_act.fixed_hops(s, SIGNALS, f.block, 4))
    np.testing.assert_allclose(run(STATE), state, atol=1e-6)
    for charged in (False, True):
        ponder = ut_act.fixed_ponder(STATE, MASK, 4, charged)
        np.testing.assert_array_equal(ponder.steps, np.where(MASK, 4.0, 0.0))
        np.testing.assert_array_equal(ponder.cost, ponder.steps if charged else 0 * ponder.steps)
        assert not np.any(ponder.forced) and int(ponder.executed) == 4
