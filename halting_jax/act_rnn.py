"""ACT-RNN models of every task form, as bundles of pure functions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from common.errors import UserError, require
from halting_jax.act_calls import zero_state
from halting_jax.act_networks import (
    ActRnnSettings,
    CallsNetwork,
    TranslationNetwork,
)
from halting_jax.act_progress import ActProgress, act_advance, act_finish, act_start
from halting_jax.pondernet import make_pondernet
from halting_jax.types import FORMS, Batch, Model, Outputs, Params, TaskShape

HALTING_PATH = "^act/halting/"

__all__ = ["ActRnnSettings", "make_act_rnn", "make_network"]


def make_network(shape: TaskShape, settings: ActRnnSettings) -> CallsNetwork | TranslationNetwork:
    """The network of a task form.

    Raises:
      UserError: the form is unknown, or a setting does not act for it.
    """
    if shape.form not in FORMS:
        raise UserError(f"task form '{shape.form}' is none of {', '.join(FORMS)}")
    require(
        shape.form == "vector" or not settings.input_proj,
        "task.input_proj=True works for vectors (parity) only: set it to False",
    )
    require(
        shape.form in ("grid", "vector") or settings.kind != "pondernet",
        "act.kind=pondernet works for tasks with one ponder loop per example (maze, sudoku, "
        "parity): use act.kind=act",
    )
    if shape.form == "seq2seq":
        return TranslationNetwork(shape, settings)
    return CallsNetwork(shape, settings)


def make_act_rnn(shape: TaskShape, settings: ActRnnSettings) -> Model:
    """An ACT-RNN for a task.

    Args:
      shape: of the task.
      settings: sizes and choices.

    Returns:
      the model; a `pondernet.PonderNetModel` with kind "pondernet". With kind "act" all forms but
      seq2seq can run in pieces.

    Raises:
      UserError: the form is unknown, or a setting does not act for it.
    """
    network = make_network(shape, settings)

    def init(key: jax.Array) -> Params:
        return network.init(key, _example(shape))["params"]

    def apply(params: Params, batch: Batch, fixed_steps: int = 0) -> Outputs:
        outcome: Any = network.apply({"params": params}, batch, fixed_steps)
        return outcome

    model = Model(
        type="act_rnn",
        init=init,
        apply=apply,
        halting_path="" if settings.kind == "none" else HALTING_PATH,
        max_steps=settings.act.time_limit,
    )
    if isinstance(network, TranslationNetwork) or settings.kind == "none":
        return model
    if settings.kind == "pondernet":
        return make_pondernet(network, model)
    return _in_pieces(network, model)


def _in_pieces(network: CallsNetwork, model: Model) -> Model:
    """Adds inference that rows can leave."""
    settings = network.settings

    def start(params: Params, batch: Batch) -> ActProgress:
        outcome: Any = network.apply({"params": params}, batch, method="begin")
        products, valid = outcome
        state = zero_state(products, settings.act, settings.num_states)
        return act_start(products, state, settings.act, valid)

    def advance(params: Params, progress: ActProgress, count: int) -> ActProgress:
        return act_advance(params["act"], progress, count)

    def running(progress: ActProgress) -> jax.Array:
        return progress.carry.running

    def finish(params: Params, progress: ActProgress) -> Outputs:
        calls = act_finish(progress)
        outcome: Any = network.apply({"params": params}, calls, progress.valid, method="finish")
        return outcome

    return dataclasses.replace(model, start=start, advance=advance, running=running, finish=finish)


def _example(shape: TaskShape) -> Batch:
    """One row of zeros, from which the network's parameters take their shapes."""
    tokens = shape.form in ("grid", "seq2seq")
    size = {"vector": (1, shape.features), "frames": (1, 1, shape.features)}.get(
        shape.form, (1, shape.length)
    )
    return Batch(
        inputs=jnp.zeros(size, jnp.int32 if tokens else jnp.float32),
        input_mask=jnp.ones(size[:2], bool),
        targets=jnp.zeros((1, 1), jnp.int32),
        target_mask=jnp.ones((1, 1), bool),
        decoder_inputs=jnp.zeros((1, 1), jnp.int32),
        difficulty=jnp.zeros((1,), jnp.int32),
    )
