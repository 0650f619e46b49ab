"""Tiny recursive model: inference with early exit, and the training objective.

`trm_network` holds the network, `trm_supervision` the training step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from halting_jax.objective import Objective, Scored, Term
from halting_jax.trm_network import Latents, TrmSettings, initial_latents, make_net, select_rows
from halting_jax.trm_supervision import TrmCarry, init_carry, scored_rows, supervise
from halting_jax.types import Batch, Model, Outputs, Params, Ponder, Ratio, Task, TaskShape

HALTING_PATH = r"^halt/"


@flax.struct.dataclass
class TrmRows:
    """Rows under inference; every leaf has the rows in front, so rows can be dropped and joined.

    Attributes:
      batch: the examples.
      latents: y, z [B, S, H]; those of a stopped row no longer change.
      steps: int32 [B], supervision steps taken.
      limit: int32 [B], most supervision steps; 0 for rows without any valid cell.
      halted: bool [B], stopped by the halting head.
    """

    batch: Batch
    latents: Latents
    steps: jax.Array
    limit: jax.Array
    halted: jax.Array


def running_rows(rows: TrmRows) -> jax.Array:
    """bool [B]: neither halted nor at the limit."""
    return ~rows.halted & (rows.steps < rows.limit)


def make_trm(shape: TaskShape, settings: TrmSettings) -> Model:
    """The model as inference sees it.

    `apply` takes up to N_sup supervision steps and leaves its loop once no row is running. It has
    no reverse mode: training goes through `trm_objective`.

    Args:
      shape: of the task, form "grid".
      settings: static description.

    Raises:
      UserError: if the task is no grid or a setting does not fit.
    """
    net = make_net(shape, settings)

    def init(key: jax.Array) -> Params:
        tokens = jnp.zeros((1, shape.length), jnp.int32)
        return net.init(key, tokens, jnp.ones_like(tokens, bool))["params"]

    def start_limited(batch: Batch, limit: int) -> TrmRows:
        size, length = batch.inputs.shape
        return TrmRows(
            batch=batch,
            latents=initial_latents(settings, size, length),
            steps=jnp.zeros(size, jnp.int32),
            limit=jnp.where(jnp.any(batch.input_mask, axis=1), jnp.int32(limit), 0),
            halted=jnp.zeros(size, bool),
        )

    def step(params: Params, rows: TrmRows, is_halting: bool) -> TrmRows:
        bound, mask, running = (
            net.bind({"params": params}),
            rows.batch.input_mask,
            running_rows(rows),
        )
        x = bound.embed(rows.batch.inputs, mask)
        new = bound.think(rows.latents, x, mask, settings.cycles)
        halted = rows.halted
        if is_halting:
            halted = halted | (running & (bound.halting_logits(new, mask) > 0))
        return dataclasses.replace(
            rows,
            latents=select_rows(running, new, rows.latents),
            steps=rows.steps + running,
            halted=halted,
        )

    def steps_while_running(
        params: Params, rows: TrmRows, count: int, is_halting: bool
    ) -> tuple[TrmRows, jax.Array]:
        def more(loop: tuple[jax.Array, TrmRows]) -> jax.Array:
            return (loop[0] < count) & jnp.any(running_rows(loop[1]))

        executed, rows = jax.lax.while_loop(
            more,
            lambda loop: (loop[0] + 1, step(params, loop[1], is_halting)),
            (jnp.int32(0), rows),
        )
        return rows, executed

    def start(params: Params, batch: Batch) -> TrmRows:
        del params
        return start_limited(batch, settings.supervision_steps)

    def advance(params: Params, rows: TrmRows, count: int) -> TrmRows:
        return steps_while_running(params, rows, count, settings.halt_at_eval)[0]

    def finish(params: Params, rows: TrmRows) -> Outputs:
        logits = net.bind({"params": params}).logits(rows.latents)
        taken = rows.steps[:, None].astype(jnp.float32)  # [B, 1]
        zero = jnp.zeros_like(taken)
        ponder = Ponder(
            cost=zero,
            steps=taken,
            remainder=zero,
            forced=~rows.halted[:, None],
            mask=jnp.any(rows.batch.input_mask, axis=1, keepdims=True),
            mass=jnp.zeros(0),
            executed=jnp.max(rows.steps),
        )
        return Outputs(logits, ponder)

    def apply(params: Params, batch: Batch, fixed_steps: int = 0) -> Outputs:
        limit = fixed_steps or settings.supervision_steps
        is_halting = settings.halt_at_eval and not fixed_steps
        rows = start_limited(batch, limit)
        return finish(params, steps_while_running(params, rows, limit, is_halting)[0])

    return Model(
        type="trm",
        init=init,
        apply=apply,
        halting_path=HALTING_PATH,
        max_steps=settings.supervision_steps,
        start=start,
        advance=advance,
        running=running_rows,
        finish=finish,
    )


def trm_objective(
    task: Task, model: Model, settings: TrmSettings
) -> tuple[Objective, Callable[[Batch], TrmCarry]]:
    """What the trainer minimises, and the rows it carries from step to step.

    loss = mean loss of the scored cells + halt_loss_weight * mean BCE(q, the row is exactly right)

    Args:
      task: bundle of functions, form "grid".
      model: of `make_trm`.
      settings: static description of that model.

    Returns:
      the objective, whose Ponder counts the supervision steps of the rows that leave in this step;
      batch -> carry for the first step.
    """
    del model  # inference only: the objective runs the network by itself
    net = make_net(task.shape, settings)

    def objective(
        params: Params, carry: Any, batch: Batch, key: jax.Array, tau: jax.Array
    ) -> Scored:
        del tau
        logits, q_logits, used, new = supervise(net, params, carry, batch, key)
        cells, halting, extra = scored_rows(task, logits, q_logits, used)
        taken = new.steps[:, None].astype(jnp.float32)  # [B, 1]
        zero = jnp.zeros_like(taken)
        ponder = Ponder(
            cost=zero,
            steps=taken,
            remainder=zero,
            forced=~new.believed[:, None],
            mask=new.halted[:, None] & jnp.any(used.input_mask, axis=1, keepdims=True),
            mass=jnp.zeros(0),
            executed=jnp.int32(1),
        )
        terms = {
            "classification": Term(1.0, cells),
            "halting": Term(settings.halt_loss_weight, halting),
            "ponder": Term(0.0, Ratio(jnp.zeros(()), halting.count)),
        }
        return Scored(terms, Outputs(logits, ponder), used, new, extra)

    return objective, lambda batch: init_carry(settings, batch)
