"""One compiled call per batch of episodes: prompts in, finished canvases and records out.

`plus` (`rollout_plus`): at every denoising step the backbone scores the canvas, the features say
how it relates to the prompt, the actor picks an operator among those that can act, and the k most
confident positions of the operator's set are written. Rows stop as soon as their canvas is
complete. `paper` (`rollout_paper`) repeats the original's step T times.

All randomness of row b at step t comes from fold_in(fold_in(key, t), row_id_b), so results do not
depend on the batch size, on padding rows or on the number of devices.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from common.lm.layers import Params
from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.branches import Lookahead, forwards_of_lookahead, look_ahead, try_operators
from reoac_jax.episodes import Episodes, Steps
from reoac_jax.operators import operator_costs
from reoac_jax.plus_step import (
    BRANCH,
    Cursor,
    execute,
    first_cursor,
    make_ground,
    observe,
    select,
)
from reoac_jax.settings import NUM_OPERATORS, Agent, RolloutSettings, feature_size
from reoac_jax.tables import Tables


@flax.struct.dataclass
class _Carry:
    """Loop state of `rollout_plus`: where the rows stand, cost and passes [B], the records."""

    cursor: Cursor
    cost: jax.Array
    forwards: jax.Array
    steps: Steps


def rollout_plus(
    backbone: Backbone,
    settings: RolloutSettings,
    tables: Tables,
    params: Params,
    agent: Agent,
    canvas: Canvas,
    key: jax.Array,
) -> Episodes:
    """Run a batch of episodes with the better method (module docstring).

    Args:
      backbone, settings: static.
      tables: per-vocabulary lookups.
      params: backbone parameters.
      agent: actor, critic and feature statistics.
      canvas: prompts with all-mask canvases.
      key: typed key of the rollout.

    Returns:
      Episodes with T = settings.max_steps recorded decisions per row.
    """
    horizon = settings.max_steps
    ground, cache = make_ground(backbone, settings, tables, params, agent, canvas)
    costs = operator_costs(settings.operators)

    def body(carry: _Carry) -> _Carry:
        cursor = carry.cursor
        active = ~cursor.done
        seen = observe(backbone, settings, ground, cursor, key, settings.branching)
        operator, log_prob = select(
            seen.logits, seen.valid, seen.operator_keys, settings.selection_mode
        )
        if settings.planned_steps:
            due = jnp.isin(cursor.step, jnp.asarray(settings.planned_steps))
            operator = jnp.where(due & seen.valid[:, BRANCH], BRANCH, operator)
        after, written = execute(backbone, settings, cursor, seen, operator)
        forwards = carry.forwards + active
        if settings.branching:
            branched = active & (operator == BRANCH)
            after, written = jax.lax.cond(
                jnp.any(branched),
                lambda: _commit(
                    look_ahead(backbone, settings, ground, cursor, seen, key),
                    branched,
                    after,
                    written,
                ),
                lambda: (after, written),
            )
            forwards += jnp.where(branched, forwards_of_lookahead(settings), 0)
        cost = jnp.where(active, costs[operator], 0.0)
        record = Steps(
            features=seen.features,
            operator=operator,
            chosen=operator,
            valid=seen.valid,
            log_prob=log_prob,
            q=seen.q,
            cost=cost,
            gen_before=cursor.gen_ids,
            written=written,
            confidence=seen.confidence,
            active=active,
        )

        def record_step(all_: jax.Array, one: jax.Array) -> jax.Array:
            # Rows that have finished keep blank records, however long the others go on.
            running = active.reshape(-1, *[1] * (one.ndim - 1))
            return all_.at[:, cursor.step].set(jnp.where(running, one, all_[:, cursor.step]))

        return _Carry(
            cursor=after,
            cost=carry.cost + cost,
            forwards=forwards,
            steps=jax.tree.map(record_step, carry.steps, record),
        )

    initial = _Carry(
        cursor=first_cursor(backbone, settings, canvas, cache),
        cost=jnp.zeros(canvas.tokens.shape[0]),
        forwards=jnp.zeros(canvas.tokens.shape[0], jnp.int32),
        steps=_blank_steps(
            canvas,
            horizon,
            feature_size(settings, backbone.hidden_size, "plus"),
            backbone.mask_id,
        ),
    )

    def run_until(carry: _Carry, stop: int) -> _Carry:
        def running(carry: _Carry) -> jax.Array:
            return (carry.cursor.step < stop) & ~jnp.all(carry.cursor.done)

        return jax.lax.while_loop(running, body, carry)

    carry, left = initial, []
    for step in settings.tried_steps:
        carry = run_until(carry, step)
        # A loop that ended early ended because every row is done; then nothing is tried.
        left.append(dataclasses.replace(carry.cursor, step=jnp.int32(step)))
    final = run_until(carry, horizon)
    branches = None
    if left:
        states = jax.tree.map(lambda *x: jnp.stack(x), *left)
        branches = try_operators(backbone, settings, ground, states, key)
    return Episodes(
        canvas=canvas,
        final_ids=final.cursor.gen_ids,
        steps=final.steps,
        num_steps=jnp.sum(final.steps.active, axis=1, dtype=jnp.int32),
        num_forwards=final.forwards,
        cost=final.cost,
        relation=final.cursor.relation if settings.save_relation else None,
        branches=branches,
    )


def _commit(
    found: Lookahead, branched: jax.Array, after: Cursor, written: jax.Array
) -> tuple[Cursor, jax.Array]:
    """Rows [B] that branched take over their best branch; the others keep what they did."""
    end = dataclasses.replace(found.cursor, step=after.step, relation=after.relation)

    def choose(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(branched.reshape(-1, *[1] * (x.ndim - 1)), x, y) if x.ndim else y

    merged = jax.tree.map(choose, end, after)
    return merged, choose(found.written, written)


def _blank_steps(canvas: Canvas, horizon: int, num_features: int, mask_id: int) -> Steps:
    """Records of T decisions of rows that take none."""
    batch, gen_len = canvas.tokens.shape[0], canvas.gen_len
    return Steps(
        features=jnp.zeros((batch, horizon, num_features)),
        operator=jnp.zeros((batch, horizon), jnp.int32),
        chosen=jnp.zeros((batch, horizon), jnp.int32),
        valid=jnp.ones((batch, horizon, NUM_OPERATORS), bool),
        log_prob=jnp.zeros((batch, horizon)),
        q=jnp.zeros((batch, horizon, NUM_OPERATORS)),
        cost=jnp.zeros((batch, horizon)),
        gen_before=jnp.full((batch, horizon, gen_len), mask_id, jnp.int32),
        written=jnp.zeros((batch, horizon, gen_len), bool),
        confidence=jnp.zeros((batch, horizon, gen_len)),
        active=jnp.zeros((batch, horizon), bool),
    )
