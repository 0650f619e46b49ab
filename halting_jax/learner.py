"""The optimiser step, many of them in one compiled call.

Every device draws its own rows, leaves its ponder loops when its own rows have halted, and only
the sums behind means and the gradients are added over the devices.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from common.dist import DATA_AXIS
from common.errors import UserError
from common.fsdp import Layout
from common.optim import clip_by_norm
from common.spmd import ROWS, WHOLE, spmd, sum_over_devices
from halting_jax.objective import Objective, Scored
from halting_jax.ponder_sums import PonderSums, ponder_sums
from halting_jax.types import Batch, Model, Params, Ratio, Task

# (key of the step, row numbers [b], what the host sent for them [b, ...]) -> Batch
Draw = Callable[[jax.Array, jax.Array, Any], Batch]
WHOLE_LAYOUT = Layout()


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint holds.

    Attributes:
      step: [] int32, optimiser steps done.
      key: typed key of the run; step t draws from fold_in(key, t).
      params: trained weights; ema: their running average, () when it is off.
      opt_state: of the optimiser.
      carry: the model's own rows [B, ...] carried from step to step, () for most.
    """

    step: jax.Array
    key: jax.Array
    params: Params
    ema: Params
    opt_state: Any
    carry: Any


@flax.struct.dataclass
class Sums:
    """What a call of many steps adds up for the log.

    Attributes:
      means: name -> Ratio, over all rows of all steps.
      ponder: distribution of the ponder steps, of the limit halts and of the remainders.
      steps: [] optimiser steps behind these sums.
      rate, tau: [] learning rate and time penalty of the last step.
      grad_norm: [] gradient norm before clipping, of the last step; nan_count, inf_count: [] int32,
        non-finite entries of that gradient. An entry that is not finite stays in the moments and
        reaches every later gradient, so the last one tells whether there was any.
    """

    means: dict[str, Ratio]
    ponder: PonderSums
    steps: jax.Array
    rate: jax.Array
    tau: jax.Array
    grad_norm: jax.Array
    nan_count: jax.Array
    inf_count: jax.Array


@dataclasses.dataclass(frozen=True)
class OptimSettings:
    """Optimiser of a run; static.

    Attributes:
      rate, tau: functions of the step.
      beta2: decay of Adam's second moment; 0.95 follows gradients that grow suddenly, as those
        through many hops do.
      weight_decay: decoupled decay times the rate, on all parameters unless decay_mask.
      decay_mask: True spares biases, norms, embeddings and one-row kernels (everything below two
        axes, and names with "embedding").
      clip_norm: largest global gradient norm; 0 = off.
      ema_decay: of the running average; 0 = none is kept.
      freeze_steps: the halting unit gets no update and no decay before this step.
    """

    rate: Callable[[Any], jax.Array]
    tau: Callable[[Any], jax.Array]
    beta2: float = 0.999
    weight_decay: float = 0.0
    decay_mask: bool = False
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    freeze_steps: int = 0


def named_leaves(tree: Any) -> Any:
    """The same tree with every leaf's name, joined by "/", in its place."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def make_optimizer(
    settings: OptimSettings, layout: Layout = WHOLE_LAYOUT
) -> optax.GradientTransformation:
    """Clipping, Adam moments, decoupled decay; the rate is applied by the step itself."""
    parts: list[optax.GradientTransformation] = []
    if settings.clip_norm:
        parts.append(clip_by_norm(settings.clip_norm, lambda grads: gradient_norm(grads, layout)))
    parts.append(optax.scale_by_adam(b1=0.9, b2=settings.beta2, eps=1e-8))
    if settings.weight_decay:
        mask = _decayed if settings.decay_mask else None
        parts.append(optax.add_decayed_weights(settings.weight_decay, mask))
    return optax.chain(*parts)


def _decayed(params: Params) -> Any:
    return jax.tree.map(
        lambda x, name: x.ndim >= 2 and "embedding" not in name, params, named_leaves(params)
    )


def init_state(
    model: Model, settings: OptimSettings, seed: int, carry: Callable[[], Any] = lambda: ()
) -> TrainState:
    """The state before any step, as `seed` draws it."""
    key = jax.random.key(seed)
    params = model.init(jax.random.fold_in(key, 0))
    return TrainState(
        step=jnp.int32(0),
        key=jax.random.fold_in(key, 1),
        params=params,
        # A copy: the state is donated, and one buffer cannot be given away twice.
        ema=jax.tree.map(jnp.copy, params) if settings.ema_decay else (),
        opt_state=make_optimizer(settings).init(params),
        carry=carry(),
    )


def state_specs(state: TrainState, layout: Layout) -> Any:
    """Partition specs of a state: weights, average and moments by the layout, rows by the batch.

    Args:
      state: arrays or their shapes.
    """
    return dataclasses.replace(
        jax.tree.map(lambda _: PartitionSpec(), state),
        params=layout.specs(state.params),
        ema=layout.specs(state.ema),
        opt_state=layout.specs(state.opt_state),
        carry=jax.tree.map(lambda _: PartitionSpec(DATA_AXIS), state.carry),
    )


def global_loss(scored: Scored) -> tuple[jax.Array, dict[str, Ratio]]:
    """This shard's part of the loss, and every term as a mean over all shards."""
    value, means = jnp.zeros(()), {}
    for name, term in scored.terms.items():
        count = sum_over_devices(jax.lax.stop_gradient(term.ratio.count))
        value += term.weight * term.ratio.total / jnp.maximum(count, 1)
        means[name] = term.ratio
    return value, means


def squared_norm(array: jax.Array) -> jax.Array:
    """Sum of the squared entries [].

    As a dot product: squares that are summed would be stored first, which for the large matrices of
    grids costs more than the sum.
    """
    return jnp.vdot(array, array, precision=jax.lax.Precision.HIGHEST)


def gradient_norm(grads: Params, layout: Layout = WHOLE_LAYOUT) -> jax.Array:
    """sqrt(sum g^2) [] over all entries of a tree of arrays that lie as `layout` says."""
    return jnp.sqrt(layout.total(jax.tree.map(squared_norm, grads)))


def gradient_health(
    grads: Params, measured: jax.Array | bool, layout: Layout = WHOLE_LAYOUT
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Global norm [], and how many entries are NaN and how many infinite, int32 [] each.

    Every array has its own conditional, so it is read when it is made: one conditional for all
    would hold all of them until the last is there.

    Args:
      grads: any tree of arrays.
      measured: bool []; False reads nothing and returns zeros.
      layout: where they lie.
    """

    def nothing(*arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.zeros((), jnp.result_type(*arrays)), jnp.int32(0), jnp.int32(0)

    def bad_entries(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        nan, inf = jnp.isnan(g), jnp.isinf(g)
        return jnp.sum(nan, dtype=jnp.int32), jnp.sum(inf, dtype=jnp.int32)

    def read(g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        square = squared_norm(g)
        # A finite sum has none, so most arrays are read once.
        return square, *jax.lax.cond(jnp.isfinite(square), lambda g: nothing(g)[1:], bad_entries, g)

    def total(parts: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        square, nan, inf = (layout.total(part) for part in parts)
        return jnp.sqrt(square), nan.astype(jnp.int32), inf.astype(jnp.int32)

    leaves, tree = jax.tree.flatten(grads)
    seen = [jax.lax.cond(measured, read, nothing, leaf) for leaf in leaves]
    parts = tuple(jax.tree.unflatten(tree, part) for part in zip(*seen, strict=True))
    return jax.lax.cond(measured, total, lambda _: nothing(*leaves), parts)


def make_step(
    task: Task,
    model: Model,
    objective: Objective,
    settings: OptimSettings,
    layout: Layout = WHOLE_LAYOUT,
) -> Callable[..., tuple[TrainState, Sums]]:
    """One optimiser step of one shard: (state, its rows, measured=True) -> (state, its sums).

    `measured`, bool [], says whether the gradient's norm and non-finite entries, the rate and the
    time penalty are wanted (else they are 0): without clipping nothing else needs the norm, and
    reading large gradients once more costs a tenth of a step.

    Args:
      layout: where weights, average and moments lie.
    """
    optimizer = make_optimizer(settings, layout)
    halting = re.compile(model.halting_path) if model.halting_path else None
    if settings.freeze_steps and halting is None:
        raise UserError("config key act.halt_warmup_steps: this model has no halting unit")

    def step(
        state: TrainState, batch: Batch, measured: jax.Array | bool = True
    ) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(state.key, state.step)
        tau = settings.tau(state.step)

        def loss(params: Params) -> tuple[jax.Array, tuple[Scored, dict[str, Ratio]]]:
            scored = objective(params, state.carry, batch, key, tau)
            value, means = global_loss(scored)
            return value, (scored, means)

        grads, (scored, means) = jax.grad(loss, has_aux=True)(layout.whole(state.params))
        grads = layout.reduce(grads)
        norm, nan_count, inf_count = gradient_health(grads, measured, layout)
        if settings.freeze_steps:
            frozen = state.step < settings.freeze_steps
            assert halting is not None

            def thaw(name: str, x: jax.Array) -> jax.Array:
                return jnp.where(frozen, 0.0, x) if halting.search(name) else x

            names = named_leaves(state.params)
            grads = jax.tree.map(thaw, names, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        if settings.freeze_steps:
            updates = jax.tree.map(thaw, names, updates)
        # A norm is never negative: this only makes the update wait for every gradient. A compiler
        # that cannot see that the weights have been read for the last time copies them first.
        rate = jnp.where(norm < 0, 0.0, settings.rate(state.step))
        updates = jax.tree.map(lambda u: -rate * u, updates)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if settings.ema_decay:
            ema = optax.incremental_update(params, state.ema, 1.0 - settings.ema_decay)
        means |= task.metrics(scored.outputs.logits, scored.used) | scored.extra
        sums = Sums(
            means=jax.lax.stop_gradient(means),
            ponder=ponder_sums(scored.outputs.ponder, model.max_steps),
            steps=jnp.int32(1),
            rate=jnp.where(measured, rate, 0.0),
            tau=jnp.where(measured, tau, 0.0),
            grad_norm=norm,
            nan_count=nan_count,
            inf_count=inf_count,
        )
        new = TrainState(state.step + 1, state.key, params, ema, opt_state, scored.carry)
        return new, sums

    return step


def compile_steps(
    step: Callable[..., tuple[TrainState, Sums]],
    draw: Draw,
    mesh: Mesh,
    mode: str = "jit",
    layout: Layout = WHOLE_LAYOUT,
    shapes: TrainState | None = None,
) -> Callable[[TrainState, jax.Array, Any, int], tuple[TrainState, Sums]]:
    """Compiles run(state, row_ids [B], sent [B, k, ...], count) -> (state, sums).

    The number of steps is an argument, so a run of any cadence is one program.

    Args:
      step: of `make_step`.
      draw: makes a batch inside the program; sent[:, i] goes to step i.
      mesh, mode: see `common.spmd`.
      layout: where weights, average and moments lie; shapes: of the state, needed where the layout
        cuts arrays.
    """
    fixed_spec: Any = WHOLE
    if shapes is not None and layout.num_devices > 1:
        fixed_spec = state_specs(dataclasses.replace(shapes, carry=()), layout)

    def run(
        fixed: TrainState, carry: Any, row_ids: jax.Array, sent: Any, count: jax.Array
    ) -> tuple[TrainState, Any, Sums]:
        state = dataclasses.replace(fixed, carry=carry)

        def batch_of(state: TrainState, i: jax.Array) -> Batch:
            part = jax.tree.map(lambda x: jnp.take(x, i, axis=1), sent)
            # Apart from the key of the objective, which may draw as well.
            key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0x0DA7A)
            return draw(key, row_ids, part)

        def body(i: jax.Array, loop: tuple[TrainState, Sums]) -> tuple[TrainState, Sums]:
            state, sums = loop
            state, new = step(state, batch_of(state, i), i == count - 1)
            return state, jax.tree.map(jnp.add, sums, new)

        shapes = jax.eval_shape(lambda: step(state, batch_of(state, jnp.int32(0)))[1])
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state, sums = jax.lax.fori_loop(0, count, body, (state, start))
        # The norms and counts of the gradient are equal on all devices already.
        shared = dataclasses.replace(
            sums, means=sum_over_devices(sums.means), ponder=sum_over_devices(sums.ponder)
        )
        return dataclasses.replace(state, carry=()), state.carry, shared

    compiled = spmd(
        run,
        mesh,
        (fixed_spec, ROWS, ROWS, ROWS, WHOLE),
        (fixed_spec, ROWS, WHOLE),
        mode=mode,
        donate=(0, 1),
    )

    def call(
        state: TrainState, row_ids: jax.Array, sent: Any, count: int
    ) -> tuple[TrainState, Sums]:
        fixed = dataclasses.replace(state, carry=())
        fixed, carry, sums = compiled(fixed, state.carry, row_ids, sent, jnp.int32(count))
        return dataclasses.replace(fixed, carry=carry), sums

    return call
