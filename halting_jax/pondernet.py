"""PonderNet (Banino 2021): a distribution over the step to answer at, instead of a mixed state.

    lambda_n = sigma(w.s^n + b)    p_n = lambda_n prod_{j<n} (1 - lambda_j)    n = 1..M
    loss = sum_n p_n L(y_n) + beta KL(p || q),    q_n proportional to lambda_p (1 - lambda_p)^{n-1}

with the mass left after M steps given to step M. In training all M steps are made; at inference a
row answers at the first step whose cumulative mass exceeds a threshold: 1/2, or a uniform draw,
which samples the step from p. Logarithms of p are sums of log-sigmoids, so none is infinite.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from common.errors import require
from halting_jax.act import unroll
from halting_jax.act_calls import zero_state
from halting_jax.act_networks import CallsNetwork
from halting_jax.act_step import ActSettings, cell_step, halting_logit, loop_weights, start_carry
from halting_jax.cells import State, Weights
from halting_jax.objective import Objective, Scored, Term
from halting_jax.types import Batch, Model, Outputs, Params, Ponder, Ratio, Task

MEDIAN = 0.5


class Unrolled(NamedTuple):
    """All steps of a batch: logits [M, B, ...], log_p [M, B], valid bool [B]."""

    logits: jax.Array
    log_p: jax.Array
    valid: jax.Array


class PonderNetLoss(NamedTuple):
    """Parts of the loss, per row.

    Attributes:
      expected: Ratio of [B] arrays, sum_n p_n L(y_n) and the number of scored answers.
      kl: [B], 0 on rows that are not valid.
      outputs: of the step that inference would answer at; `ponder.cost` is kl.
    """

    expected: Ratio
    kl: jax.Array
    outputs: Outputs


@dataclasses.dataclass(frozen=True)
class PonderNetModel(Model):
    """A Model whose `apply` answers at the median step.

    Attributes:
      unroll: (params, batch) -> Unrolled, for training.
      sample: (params, batch, key, row_ids int32 [B]) -> Outputs at steps drawn from p; row i
        depends on the key and row_ids[i] alone.
    """

    unroll: Callable[[Params, Batch], Unrolled] | None = None
    sample: Callable[[Params, Batch, jax.Array, jax.Array], Outputs] | None = None


def log_halting(logits: jax.Array) -> jax.Array:
    """log p_n [M, B] from halting logits [M, B]; the last step takes what is left."""
    go_on = jax.nn.log_sigmoid(-logits)  # log(1 - lambda_n)
    halt = jax.nn.log_sigmoid(logits).at[-1].set(0.0)
    return halt + jnp.cumsum(go_on, axis=0) - go_on


def log_prior(prior: float, num_steps: int, dtype: Any = jnp.float32) -> jax.Array:
    """log q_n [M], the geometric distribution of rate `prior` cut off after M steps.

    Raises:
      UserError: the rate is not inside (0, 1).
    """
    require(0 < prior < 1, f"act.prior={prior} must lie between 0 and 1")
    raw = jnp.arange(num_steps, dtype=dtype) * jnp.log1p(jnp.asarray(-prior, dtype))
    return raw - jax.nn.logsumexp(raw)


def kl_to_prior(log_p: jax.Array, prior: float) -> jax.Array:
    """KL(p || q) = sum_n p_n (log p_n - log q_n): [B] from [M, B]."""
    log_q = log_prior(prior, log_p.shape[0], log_p.dtype)[:, None]
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=0)


def pondernet_loss(
    unrolled: Unrolled,
    batch: Batch,
    example_loss: Callable[[jax.Array, Batch], Ratio],
    prior: float,
) -> PonderNetLoss:
    """The two parts of the loss; total = sum(expected) / count + beta * mean of kl over rows.

    Args:
      unrolled: all steps.
      batch: what they answer.
      example_loss: of the task.
      prior: lambda_p.
    """
    p = jnp.exp(unrolled.log_p)  # [M, B]
    losses = jax.vmap(lambda logits: example_loss(logits, batch))(unrolled.logits)
    kl = jnp.where(unrolled.valid, kl_to_prior(unrolled.log_p, prior), 0)
    expected = Ratio(jnp.sum(p * losses.total, axis=0), losses.count[0])
    return PonderNetLoss(expected, kl, _median_outputs(unrolled, kl))


def pondernet_objective(task: Task, model: Model, prior: float, kl_weight: float) -> Objective:
    """Expected loss plus kl_weight times the mean divergence from the prior.

    Args:
      task: bundle of functions.
      model: a PonderNetModel.
      prior: lambda_p.
      kl_weight: beta; it takes the place of the time penalty.
    """
    assert isinstance(model, PonderNetModel) and model.unroll is not None
    run = model.unroll

    def objective(
        params: Params, carry: Any, batch: Batch, key: jax.Array, tau: jax.Array
    ) -> Scored:
        del key, tau
        unrolled = run(params, batch)
        loss = pondernet_loss(unrolled, batch, task.example_loss, prior)
        expected = Ratio(jnp.sum(loss.expected.total), jnp.sum(loss.expected.count))
        divergence = Ratio(jnp.sum(loss.kl), jnp.sum(unrolled.valid))
        terms = {"classification": Term(1.0, expected), "ponder": Term(kl_weight, divergence)}
        return Scored(terms, loss.outputs, batch, carry, {})

    return objective


def _median_outputs(unrolled: Unrolled, kl: jax.Array) -> Outputs:
    """What inference would return, read off the unrolled steps; no gradient."""
    logits, log_p = lax.stop_gradient((unrolled.logits, unrolled.log_p))
    valid, num_steps = unrolled.valid, log_p.shape[0]
    mass = jnp.cumsum(jnp.exp(log_p), axis=0).at[-1].set(1.0)  # [M, B]
    step = jnp.argmax(mass > MEDIAN, axis=0)  # [B]
    rows = jnp.arange(log_p.shape[1])
    before = jnp.where(step > 0, mass[step - 1, rows], 0)
    steps = jnp.where(valid, step + 1, 0).astype(log_p.dtype)
    own = jnp.minimum(jnp.arange(num_steps)[:, None], step)  # a row's mass stays after its step
    ponder = Ponder(
        cost=kl[:, None],
        steps=steps[:, None],
        remainder=jnp.where(valid, 1 - before, 0)[:, None],
        forced=(valid & (step == num_steps - 1))[:, None],
        mask=valid[:, None],
        mass=jnp.sum(jnp.where(valid, mass[own, rows], 0), axis=1),
        executed=jnp.int32(num_steps),
    )
    return Outputs(logits[step, rows], ponder)


def make_pondernet(network: CallsNetwork, model: Model) -> PonderNetModel:
    """A PonderNet on the network of a task with one call per row.

    Args:
      network: of a grid or a vector.
      model: its bundle; `init` and runs of fixed length are taken over.
    """
    settings = network.settings

    def begin(params: Params, batch: Batch) -> tuple[jax.Array, State, jax.Array]:
        outcome: Any = network.apply({"params": params}, batch, method="begin")
        products, valid = outcome
        state = zero_state(products, settings.act, settings.num_states)
        return products[:, 0], state, valid[:, 0]

    def logits(params: Params, hidden: jax.Array) -> jax.Array:
        outcome: Any = network.apply({"params": params}, hidden, method="logits")
        return outcome

    def answer(params: Params, batch: Batch, threshold: jax.Array | float) -> Outputs:
        product, state, valid = begin(params, batch)
        hidden, ponder = stop_early(params["act"], product, state, settings.act, valid, threshold)
        return Outputs(logits(params, hidden), ponder)

    def apply(params: Params, batch: Batch, fixed_steps: int = 0) -> Outputs:
        if fixed_steps:
            return model.apply(params, batch, fixed_steps)
        return answer(params, batch, MEDIAN)

    def sample(params: Params, batch: Batch, key: jax.Array, row_ids: jax.Array) -> Outputs:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)
        return answer(params, batch, jax.vmap(jax.random.uniform)(keys))

    def run(params: Params, batch: Batch) -> Unrolled:
        product, state, valid = begin(params, batch)
        hidden, halting = unroll(params["act"], product, state, settings.act)
        return Unrolled(logits(params, hidden), log_halting(halting), valid)

    return PonderNetModel(
        type=model.type,
        init=model.init,
        apply=apply,
        halting_path=model.halting_path,
        max_steps=model.max_steps,
        unroll=run,
        sample=sample,
    )


# ---------------------------------------------------------------------------------- inference
class _Stopping(NamedTuple):
    """Carry of the inference loop: inner state, kept hidden [B, H], left and its value before the
    last step [B], steps int32 [B], running bool [B], mass [M]."""

    made: jax.Array
    inner: State
    kept: jax.Array
    left: jax.Array
    before: jax.Array
    steps: jax.Array
    running: jax.Array
    mass: jax.Array


def stop_early(
    params: Weights,
    product: jax.Array,
    state: State,
    settings: ActSettings,
    valid: jax.Array,
    threshold: jax.Array | float = MEDIAN,
) -> tuple[jax.Array, Ponder]:
    """Steps until the cumulative mass of every row exceeds its threshold, at most M.

    Args:
      params: weights of the unit.
      product: [B, G*H].
      state: entries [B, H].
      settings: static.
      valid: bool [B].
      threshold: [] or [B].

    Returns:
      hidden states [B, H] of the rows' last steps, and the report (cost 0).
    """
    weights, limit = loop_weights(params), settings.time_limit
    start = start_carry(settings, state, valid)
    zeros = start.mass

    def go_on(loop: _Stopping) -> jax.Array:
        return jnp.any(loop.running)

    def body(loop: _Stopping) -> _Stopping:
        inner = cell_step(settings, weights.cell, product, loop.inner, loop.made == 0)
        running = loop.running
        rest = loop.left * jax.nn.sigmoid(-halting_logit(weights, inner))
        left = jnp.where(running, rest, loop.left)
        on = (1 - left <= threshold) & (loop.made + 1 < limit)
        steps = loop.steps + running
        given = jnp.where(steps == limit, 1, jnp.where(valid, 1 - left, 0))
        return _Stopping(
            made=loop.made + 1,
            inner=inner,
            kept=jnp.where(running[:, None], inner[0], loop.kept),
            left=left,
            before=jnp.where(running, loop.left, loop.before),
            steps=steps,
            running=running & on,
            mass=loop.mass.at[loop.made].set(jnp.sum(given)),
        )

    first = _Stopping(
        made=jnp.int32(0),
        inner=start.state,
        kept=state[0],
        left=jnp.ones_like(zeros),
        before=zeros,
        steps=start.steps,
        running=valid,
        mass=jnp.zeros((limit,), zeros.dtype),
    )
    end = lax.while_loop(go_on, body, first)
    last = end.mass[jnp.maximum(end.made - 1, 0)]
    ponder = Ponder(
        cost=zeros[:, None],
        steps=end.steps.astype(zeros.dtype)[:, None],
        remainder=end.before[:, None],
        forced=(end.steps == limit)[:, None],
        mask=valid[:, None],
        mass=jnp.where(jnp.arange(limit) < end.made, end.mass, last),
        executed=end.made,
    )
    return end.kept, ponder
