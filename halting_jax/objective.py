"""What is minimised: weighted means, each kept as sum and count until all shards are known.

loss = sum over terms of weight * total / count, with total and count summed over the devices. The
objective of a model returns its terms and whatever the trainer logs or carries on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError
from halting_jax.types import Batch, Model, Outputs, Params, Ponder, Ratio, Task


class Term(NamedTuple):
    """One weighted mean of the loss; the total carries the gradient, the count is a constant."""

    weight: jax.Array | float
    ratio: Ratio


class Scored(NamedTuple):
    """Result of an objective on one shard.

    Attributes:
      terms: name -> Term; "classification" and "ponder" are always there.
      outputs: what the model returned, for metrics.
      used: the batch that the outputs belong to (the recursive model carries rows over).
      carry: the model's own state for the next step, () for models without one.
      extra: further means for the log.
    """

    terms: dict[str, Term]
    outputs: Outputs
    used: Batch
    carry: Any
    extra: dict[str, Ratio]


# (params, carry, batch, key, tau) -> Scored
Objective = Callable[[Params, Any, Batch, jax.Array, jax.Array], Scored]


def ponder_ratio(ponder: Ponder, reduce: str) -> Ratio:
    """The mean cost N + R over all calls of all rows, or of the per-row sums.

    Args:
      ponder: of a batch.
      reduce: "mean" over calls and rows, or "sum" over the calls of a row and mean over rows
        (Graves 2016).
    """
    total = jnp.sum(jnp.where(ponder.mask, ponder.cost, 0.0))
    if reduce == "sum":
        return Ratio(total, jnp.sum(jnp.any(ponder.mask, axis=1)))
    if reduce != "mean":
        raise UserError(f"config key act.ponder_reduce={reduce!r} is none of mean, sum")
    return Ratio(total, jnp.sum(ponder.mask))


def classification(task: Task, logits: jax.Array, batch: Batch) -> Ratio:
    """Sum of the loss over all scored answers of a batch, and their number."""
    rows = task.example_loss(logits, batch)
    return Ratio(jnp.sum(rows.total), jnp.sum(rows.count))


def stretches_objective(task: Task, model: Model) -> Objective:
    """Classification, averaged over the answers after every stretch of inner steps.

    What is iterated often is trained like this because the gradient through all steps explodes; a
    stretch learns to improve whatever state it finds.

    Args:
      task, model: bundles of functions; the model has `stretches`.
    """
    assert model.stretches is not None
    stretches = model.stretches

    def objective(
        params: Params, carry: Any, batch: Batch, key: jax.Array, tau: jax.Array
    ) -> Scored:
        del key, tau
        logits, outputs = stretches(params, batch)
        scored = jax.vmap(lambda one: classification(task, one, batch))(logits)
        terms = {
            "classification": Term(1.0, Ratio(jnp.mean(scored.total), scored.count[0])),
            "ponder": Term(0.0, ponder_ratio(outputs.ponder, "mean")),
        }
        return Scored(terms, outputs, batch, carry, {})

    return objective


def act_objective(
    task: Task, model: Model, reduce: str = "mean", charged: bool = True
) -> Objective:
    """Classification plus tau times the ponder cost (Graves 2016; Universal Transformer).

    Args:
      task, model: bundles of functions.
      reduce: see `ponder_ratio`.
      charged: False logs the ponder cost without adding it to the loss.
    """

    def objective(
        params: Params, carry: Any, batch: Batch, key: jax.Array, tau: jax.Array
    ) -> Scored:
        del key
        outputs = model.apply(params, batch)
        terms = {
            "classification": Term(1.0, classification(task, outputs.logits, batch)),
            "ponder": Term(tau if charged else 0.0, ponder_ratio(outputs.ponder, reduce)),
        }
        return Scored(terms, outputs, batch, carry, {})

    return objective
