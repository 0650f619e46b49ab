"""How the decision to stop builds up over the inner steps of one example."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from halting_jax.loader import Trained
from halting_jax.types import Batch, Ponder

Curve = tuple[tuple[float, ...], str]


def halting_curve(trained: Trained, batch: Batch, ponder: Ponder) -> Curve:
    """The halting curve of one example.

    Args:
      trained: the model.
      batch: one row.
      ponder: of the model's own run on it, without fixed steps.

    Returns:
      one value per inner step up to the limit, and what it is: the accumulated halting probability,
      mean over the calls (ACT-RNN) or positions (Universal Transformer); for the recursive model
      the halting probability of each supervision step. Empty for models that cannot halt.
    """
    model = trained.built.model
    if model.type == "trm":
        values = _recursive_curve(trained, batch)
        return values, "halting probability after each supervision step"
    if not model.halting_path:
        return (), "this model does not halt by itself"
    if model.type == "universal_transformer":
        values = _position_curve(trained, batch)
        return values, "accumulated halting probability, mean over positions"
    calls = max(int(np.sum(ponder.mask)), 1)
    mass = np.asarray(ponder.mass, float) / calls
    return tuple(float(v) for v in mass), "accumulated halting probability, mean over calls"


def _position_curve(trained: Trained, batch: Batch) -> tuple[float, ...]:
    """Mean mass of the valid positions after each hop, by running the model hop by hop."""
    model, params = trained.built.model, trained.params
    assert model.start and model.advance  # it halts, so it can be run in pieces
    rows: Any = jax.jit(model.start)(params, batch)
    advance = jax.jit(model.advance, static_argnums=2)
    mask = np.asarray(batch.input_mask[0])
    values = []
    for _ in range(model.max_steps):
        rows = advance(params, rows, 1)
        mass = np.asarray(rows.carry.mass[0])[mask]
        values.append(float(mass.mean()) if mass.size else 0.0)
    return tuple(values)


def _recursive_curve(trained: Trained, batch: Batch) -> tuple[float, ...]:
    """sigmoid(q) after each supervision step, whether or not the row would have stopped."""
    from halting_jax.trm_network import initial_latents, make_net

    shape = trained.built.task.shape
    settings = recursive_settings(trained.config)
    net = make_net(shape, settings)

    @jax.jit
    def run(params: Any, batch: Batch) -> jax.Array:
        bound = net.bind({"params": params})
        inputs = bound.embed(batch.inputs, batch.input_mask)

        def step(latents: Any, _: None) -> tuple[Any, jax.Array]:
            latents = bound.think(latents, inputs, batch.input_mask, settings.cycles)
            return latents, jax.nn.sigmoid(bound.halting_logits(latents, batch.input_mask)[0])

        start = initial_latents(settings, 1, shape.length)
        start = jax.tree.map(jnp.asarray, start)
        return jax.lax.scan(step, start, None, length=settings.supervision_steps)[1]

    return tuple(float(v) for v in run(trained.params, batch))


def recursive_settings(config: ConfigDict) -> Any:
    """The settings of a recursive model, read from the config keys of the same names."""
    from halting_jax.trm import TrmSettings

    section = {"hidden_size": config.model.hidden_size, "dtype": config.model.dtype}
    names = {field.name for field in dataclasses.fields(TrmSettings)}
    section |= {name: config.trm[name] for name in names & set(config.trm)}
    return TrmSettings(**section)
