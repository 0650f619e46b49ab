"""The Universal Transformer beside the same blocks written plainly, without any bookkeeping."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from bench import Row, Timings, TraceCounter, Turns, compare
from bench.halting_scenes import (
    MAZE_TOKENS,
    Blocks,
    Sizes,
    get_config,
    random_grids,
    row_numbers,
    trainer_steps,
)
from common import dist
from halting_jax.build import Built, build
from halting_jax.learner import OptimSettings, TrainState, init_state, make_optimizer
from halting_jax.signals import Signals, make_signals
from halting_jax.source import Source
from halting_jax.train import optim_settings, place
from halting_jax.types import Batch, Params

BAR = 1.3
NEVER = -30.0  # halting bias at which every position takes all hops


def plain_logits(
    params: Params, tokens: jax.Array, signals: Signals, heads: int, fused: bool
) -> jax.Array:
    """All hops written out.

    Args:
      params: of the model on grids; the halting unit is not read.
      tokens: int32 [B, S].
      signals: tables; as many hops as rows.
      heads: of the attention.
      fused: `jax.nn.dot_product_attention` instead of two products around a softmax.

    Returns:
      [B, S, V].
    """
    encoder, (rows, length) = params["encoder"], tokens.shape
    block = encoder["block"]

    def norm(weights: Params, x: jax.Array) -> jax.Array:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        std = jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True))
        return weights["scale"] * centred / (std + 1e-6) + weights["bias"]

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(rows, length, heads, -1)

    def attend(u: jax.Array) -> jax.Array:
        weights = block["attention"]
        q, k, v = (split(u @ weights[n]["kernel"]) for n in ("query", "key", "value"))
        if fused:
            out = jax.nn.dot_product_attention(q, k, v)
        else:
            q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(0, 1, 3, 2)
            out = (jax.nn.softmax(scores, axis=-1) @ v).transpose(0, 2, 1, 3)
        return out.reshape(rows * length, -1) @ weights["output"]["kernel"]

    x = params["embedding"]["table"][tokens.reshape(-1)]  # [B * S, E]
    if "embedding_proj" in encoder:
        x = x @ encoder["embedding_proj"]["kernel"]
    for hop in range(signals.hop.shape[0]):
        x = x + jnp.tile(signals.position + signals.hop[hop], (rows, 1))
        x = x + attend(norm(block["norm_attention"], x))
        first, second = block["feed_forward"]["fc1"], block["feed_forward"]["fc2"]
        inner = jax.nn.relu(norm(block["norm_feed_forward"], x) @ first["kernel"] + first["bias"])
        x = x + inner @ second["kernel"] + second["bias"]
    readout = params["readout"]
    logits = norm(encoder["norm"], x) @ readout["kernel"] + readout["bias"]
    return logits.reshape(rows, length, -1)


def block_rows(sizes: Sizes, turns: Turns) -> list[Row]:
    """Forward pass and training step of every shape."""
    rows = []
    for shape in sizes.blocks:
        forward, train = _calls(shape)
        for what, (things, counter) in (("forward", forward), ("train step", train)):
            timings = turns(things, counter=counter)
            # Which attention is faster depends on the machine and the shape.
            floor = min(("plain", "fused"), key=timings.median)
            for act in shape.acts:
                rows.append(_row(shape, what, act, floor, timings))
    return rows


def _row(shape: Blocks, what: str, act: bool, floor: str, timings: Timings) -> Row:
    size = f"{shape.variant} {shape.side}x{shape.side}, batch {shape.batch}"
    title = f"ut {what} {size}, {'ACT' if act else 'no ACT'} ({floor} floor)"
    return compare(title, timings, f"ours {act}", floor, BAR)


Calls = tuple[dict[str, Callable[[], Any]], TraceCounter]


def _calls(shape: Blocks) -> tuple[Calls, Calls]:
    """What takes turns: forward passes, and training steps."""
    forward: dict[str, Callable[[], Any]] = {}
    train: dict[str, Callable[[], Any]] = {}
    forwards, trains = TraceCounter(), TraceCounter()
    batch = random_grids(shape.batch, shape.side)
    for act in shape.acts:
        config = _config(shape, act)
        built, settings, state = _fresh(config, shape)
        apply = forwards.jit(built.model.apply)
        # The state is given away by the training step, its weights with it.
        forward[f"ours {act}"] = functools.partial(
            apply, jax.tree.map(jnp.copy, state.params), batch
        )
        train[f"ours {act}"] = _trainer(config, built, settings, state, batch, trains)
    config = _config(shape, act=False)
    _, settings, state = _fresh(config, shape)
    hops, heads = config.ut.max_hops, config.ut.heads
    signals = make_signals(shape.side**2, config.model.hidden_size, hops, config.ut.pos)
    for name in ("plain", "fused"):
        logits = functools.partial(
            plain_logits, signals=signals, heads=heads, fused=name == "fused"
        )
        forward[name] = functools.partial(forwards.jit(logits), state.params, batch.inputs)
        train[name] = _plain_step(logits, settings, state.params, batch, trains)
    return (forward, forwards), (train, trains)


def _config(shape: Blocks, act: bool) -> ConfigDict:
    config = get_config("maze_ut", shape.variant)
    config.ut.act, config.ut.halt_bias = act, NEVER
    config.data.batch_size = shape.batch
    return config


def _fresh(config: ConfigDict, shape: Blocks) -> tuple[Built, OptimSettings, TrainState]:
    built = build(config, shape.side**2, MAZE_TOKENS)
    settings = optim_settings(config, 1000, 100)
    return built, settings, init_state(built.model, settings, 0)


def _trainer(
    config: ConfigDict,
    built: Built,
    settings: OptimSettings,
    state: TrainState,
    batch: Batch,
    counter: TraceCounter,
) -> Callable[[], Any]:
    """One step of the trainer, with everything it adds up for the log."""
    source = Source(
        draw=lambda key, row_ids, sent: sent,
        send=lambda step, count, size: (),
        steps_per_epoch=0,
        evaluation={},
        facts={},
    )
    mesh = dist.make_mesh(1)
    run = trainer_steps(built, settings, source, counter, mesh)
    row_ids = row_numbers(config.data.batch_size, mesh)
    sent = dist.shard_batch(mesh, jax.tree.map(lambda x: x[:, None], batch))
    state = place(mesh, state)

    def call() -> Any:
        nonlocal state
        state, sums = run(state, row_ids, sent, 1)
        return state, sums

    return call


def _plain_step(
    logits: Callable[..., Any],
    settings: OptimSettings,
    params: Params,
    batch: Batch,
    counter: TraceCounter,
) -> Callable[[], Any]:
    """Loss, gradient and the same optimiser around the plain blocks."""
    optimizer = make_optimizer(settings)
    rate = settings.rate(0)

    def loss(params: Params, batch: Batch) -> jax.Array:
        answers = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, batch.inputs), batch.targets
        )
        return jnp.mean(answers)

    def step(state: Any, batch: Batch) -> Any:
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
        return params, opt_state

    run = jax.jit(counter.wrap(step), donate_argnums=0)
    state = jax.tree.map(jnp.copy, params), optimizer.init(params)

    def call() -> Any:
        nonlocal state
        state = run(state, batch)
        return state

    return call
