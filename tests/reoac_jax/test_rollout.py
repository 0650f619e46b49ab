"""The plus rollout against a loop in plain Python, one row at a time; independence of rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reoac_jax.backbone.base import Canvas
from reoac_jax.episodes import Episodes
from reoac_jax.rollout import rollout_plus
from reoac_jax.rollout_paper import rollout_paper
from reoac_jax.settings import Agent, RolloutSettings
from reoac_jax.types import OPERATORS
from reoac_jax.unmasking import before_eos
from tests.reoac_jax.plain_rollout import KEY, double, plain_episode
from tests.reoac_jax.toy_setting import (
    GEN,
    SPECIAL,
    toy_agent,
    toy_backbone,
    toy_canvas,
    toy_params,
    toy_settings,
    toy_tables,
)

BACKBONE = toy_backbone()
ROWS = [0, 1, 2, 3, 4, 5]
CASES: dict[str, dict[str, Any]] = {
    "argmax": {"selection_mode": "argmax"},
    "repairs": {
        "selection_mode": "random",
        "patience": 1,
        "stop_at_eos": False,
        "remask_ratio": 0.3,
        "max_steps": 8,
    },
    "no exit": {"selection_mode": "fixed:O_NUM", "early_exit": False, "relation_temperature": 0.1},
    "fast": {"selection_mode": "fixed:O_FAST", "patience": 2, "max_steps": 9, "use_hidden": False},
}


# ------------------------------------------------------------------------------- the tests
def run(
    settings: RolloutSettings,
    canvas: Canvas,
    agent: Agent,
    params: Any,
    rollout: Any = rollout_plus,
) -> Episodes:
    compiled = jax.jit(functools.partial(rollout, BACKBONE, settings))
    return jax.device_get(compiled(toy_tables(), params, agent, canvas, jax.random.key(KEY)))


@pytest.mark.parametrize("name", CASES)
def test_plain_python_agrees(name: str) -> None:
    settings = toy_settings(**CASES[name])
    agent = toy_agent(settings, BACKBONE, "plus")
    params = toy_params(BACKBONE, eos_bias=2.0)
    canvas = toy_canvas(ROWS)
    episodes = run(settings, canvas, agent, params)
    plain_agent = Agent(double(agent.actor), double(agent.critic), agent.stats)
    steps = episodes.steps
    for row in range(len(ROWS)):
        wanted = plain_episode(settings, double(params), plain_agent, canvas, row)
        count = len(wanted)
        assert int(episodes.num_steps[row]) == count
        assert steps.active[row].tolist() == [t < count for t in range(settings.max_steps)]
        for t, decision in enumerate(wanted):
            for field in ("operator", "valid", "written", "gen_before"):
                np.testing.assert_array_equal(
                    getattr(steps, field)[row, t], decision[field], err_msg=f"{field} {row} {t}"
                )
            assert steps.chosen[row, t] == decision["operator"]
            np.testing.assert_allclose(steps.features[row, t], decision["features"], atol=3e-5)
            np.testing.assert_allclose(steps.q[row, t], decision["q"], atol=1e-4)
            np.testing.assert_allclose(steps.log_prob[row, t], decision["log_prob"], 1e-4, 1e-4)
            assert steps.cost[row, t] == pytest.approx(decision["cost"])
        assert episodes.final_ids[row].tolist() == wanted[-1]["after"]
        assert episodes.cost[row] == pytest.approx(sum(d["cost"] for d in wanted), rel=1e-6)
    lengths = set(episodes.num_steps.tolist())
    assert settings.early_exit or lengths == {settings.max_steps}
    if settings.patience:
        undone = (steps.gen_before[:, :-1] != SPECIAL.mask_id) & (
            steps.gen_before[:, 1:] == SPECIAL.mask_id
        )
        assert (undone.any(axis=2) & steps.active[:, 1:]).any(), "no repair was made"
        assert len(lengths) > 1


@pytest.fixture(scope="module")
def sampled() -> dict[str, Any]:
    """Everything drawn at random, with repairs; compiled once."""
    settings = toy_settings(
        sample_strategy="sample", patience=1, max_steps=7, temperature=0.8, save_relation=True
    )
    compiled = jax.jit(functools.partial(rollout_plus, BACKBONE, settings))
    tables, agent = toy_tables(), toy_agent(settings, BACKBONE, "plus")
    params = toy_params(BACKBONE, eos_bias=1.0)

    def roll(canvas: Canvas, key: int = KEY) -> Episodes:
        return jax.device_get(compiled(tables, params, agent, canvas, jax.random.key(key)))

    return {"settings": settings, "roll": roll, "whole": roll(toy_canvas(ROWS)), "jit": compiled}


def assert_same_row(left: Episodes, i: int, right: Episodes, j: int) -> None:
    """Row i of left equals row j of right, records of finished steps included."""
    for name in ("final_ids", "num_steps", "cost", "relation"):
        one, other = getattr(left, name)[i], getattr(right, name)[j]
        np.testing.assert_allclose(one, other, 1e-5, 1e-5, err_msg=name)
    for name, value in vars(left.steps).items():
        other = getattr(right.steps, name)[j]
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value[i], other, 1e-4, 2e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(value[i], other, err_msg=name)


def test_rows_do_not_depend_on_neighbours_nor_on_padding(sampled: dict[str, Any]) -> None:
    other = sampled["roll"](toy_canvas([11, 3, 25, 1, 5, 14], padding=3))
    for i, j in ((3, 1), (1, 3), (5, 4)):
        assert_same_row(sampled["whole"], i, other, j)


def test_rows_do_not_depend_on_the_batch_size(sampled: dict[str, Any]) -> None:
    for row in (0, 4):
        assert_same_row(sampled["whole"], row, sampled["roll"](toy_canvas([row])), 0)


def test_keys_matter_and_repeat(sampled: dict[str, Any]) -> None:
    again, other = sampled["roll"](toy_canvas(ROWS)), sampled["roll"](toy_canvas(ROWS), 8)
    jax.tree.map(np.testing.assert_array_equal, sampled["whole"], again)
    assert (sampled["whole"].final_ids != other.final_ids).any()
    twins = sampled["roll"](toy_canvas([2] * 6))
    assert (twins.final_ids == twins.final_ids[0]).all()


def test_no_second_compilation(sampled: dict[str, Any]) -> None:
    sampled["roll"](toy_canvas(ROWS), 1)
    before = sampled["jit"]._cache_size()
    sampled["roll"](toy_canvas([9, 8, 7, 6, 5, 4]), 2)
    assert sampled["jit"]._cache_size() == before


def test_records_fit_together(sampled: dict[str, Any]) -> None:
    episodes: Episodes = sampled["whole"]
    steps, settings = episodes.steps, sampled["settings"]
    for row in range(len(ROWS)):
        count = int(episodes.num_steps[row])
        assert steps.active[row].tolist() == [t < count for t in range(settings.max_steps)]
        ids = [*steps.gen_before[row, :count], episodes.final_ids[row]]
        assert (ids[0] == SPECIAL.mask_id).all()
        for t in range(count):
            assert steps.valid[row, t, steps.operator[row, t]]
            written, before, after = steps.written[row, t], ids[t], ids[t + 1]
            assert (before[written] == SPECIAL.mask_id).all()
            assert (after[written] != SPECIAL.mask_id).all()
            undone = (after != before) & ~written
            assert (after[undone] == SPECIAL.mask_id).all()
        final = ids[-1]
        open_part = np.asarray(before_eos(jnp.asarray(final)[None], SPECIAL.eos_id))[0]
        assert (final[open_part] != SPECIAL.mask_id).all()
        # Records behind the end are blank.
        assert not steps.features[row, count:].any() and not steps.written[row, count:].any()
        assert (steps.gen_before[row, count:] == SPECIAL.mask_id).all()
        assert episodes.relation is not None
        length = int(episodes.canvas.prompt_len[row])
        assert not episodes.relation[row, length:].any()
        assert (steps.log_prob[row, :count] <= 0).all() and not steps.log_prob[row, count:].any()


def test_last_step_completes_what_a_slow_policy_left() -> None:
    """O_NUM void, positions due pushed to the end: one step is left, everything is written."""
    settings = toy_settings(max_steps=1, stop_at_eos=False, selection_mode="fixed:O_OP")
    agent = toy_agent(settings, BACKBONE, "plus")
    episodes = run(settings, toy_canvas([0, 3]), agent, toy_params(BACKBONE))
    assert (episodes.final_ids != SPECIAL.mask_id).all()
    assert episodes.steps.written.all() and episodes.num_steps.tolist() == [1, 1]


def test_before_eos() -> None:
    ids = jnp.asarray([[1, 27, 2, 27], [27, 29, 29, 29], [1, 2, 3, 4]])
    expected = [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert before_eos(ids, 27).tolist() == expected


# --------------------------------------------------------------------------- paper rollout
@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    settings = toy_settings(
        max_steps=3, sample_strategy="sample", num_sigma_steps=3, fallback_operator="O_FAST"
    )
    compiled = jax.jit(functools.partial(rollout_paper, BACKBONE, settings))
    tables, agent = toy_tables(), toy_agent(settings, BACKBONE, "paper")
    params = toy_params(BACKBONE)

    def roll(canvas: Canvas) -> Episodes:
        return jax.device_get(compiled(tables, params, agent, canvas, jax.random.key(KEY)))

    return {"settings": settings, "roll": roll, "whole": roll(toy_canvas(ROWS)), "jit": compiled}


def test_paper_always_runs_all_steps(paper: dict[str, Any]) -> None:
    episodes: Episodes = paper["whole"]
    steps = episodes.steps
    assert (episodes.num_steps == 3).all() and steps.active.all() and episodes.relation is None
    costs = np.asarray([spec.cost for spec in paper["settings"].operators.specs])
    np.testing.assert_allclose(steps.cost, costs[steps.operator])
    np.testing.assert_allclose(episodes.cost, steps.cost.sum(axis=1))
    after = np.concatenate([steps.gen_before[:, 1:], episodes.final_ids[:, None]], axis=1)
    assert (after[~steps.written] == steps.gen_before[~steps.written]).all()
    limits = np.asarray([spec.limit for spec in paper["settings"].operators.specs])
    assert (steps.written.sum(axis=2) <= limits[steps.operator]).all()
    replaced = steps.operator != steps.chosen
    assert (steps.operator[replaced] == OPERATORS.index("O_FAST")).all()


def test_paper_rows_are_independent(paper: dict[str, Any]) -> None:
    other = paper["roll"](toy_canvas([11, 3, 25, 1, 5, 14], padding=3))
    before = paper["jit"]._cache_size()
    alone = paper["roll"](toy_canvas([4]))
    for i, right, j in ((3, other, 1), (5, other, 4), (4, alone, 0)):
        for field in ("operator", "chosen", "written", "gen_before"):
            left = getattr(paper["whole"].steps, field)[i]
            np.testing.assert_array_equal(left, getattr(right.steps, field)[j])
        np.testing.assert_allclose(
            paper["whole"].steps.features[i], right.steps.features[j], 1e-4, 2e-5
        )
    assert paper["jit"]._cache_size() == before + 1  # the other batch size only


def test_settings_from_config_read_every_key() -> None:
    from reoac_jax.defaults import get_default_config

    config = get_default_config()
    config.operators.O_NUM.k = 7
    config.relation.canvas = "tentative"
    config.rollout.gpu_critic = False
    settings = RolloutSettings.from_config(config, selection_mode="argmax")
    assert settings.operators.specs[0].max_tokens == 7 and settings.operators.ids == OPERATORS
    assert settings.operators.specs[4].step_scale == 1.5
    assert settings.tentative and settings.path == "host" and settings.selection_mode == "argmax"
    assert hash(settings) == hash(RolloutSettings.from_config(config, selection_mode="argmax"))
    assert settings.gen_len == config.rollout.gen_len != GEN
