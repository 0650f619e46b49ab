"""The paper step with sampling, re-noising and restricted positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone.base import Backbone, Canvas
from reoac_jax.backbone.toy import simple_backbone, table_backbone
from reoac_jax.networks import init_heads
from reoac_jax.operators import operator_params
from reoac_jax.paper_step import PaperOptions, PaperRecord, paper_step
from reoac_jax.sampling import row_keys
from reoac_jax.tables import Tables, build_tables
from reoac_jax.types import SpecialIds

VOCAB = [str(i) for i in range(12)] + ["+", "a", "b", "<eos>", "<mask>"]
SPECIAL = SpecialIds(15, 15, 15, 16)
OPERATORS = operator_params([{"id": n, "params": {"scope_len": 3}} for n in ("O_SCOPE", "O_FAST")])


@pytest.fixture(scope="module")
def tables() -> Tables:
    return build_tables(VOCAB, SPECIAL)


def canvas_of(rows: list[int], gen_len: int = 6) -> Canvas:
    """Rows of different prompts; row r always holds the same content."""
    width = 5
    tokens = np.full((len(rows), width + gen_len), SPECIAL.pad_id, np.int32)
    lengths = np.asarray([2 + row % 3 for row in rows], np.int32)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens[index, :length] = (np.arange(length) + row) % 12
        tokens[index, length : length + gen_len] = SPECIAL.mask_id
    keys = np.ones((len(rows), width), bool)
    return Canvas(*map(jnp.asarray, (tokens, lengths, keys, np.asarray(rows, np.uint32))))


def run(
    backbone: Backbone, tables: Tables, canvas: Canvas, level: float, **options: object
) -> tuple[np.ndarray, PaperRecord]:
    operators, switches = OPERATORS, PaperOptions(fallback=0, **options)

    @jax.jit
    def step(canvas: Canvas) -> tuple[jax.Array, PaperRecord]:
        params = backbone.init(jax.random.key(0))
        actor, critic = init_heads(jax.random.key(1), 11 + backbone.hidden_size, num_operators=2)
        gen_ids = canvas.gen_ids().at[:, :2].set(3)
        keys = row_keys(jax.random.key(2), 4, canvas.row_id)
        return paper_step(
            *(backbone, switches, operators, tables, params, backbone.begin(params, canvas)),
            *(actor, critic, canvas, gen_ids, jnp.full(gen_ids.shape[:1], level), keys),
        )

    after, record = step(canvas)
    return np.asarray(after), record


def test_rows_do_not_depend_on_their_neighbours(tables: Tables) -> None:
    backbone = table_backbone(len(VOCAB), 8, SPECIAL, 16)
    sampled = {"selection_mode": "sample", "sample_strategy": "sample"}
    after, record = run(backbone, tables, canvas_of([0, 1, 2, 3]), 0.5, **sampled)
    some, part = run(backbone, tables, canvas_of([3, 1]), 0.5, **sampled)
    np.testing.assert_array_equal(after[[3, 1]], some)
    np.testing.assert_array_equal(record.chosen[jnp.asarray([3, 1])], part.chosen)
    np.testing.assert_allclose(record.features[jnp.asarray([3, 1])], part.features, atol=1e-6)


def test_only_the_mask_changes_and_never_to_a_mask(tables: Tables) -> None:
    backbone = simple_backbone(len(VOCAB), 8, SPECIAL, 16)
    for strategy in ("argmax", "sample"):
        after, record = run(backbone, tables, canvas_of([0, 1, 2]), 1.0, sample_strategy=strategy)
        before = np.asarray(record.gen_before)
        written = np.asarray(record.update_mask)
        np.testing.assert_array_equal(after[~written], before[~written])
        assert written.sum(axis=1).tolist() == [3, 3, 3]
        assert (after[written] != SPECIAL.mask_id).all()


def test_renoise_carries_visible_tokens_over(tables: Tables) -> None:
    backbone = simple_backbone(len(VOCAB), 8, SPECIAL, 16)
    after, record = run(backbone, tables, canvas_of([0, 1]), 0.0, renoise=True)
    kept = np.asarray(record.gen_before) == 3
    assert kept.any() and (after[kept] == 3).all()


def test_positions_that_may_not_be_edited(tables: Tables) -> None:
    backbone = simple_backbone(len(VOCAB), 8, SPECIAL, 16)

    def score(*arguments: object) -> object:
        scores = backbone.score(*arguments)
        return scores._replace(editable=jnp.arange(scores.hidden.shape[1])[None] < 2)

    limited = dataclasses.replace(backbone, score=score)
    _, record = run(limited, tables, canvas_of([0]), 1.0)
    assert not np.asarray(record.update_mask).any()  # the last three are all closed


def test_switches(tables: Tables) -> None:
    backbone = table_backbone(len(VOCAB), 8, SPECIAL, 16)
    _, record = run(backbone, tables, canvas_of([0, 1]), 1.0, fast_critic=True)
    assert record.relation is None and not np.asarray(record.features[:, :11]).any()
    _, record = run(backbone, tables, canvas_of([0, 1]), 1.0, save_relation=False)
    assert record.relation is None and np.asarray(record.features[:, :11]).any()
