"""Deep supervision of the tiny recursive model: one optimiser step per supervision step.

A batch of rows lives on from step to step. Each step thinks for T cycles, of which the last one is
differentiated, scores the answer, and hands the detached latents on. A row that believes its answer
(q > 0) or has taken N_sup steps leaves; a fresh example takes its place in the next step.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from halting_jax.trm_network import (
    Latents,
    TrmNet,
    TrmSettings,
    initial_latents,
    select_rows,
)
from halting_jax.types import Batch, Metrics, Params, Ratio, Task


@flax.struct.dataclass
class TrmCarry:
    """Rows under training; every field has the rows in front.

    Attributes:
      latents: y, z [B, S, H], without gradient.
      batch: the examples they belong to.
      row_ids: int32 [B], number of the row in the whole batch of all devices.
      steps: int32 [B], supervision steps taken.
      min_steps: int32 [B], steps the row must take before its halting head may end it.
      believed: bool [B], the halting head ended the row in the last step.
      halted: bool [B], ended by it or by the limit: the next step takes a fresh example.
    """

    latents: Latents
    batch: Batch
    row_ids: jax.Array
    steps: jax.Array
    min_steps: jax.Array
    believed: jax.Array
    halted: jax.Array


def init_carry(settings: TrmSettings, batch: Batch, row_ids: jax.Array | None = None) -> TrmCarry:
    """A carry whose rows are all replaced by the first step; `batch` only gives the shapes.

    Args:
      settings: static description.
      batch: any batch of the task.
      row_ids: int32 [B]; None = 0..B-1.
    """
    size, length = batch.inputs.shape
    return TrmCarry(
        latents=initial_latents(settings, size, length),
        # Copies: the carry is donated, and tasks use one array for both masks of a batch.
        batch=jax.tree.map(jnp.copy, batch),
        row_ids=jnp.arange(size, dtype=jnp.int32) if row_ids is None else row_ids,
        steps=jnp.zeros(size, jnp.int32),
        min_steps=jnp.ones(size, jnp.int32),
        believed=jnp.zeros(size, bool),
        halted=jnp.ones(size, bool),
    )


def draw_min_steps(settings: TrmSettings, key: jax.Array, row_ids: jax.Array) -> jax.Array:
    """int32 [B]: 1, or with probability `halt_exploration` uniform in 2..N_sup.

    Row i draws from fold_in(key, row_ids[i]) alone.
    """

    def draw(row_id: jax.Array) -> jax.Array:
        whether, how_long = jax.random.split(jax.random.fold_in(key, row_id))
        longest = max(settings.supervision_steps, 2)
        longer = jax.random.randint(how_long, (), 2, longest + 1, jnp.int32)
        explore = jax.random.bernoulli(whether, settings.halt_exploration)
        return jnp.where(explore, longer, 1)

    return jax.vmap(draw)(row_ids)


def supervise(
    net: TrmNet, params: Params, carry: TrmCarry, fresh: Batch, key: jax.Array
) -> tuple[jax.Array, jax.Array, Batch, TrmCarry]:
    """One supervision step.

    Args:
      net: the network.
      params: its weights.
      carry: the rows so far.
      fresh: examples for the rows that have halted; those of other rows are not used.
      key: of this step; row-wise draws fold in the row number.

    Returns:
      logits [B, S, V] and halting logits [B], float32, differentiable through the last cycle; the
      batch they belong to; the carry of the next step.
    """
    settings, old = net.settings, carry.halted
    size, length = fresh.inputs.shape
    batch = select_rows(old, fresh, carry.batch)
    latents = select_rows(old, initial_latents(settings, size, length), carry.latents)
    steps = jnp.where(old, 0, carry.steps) + 1
    min_steps = jnp.where(old, draw_min_steps(settings, key, carry.row_ids), carry.min_steps)

    mask = batch.input_mask
    # Weights and latents are both cut off, so that nothing of these cycles is kept for a gradient.
    detached = net.bind({"params": jax.lax.stop_gradient(params)})
    latents = jax.lax.stop_gradient(latents)
    latents = detached.think(latents, detached.embed(batch.inputs, mask), mask, settings.cycles - 1)
    trained = net.bind({"params": params})
    latents = trained.think(latents, trained.embed(batch.inputs, mask), mask, 1, unroll=True)
    logits, q_logits = trained.logits(latents), trained.halting_logits(latents, mask)

    believed = (jax.lax.stop_gradient(q_logits) > 0) & (steps >= min_steps)
    is_empty = ~jnp.any(mask, axis=1)  # filling rows make room at once
    new = TrmCarry(
        latents=jax.lax.stop_gradient(latents),
        batch=batch,
        row_ids=carry.row_ids,
        steps=steps,
        min_steps=min_steps,
        believed=believed,
        halted=believed | (steps >= settings.supervision_steps) | is_empty,
    )
    return logits, q_logits, batch, new


def scored_rows(
    task: Task, logits: jax.Array, q_logits: jax.Array, used: Batch
) -> tuple[Ratio, Ratio, Metrics]:
    """Both parts of the loss, as sums and counts.

    Args:
      task: bundle of functions.
      logits: [B, S, V]; q_logits: [B]; used: the batch they belong to (`supervise`).

    Returns:
      loss over the scored cells; BCE(q, the row is exactly right) over the rows that have scored
      cells; further means for the log: how often the halting head is right.
    """
    cells = task.example_loss(logits, used)
    row_counts = cells.count > 0  # [B]
    right = task.example_correct(logits, used) & row_counts
    halt = optax.sigmoid_binary_cross_entropy(q_logits, right.astype(q_logits.dtype))
    count = jnp.sum(row_counts)
    agree = ((q_logits > 0) == right) & row_counts
    return (
        Ratio(jnp.sum(cells.total), jnp.sum(cells.count)),
        Ratio(jnp.sum(jnp.where(row_counts, halt, 0.0)), count),
        {"halt_accuracy": Ratio(jnp.sum(agree), count)},
    )
