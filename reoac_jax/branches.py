"""Counterfactual branches: what would other operators have led to?

In training, chosen steps of an episode are left again by the operators of highest value; each trial
goes on greedily and its outcome says what the operator was worth in exactly this state
(`try_operators`). At inference O_BRANCH looks ahead in the same way and commits to the branch whose
end the critic values most (`look_ahead`): neither the gold answer nor a verifier is ever asked.

Branches of one row share its random keys, so that they differ by their operators alone.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from reoac_jax.backbone.base import Backbone
from reoac_jax.episodes import Branches
from reoac_jax.losses import mask_logits
from reoac_jax.operators import operator_costs
from reoac_jax.plus_step import (
    BRANCH,
    Cursor,
    Ground,
    Observation,
    execute,
    observe,
    select,
)
from reoac_jax.settings import RolloutSettings


class _Trial(NamedTuple):
    """One branch of every row: where it ended, its price, and the critic's word on its end."""

    cursor: Cursor
    written: jax.Array  # bool [B, G], by the first decision
    cost: jax.Array  # [B]
    estimate: jax.Array  # [B], return still to come; 0 when the episode was played to its end


class Lookahead(NamedTuple):
    """What O_BRANCH does.

    Attributes:
      cursor: the end of each row's best branch (its `step` is that of the branch, not the row's).
      written: bool [B, G], positions that the branch's first decision wrote.
      operator: [B] int32, its first operator.
      score: [B, K] float32, value of each branch; -inf where it was not tried.
    """

    cursor: Cursor
    written: jax.Array
    operator: jax.Array
    score: jax.Array


def forwards_of_lookahead(settings: RolloutSettings) -> int:
    """Backbone passes a row spends on one O_BRANCH, beside the pass of the decision itself."""
    return settings.branch_k * _depth(settings)


def _depth(settings: RolloutSettings) -> int:
    """Decisions of a branch of O_BRANCH, the forced one included; each but the last is followed by
    a pass, and so is the last: it reads the critic at the horizon."""
    return max(settings.operators.specs[BRANCH].branch_depth, 1)


def _candidates(seen: Observation, count: int) -> tuple[jax.Array, jax.Array]:
    """The valid operators of highest value, O_BRANCH excepted: ids [B, K], tried bool [B, K]."""
    open_ = seen.valid.at[:, BRANCH].set(False)
    value, operator = jax.lax.top_k(
        jnp.where(open_, seen.q, -jnp.inf), min(count, seen.q.shape[1] - 1)
    )
    return operator.astype(jnp.int32), value > -jnp.inf


def _policy_value(seen: Observation) -> jax.Array:
    """sum_a pi(a) Q(a) [B]."""
    policy = jax.nn.softmax(mask_logits(seen.logits, seen.valid), axis=-1)
    return jnp.sum(policy * seen.q, axis=-1)


def _follow(
    backbone: Backbone,
    settings: RolloutSettings,
    ground: Ground,
    cursor: Cursor,
    seen: Observation,
    operator: jax.Array,
    key: jax.Array,
    depth: int,
) -> _Trial:
    """Executes operator [B] and goes on greedily, without further branches.

    Args:
      depth: decisions, the first included; 0 = until every row is done.
    """
    settings = dataclasses.replace(settings, save_relation=False)
    cursor = dataclasses.replace(cursor, relation=jnp.zeros((*cursor.done.shape, 0, 0)))
    costs = operator_costs(settings.operators)

    def price(before: Cursor, operator: jax.Array) -> jax.Array:
        return jnp.where(before.done, 0.0, costs[operator])

    def value(before: Cursor, seen: Observation, operator: jax.Array) -> jax.Array:
        taken = jnp.take_along_axis(seen.q, operator[:, None], axis=1)[:, 0]
        return jnp.where(before.done, 0.0, taken)

    after, written = execute(backbone, settings, cursor, seen, operator)
    cost = price(cursor, operator)
    # For a row that ends inside the branch: Q of its last decision, and the price before that.
    ended_q, ended_cost = value(cursor, seen, operator), jnp.zeros_like(cost)

    def more(carry: tuple[Cursor, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        at = carry[0]
        running = ~jnp.all(at.done) & (at.step < settings.max_steps)
        return running & (at.step < cursor.step + depth) if depth else running

    def decide(
        carry: tuple[Cursor, jax.Array, jax.Array, jax.Array],
    ) -> tuple[Cursor, jax.Array, jax.Array, jax.Array]:
        at, cost, ended_q, ended_cost = carry
        seen = observe(backbone, settings, ground, at, key)
        operator, _ = select(seen.logits, seen.valid, seen.operator_keys, "argmax")
        ended_q = jnp.where(at.done, ended_q, value(at, seen, operator))
        ended_cost = jnp.where(at.done, ended_cost, cost)
        cost = cost + price(at, operator)
        at, _ = execute(backbone, settings, at, seen, operator)
        return at, cost, ended_q, ended_cost

    start = (after, cost, ended_q, ended_cost)
    end, cost, ended_q, ended_cost = jax.lax.while_loop(more, decide, start)
    if not depth:
        return _Trial(end, written, cost, jnp.zeros_like(cost))
    at_horizon = _policy_value(observe(backbone, settings, ground, end, key))
    return _Trial(
        end,
        written,
        # Q already holds the price of the decision it values.
        jnp.where(end.done, ended_cost, cost),
        jnp.where(end.done, ended_q, at_horizon),
    )


def look_ahead(
    backbone: Backbone,
    settings: RolloutSettings,
    ground: Ground,
    cursor: Cursor,
    seen: Observation,
    key: jax.Array,
) -> Lookahead:
    """O_BRANCH for every row: tries the K operators of highest value and keeps the best branch.

    A branch is worth -price * cost + the critic's value at its end (the policy's mean of Q, or Q of
    its last decision where the episode ended on the way).

    Args:
      backbone, settings: static.
      cursor, seen: the rows and what was observed of them.
      key: typed key of the rollout.
    """
    operators, tried = _candidates(seen, settings.branch_k)

    def one(operator: jax.Array) -> _Trial:
        return _follow(
            backbone, settings, ground, cursor, seen, operator, key, depth=_depth(settings)
        )

    trials = jax.vmap(one, in_axes=1)(operators)  # leading axis K
    score = trials.estimate - settings.price * trials.cost  # [K, B]
    score = jnp.where(tried.T, score, -jnp.inf)
    best = jnp.argmax(score, axis=0)  # [B]; nothing tried = the first branch, which does nothing

    def keep(x: jax.Array) -> jax.Array:
        index = best.reshape(1, -1, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=0)[0]

    steps = trials.cursor.step
    end = jax.tree.map(keep, dataclasses.replace(trials.cursor, step=jnp.zeros_like(score)))
    return Lookahead(
        cursor=dataclasses.replace(end, step=steps.reshape(-1)[0]),
        written=keep(trials.written),
        operator=jnp.take_along_axis(operators, best[:, None], axis=1)[:, 0],
        score=score.T,
    )


def try_operators(
    backbone: Backbone,
    settings: RolloutSettings,
    ground: Ground,
    cursors: Cursor,
    key: jax.Array,
) -> Branches:
    """Tries the K operators of highest value at every recorded state, each to its outcome.

    Args:
      backbone, settings: static; settings.tried_depth says how long a trial lasts.
      cursors: the states, with a leading axis S over steps.
      key: typed key of the rollout.

    Returns:
      the trials; `reward` is zero, to be filled in by whoever grades `final_ids`.
    """

    def at_step(cursor: Cursor) -> Branches:
        seen = observe(backbone, settings, ground, cursor, key)
        operators, tried = _candidates(seen, settings.branch_k)

        def one(operator: jax.Array) -> _Trial:
            return _follow(
                backbone, settings, ground, cursor, seen, operator, key, settings.tried_depth
            )

        trials = jax.vmap(one, in_axes=1)(operators)  # leading axis K
        return Branches(
            step=jnp.broadcast_to(cursor.step, cursor.done.shape),
            operator=operators,
            tried=tried & ~cursor.done[:, None],
            cost=trials.cost.T,
            estimate=trials.estimate.T,
            reward=jnp.zeros_like(trials.cost.T),
            final_ids=jnp.moveaxis(trials.cursor.gen_ids, 0, 1),
        )

    found = jax.lax.map(at_step, cursors)  # leading axis S
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
