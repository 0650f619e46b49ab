"""Trials of other operators and lookaheads, against episodes in plain Python."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax import branch_losses
from reoac_jax.episodes import Branches, Episodes
from reoac_jax.rollout import rollout_plus
from reoac_jax.settings import Agent, RolloutSettings, evaluation_settings, training_settings
from reoac_jax.types import OPERATORS
from tests.reoac_jax.plain_rollout import KEY, double, plain_episode
from tests.reoac_jax.toy_setting import (
    toy_agent,
    toy_backbone,
    toy_canvas,
    toy_params,
    toy_settings,
    toy_tables,
)

BACKBONE = toy_backbone()
ROWS = [0, 1, 2, 3, 4, 5]
STEPS = (0, 2)
BRANCH = OPERATORS.index("O_BRANCH")
PLAIN = toy_settings(selection_mode="argmax", price=0.05, branch_k=3)
AGENT = toy_agent(PLAIN, BACKBONE, "plus")
PARAMS = toy_params(BACKBONE, eos_bias=2.0)
PLAIN_AGENT = Agent(double(AGENT.actor), double(AGENT.critic), AGENT.stats)


def roll(settings: RolloutSettings) -> Episodes:
    compiled = jax.jit(functools.partial(rollout_plus, BACKBONE, settings))
    return jax.device_get(
        compiled(toy_tables(), PARAMS, AGENT, toy_canvas(ROWS), jax.random.key(KEY))
    )


def episode(row: int, forced: dict[int, int] | None = None) -> list[dict[str, Any]]:
    return plain_episode(PLAIN, double(PARAMS), PLAIN_AGENT, toy_canvas(ROWS), row, forced)


def best_operators(decision: dict[str, Any], count: int) -> list[int]:
    order = sorted(range(5), key=lambda a: (-decision["q"][a], a))
    return [a for a in order if decision["valid"][a]][:count]


@pytest.fixture(scope="module")
def tried() -> Episodes:
    return roll(dataclasses.replace(PLAIN, tried_steps=STEPS))


@pytest.mark.parametrize("row", ROWS)
def test_trials_are_episodes_with_one_operator_forced(tried: Episodes, row: int) -> None:
    branches: Any = tried.branches
    usual = episode(row)
    for s, step in enumerate(STEPS):
        count = 0
        if step < len(usual):
            wanted = best_operators(usual[step], 3)
            for k, operator in enumerate(wanted):
                decisions = episode(row, {step: operator})
                assert branches.operator[row, s, k] == operator
                assert branches.tried[row, s, k]
                assert branches.final_ids[row, s, k].tolist() == decisions[-1]["after"]
                price = sum(d["cost"] for d in decisions[step:])
                assert branches.cost[row, s, k] == pytest.approx(price, rel=1e-6)
            count = len(wanted)
        assert not branches.tried[row, s, count:].any()
        assert branches.step[row, s] == step
    assert not branches.estimate.any() and not branches.reward.any()


def test_trials_leave_the_episode_alone(tried: Episodes) -> None:
    bare = roll(PLAIN)
    for name in ("final_ids", "num_steps", "num_forwards", "cost"):
        np.testing.assert_array_equal(getattr(tried, name), getattr(bare, name))
    jax.tree.map(np.testing.assert_array_equal, tried.steps, bare.steps)


def plain_branch(row: int, step: int, operator: int, depth: int) -> tuple[float, list[int]]:
    """Value of a branch of `depth` decisions, and the canvas at its end."""
    decisions = episode(row, {step: operator})
    inside = decisions[step : step + depth]
    after = decisions[step + depth] if len(decisions) > step + depth else None
    price = sum(d["cost"] for d in inside)
    if after is not None:
        value = float(after["policy"] @ after["q"]) - PLAIN.price * price
    else:
        last = inside[-1]
        value = float(last["q"][last["operator"]]) - PLAIN.price * (price - last["cost"])
    return value, inside[-1]["after"]


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_trials_that_are_cut_off_end_in_the_critic(depth: int) -> None:
    branches: Any = roll(dataclasses.replace(PLAIN, tried_steps=STEPS, tried_depth=depth)).branches
    value = branches.estimate - PLAIN.price * branches.cost
    checked = 0
    for row in ROWS:
        for s, step in enumerate(STEPS):
            for k in np.flatnonzero(branches.tried[row, s]):
                operator = int(branches.operator[row, s, k])
                wanted, canvas = plain_branch(row, step, operator, depth)
                assert value[row, s, k] == pytest.approx(wanted, abs=2e-4)
                assert branches.final_ids[row, s, k].tolist() == canvas
                checked += 1
    assert checked > len(ROWS)


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_branching_takes_over_the_most_valued_branch(depth: int) -> None:
    specs = list(PLAIN.operators.specs)
    specs[BRANCH] = specs[BRANCH]._replace(branch_depth=depth)
    settings = dataclasses.replace(
        PLAIN,
        operators=PLAIN.operators._replace(specs=tuple(specs)),
        branching=True,
        planned_steps=(0,),
    )
    episodes = roll(settings)
    for row in ROWS:
        first = episode(row)[0]
        found = [plain_branch(row, 0, operator, depth) for operator in best_operators(first, 3)]
        values = [value for value, _ in found]
        assert sorted(values)[-1] - sorted([*values, -9.0, -9.0])[-2] > 1e-4, "a tie tests nothing"
        canvas = found[int(np.argmax(values))][1]
        ended = int(episodes.num_steps[row]) == 1
        after = episodes.final_ids[row] if ended else episodes.steps.gen_before[row, 1]
        assert after.tolist() == canvas
        assert episodes.steps.operator[row, 0] == BRANCH and episodes.steps.valid[row, 0, BRANCH]
        assert episodes.steps.cost[row, 0] == pytest.approx(2 + depth)
        operators = episodes.steps.operator[row, : int(episodes.num_steps[row])]
        passes = len(operators) + 3 * depth * int((operators == BRANCH).sum())
        assert episodes.num_forwards[row] == passes
        # Only what the first decision wrote counts as written by this step.
        written = episodes.steps.written[row, 0]
        assert written.any() and (np.asarray(canvas)[written] != BACKBONE.mask_id).all()
    # With nothing left to look ahead to, O_BRANCH is void.
    assert not episodes.steps.valid[:, settings.max_steps - 1, BRANCH][
        episodes.steps.active[:, settings.max_steps - 1]
    ].any()


def made_up_branches() -> Branches:
    """Two episodes, one step, two trials each; the second episode tried one operator only."""
    return Branches(
        step=jnp.asarray([[1], [1]]),
        operator=jnp.asarray([[[0, 4]], [[2, 1]]]),
        tried=jnp.asarray([[[True, True]], [[True, False]]]),
        cost=jnp.asarray([[[2.0, 4.0]], [[1.0, 9.0]]]),
        estimate=jnp.zeros((2, 1, 2)),
        reward=jnp.asarray([[[1.0, 0.0]], [[1.0, 1.0]]]),
        final_ids=jnp.zeros((2, 1, 2, 3), jnp.int32),
    )


def test_outcomes_become_advantages_over_the_policys_mean() -> None:
    seen = jnp.arange(12.0).reshape(2, 2, 3)
    policy = jnp.full((2, 2, 5), 0.2).at[0, 1].set(jnp.asarray([0.6, 0.1, 0.1, 0.0, 0.2]))
    trials = branch_losses.tried_operators(
        made_up_branches(), seen, policy, jnp.ones((2, 2, 5), bool), price=0.1
    )
    np.testing.assert_array_equal(trials.seen, [[3, 4, 5], [9, 10, 11]])
    np.testing.assert_allclose(trials.outcome[0], [0.8, -0.4], atol=1e-6)
    mean = 0.75 * 0.8 + 0.25 * -0.4
    centred = np.asarray([0.8 - mean, -0.4 - mean])
    np.testing.assert_allclose(
        trials.advantage[0], centred / np.sqrt(np.mean(centred**2)), rtol=1e-5
    )
    # A single trial says nothing about the choice, but it still teaches the critic.
    np.testing.assert_array_equal(trials.advantage[1], [0, 0])
    assert trials.tried[1].tolist() == [True, False]


def test_gradients_reach_what_was_tried_and_nothing_else() -> None:
    trials = branch_losses.tried_operators(
        made_up_branches(),
        jnp.zeros((2, 2, 3)),
        jnp.full((2, 2, 5), 0.2),
        jnp.ones((2, 2, 5), bool),
        price=0.1,
    )
    gradient = jax.grad(lambda q: branch_losses.tried_critic_loss(q, trials)[0])(jnp.zeros((2, 5)))
    assert (np.asarray(gradient) != 0).tolist() == [
        [True, False, False, False, True],
        [False, False, True, False, False],
    ]
    # Huber: the slope is the error, over the three trials.
    np.testing.assert_allclose(gradient[0, 0], -0.8 / 3, rtol=1e-5)
    slope = jax.grad(lambda x: branch_losses.tried_policy_loss(x, trials)[0])(jnp.zeros((2, 5)))
    assert slope[0, 0] < 0 < slope[0, 4]  # towards the better operator
    np.testing.assert_allclose(slope[1], 0.0, atol=1e-7)


def test_settings_of_training_and_evaluation() -> None:
    from reoac_jax.defaults import get_default_config

    config = get_default_config()
    config.rollout.branch_steps = (4, 1)
    training, evaluation = training_settings(config), evaluation_settings(config)
    assert training.tried_steps == (1, 4) and training.tried_depth == 0
    assert not training.planned_steps and not evaluation.planned_steps
    config.rollout.branching, config.rollout.branch_horizon = True, "depth"
    assert training_settings(config).tried_depth == config.rollout.branch_depth
    assert evaluation_settings(config).planned_steps == (1, 4)
    assert not evaluation_settings(config).tried_steps
    config.algo = "paper"
    assert not training_settings(config).tried_steps
