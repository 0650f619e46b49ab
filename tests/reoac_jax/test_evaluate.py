"""Evaluation in batches of any size."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import dist
from common.statistics import wilson_interval
from reoac_jax.backbone.base import Canvas
from reoac_jax.episodes import Episodes, Steps
from reoac_jax.evaluate import (
    Evaluation,
    format_table,
    run_policy,
    summary,
    write_report,
)
from reoac_jax.prompts import PromptSet
from reoac_jax.rewards import Graded

NUM, WIDTH, GEN, HORIZON, ACTIONS = 7, 4, 3, 5, 5
MASK, PAD = 90, 91


def _prompts() -> PromptSet:
    ids = np.arange(NUM)
    return PromptSet(
        texts=[f"question {i}" for i in ids],
        golds=[str(3 * i) for i in ids],
        prompt=np.repeat(ids[:, None], WIDTH, 1).astype(np.int32),
        prompt_len=np.full(NUM, WIDTH, np.int32),
        key_mask=np.zeros((NUM, WIDTH), bool),
        absolute_target=np.zeros((NUM, WIDTH), np.int32),
        absolute_len=np.zeros(NUM, np.int32),
        canvas_target=np.zeros((NUM, GEN), np.int32),
        num_cut=0,
    )


def _rollout(params: Any, agent: Any, canvas: Canvas, key: jax.Array) -> Episodes:
    """Row i: answer 3 i, 1 + i % 5 decisions, the operator i % 5."""
    del params, agent, key
    number = jnp.asarray(canvas.tokens)[:, 0]
    batch = number.shape[0]
    count = 1 + number % HORIZON
    active = jnp.arange(HORIZON) < count[:, None]
    empty = jnp.zeros((batch, HORIZON))
    steps = Steps(
        features=empty[..., None],
        operator=jnp.broadcast_to((number % ACTIONS)[:, None], (batch, HORIZON)),
        chosen=empty.astype(jnp.int32),
        valid=jnp.ones((batch, HORIZON, ACTIONS), bool),
        log_prob=empty,
        q=jnp.zeros((batch, HORIZON, ACTIONS)),
        cost=empty,
        gen_before=jnp.zeros((batch, HORIZON, GEN), jnp.int32),
        written=jnp.zeros((batch, HORIZON, GEN), bool),
        confidence=jnp.zeros((batch, HORIZON, GEN)),
        active=active,
    )
    return Episodes(
        canvas=canvas,
        final_ids=jnp.repeat(3 * number[:, None], GEN, 1),
        steps=steps,
        num_steps=count,
        num_forwards=count,
        cost=2.0 * count,
        relation=None,
    )


class _Pending:
    def __init__(self, graded: Graded) -> None:
        self._graded, self.texts = graded, graded.texts

    def result(self) -> Graded:
        return self._graded


class _Grader:
    """Reads the answer out of the ids; every third is wrong by decree, one fails."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def submit(self, ids: np.ndarray, golds: list[str]) -> _Pending:
        assert len(ids) == len(golds)
        self.sizes.append(len(ids))
        texts = [str(int(row[0])) for row in ids]
        right = [t == g and int(g) % 9 != 0 for t, g in zip(texts, golds, strict=True)]
        return _Pending(Graded(texts, np.array(right, np.float32), texts.count("6")))


def _evaluate(batch_size: int, **options: Any) -> tuple[Evaluation, _Grader]:
    grader: Any = _Grader()
    result = run_policy(
        _rollout,
        {},
        None,  # type: ignore[arg-type]
        _prompts(),
        grader,
        dist.make_mesh(1),
        jax.random.key(0),
        mask_id=MASK,
        pad_id=PAD,
        batch_size=batch_size,
        **options,
    )
    return result, grader


@pytest.mark.parametrize("batch_size", [1, 2, 3, NUM, 50])
def test_results_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    result, grader = _evaluate(batch_size)
    # Padding rows repeat the last prompt and must not count.
    assert sum(grader.sizes) == NUM
    assert result.texts == [str(3 * i) for i in range(NUM)]
    np.testing.assert_array_equal(result.rewards, [0, 1, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(result.steps, [1, 2, 3, 4, 5, 1, 2])
    np.testing.assert_array_equal(result.costs, 2.0 * result.steps)
    np.testing.assert_array_equal(result.usage, [1 + 1, 2 + 2, 3, 4, 5])
    assert result.num_failed == 1


def test_limit_and_leaving_early() -> None:
    result, _ = _evaluate(2, limit=3)
    assert len(result.rewards) == 3
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        _evaluate(2, before_batch=stop)


def test_summary_report_and_table(tmp_path: Path) -> None:
    result, _ = _evaluate(4)
    numbers = summary(result, cost_lambda=0.5, max_steps=HORIZON, max_cost=4.0)
    assert numbers["n"] == NUM and numbers["grading_failures"] == 1
    assert numbers["accuracy"] == pytest.approx(4 / 7)
    assert tuple(numbers["accuracy_interval"]) == wilson_interval(4, 7)
    returns = result.rewards - 0.5 * result.costs / (HORIZON * 4.0)
    assert numbers["avg_return"] == pytest.approx(returns.mean())
    assert numbers["operators"]["O_FAST"] == pytest.approx(5 / 18)
    assert sum(numbers["operators"].values()) == pytest.approx(1.0)
    write_report(tmp_path / "eval.json", numbers, result, _prompts(), num_samples=2)
    report = json.loads((tmp_path / "eval.json").read_text())
    assert {k: report[k] for k in numbers} == numbers
    assert [s["prompt"] for s in report["samples"]] == ["question 0", "question 1"]
    lines = format_table([("first", numbers), ("the second", numbers)]).splitlines()
    assert len(lines) == 4 and lines[2].startswith("first ") and "57.1%" in lines[3]
