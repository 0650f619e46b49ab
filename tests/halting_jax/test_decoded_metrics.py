"""What a sequence model writes by itself, beside what it says under teacher forcing."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import dist
from configs.halting_copy import get_config
from halting_jax.build import Built, build
from halting_jax.defaults import finalize
from halting_jax.evaluate import Evaluator
from halting_jax.source import EvalSet, generated_source
from halting_jax.types import Batch

SIZE, PAD = 21, 0  # of a set: no multiple of the batches
METRIC = "decoded_char_accuracy"


def made(model: str) -> tuple[Built, Any]:
    """A tiny model with weights large enough that tokens differ from row to row."""
    config = get_config("tiny")
    config.model.type = model
    config.act.time_limit = 3
    config.task.position_offset = -1
    finalize(config)
    built = build(config)
    params = jax.jit(built.model.init)(jax.random.key(5))
    return built, jax.tree.map(lambda x: 3.0 * x, params)


def evaluator(built: Built, batch_size: int = 8, **given: Any) -> Evaluator:
    return Evaluator(
        built.task, built.model, dist.make_mesh(1), batch_size=batch_size, tau=0.0, **given
    )


def whole(examples: EvalSet) -> Batch:
    return jax.jit(examples.batch)(np.arange(examples.size, dtype=np.int32))


@pytest.mark.parametrize("model", ["universal_transformer", "act_rnn"])
def test_test_sets_are_decoded_token_by_token(model: str) -> None:
    built, params = made(model)
    sets = generated_source(built.task, SIZE, SIZE, seed=3).evaluation
    decode = built.model.decode
    assert decode is not None
    batch = whole(sets["ood"])
    tokens = np.asarray(decode(params, batch, batch.targets.shape[1]))
    assert len({tuple(row) for row in tokens}) > 3
    mask = np.asarray(batch.target_mask)
    wanted = np.mean((tokens == np.asarray(batch.targets))[mask])
    one = evaluator(built)
    assert one.run(params, sets["ood"]).metrics[METRIC] == pytest.approx(wanted, abs=1e-6)
    # Validation sequences may stand behind padding; a fixed number of steps is another model.
    assert METRIC not in one.run(params, sets["val"]).metrics
    if model == "act_rnn":
        assert METRIC not in evaluator(built, fixed_steps=2).run(params, sets["ood"]).metrics


@pytest.mark.parametrize("model", ["universal_transformer", "act_rnn"])
def test_a_sequence_is_right_in_one_way_exactly_if_it_is_in_the_other(model: str) -> None:
    built, params = made(model)
    batch = whole(generated_source(built.task, SIZE, SIZE, seed=3).evaluation["ood"])
    assert built.model.decode is not None
    width = batch.targets.shape[1]
    own = np.array(built.model.decode(params, batch, width))
    # Answers without padding inside; every third one then differs from the model's in one token.
    clean = np.flatnonzero(np.all((own[:, :-1] != PAD) | (own[:, 1:] == PAD), axis=1))
    own, batch = own[clean], jax.tree.map(lambda x: x[clean], batch)
    count = len(clean)
    assert count > SIZE // 2
    wrong = np.arange(count) % 3 == 0
    last = np.maximum((own != PAD).sum(axis=1) - 1, 0)
    own[wrong, last[wrong]] = np.where(own[wrong, last[wrong]] == 5, 6, 5)
    shifted = np.concatenate([np.full((count, 1), 1), own[:, :-1]], axis=1)
    mask = own != PAD
    answered = dataclasses.replace(
        batch,
        targets=jnp.asarray(own),
        target_mask=jnp.asarray(mask),
        decoder_inputs=jnp.asarray(np.where(mask, shifted, PAD)),
    )
    examples = EvalSet("ood", count, lambda rows: jax.tree.map(lambda x: x[rows], answered))
    result = evaluator(built, batch_size=count).run(params, examples)
    assert result.metrics["sequence_accuracy"] == pytest.approx(np.mean(~wrong))
    assert result.metrics[METRIC] == pytest.approx(1 - wrong.sum() / mask.sum(), abs=1e-6)
