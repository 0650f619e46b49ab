"""The compiled calls of a run: rollout and update for the chosen algorithm, mesh and mode."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from common.fsdp import Layout
from common.spmd import ROWS, WHOLE, spmd
from reoac_jax.backbone.base import Backbone
from reoac_jax.episodes import Episodes
from reoac_jax.learner import make_update_plus
from reoac_jax.learner_paper import make_update_paper
from reoac_jax.learner_state import WHOLE_LAYOUT, LearnerSettings, LearnerState, state_specs
from reoac_jax.rollout import rollout_plus
from reoac_jax.rollout_paper import rollout_paper
from reoac_jax.settings import RolloutSettings
from reoac_jax.tables import Tables


def compile_rollout(
    backbone: Backbone,
    settings: RolloutSettings,
    tables: Tables,
    algo: str,
    mesh: Mesh,
    mode: str = "jit",
) -> Callable[..., Episodes]:
    """rollout(params, agent, canvas, key) -> Episodes, rows split over the devices.

    Each device leaves its loop when its own rows are done.
    """
    run = rollout_plus if algo == "plus" else rollout_paper

    def from_stored(tables: Any, params: Any, *rest: Any) -> Episodes:
        # An adapter is merged once per batch of episodes, not once per step.
        return run(backbone, settings, tables, backbone.finetuning.inference(params), *rest)

    compiled = spmd(
        from_stored,
        mesh,
        (WHOLE, WHOLE, WHOLE, ROWS, WHOLE),
        ROWS,
        mode=mode,
    )
    # The tables are an argument, not a constant: constants are copied into every compiled program.
    tables = jax.tree.map(jax.numpy.asarray, tables)

    def rollout(params: Any, agent: Any, canvas: Any, key: jax.Array) -> Episodes:
        return compiled(tables, params, agent, canvas, key)

    return rollout


def compile_update(
    backbone: Backbone,
    settings: LearnerSettings,
    rollout_settings: RolloutSettings,
    mesh: Mesh,
    mode: str = "jit",
    layout: Layout = WHOLE_LAYOUT,
    shapes: LearnerState | None = None,
) -> Callable[..., Any]:
    """update(state, rows..., key) -> (state, metrics); see the two learners for the rows.

    plus: (state, episodes, reward, target, key). paper: (state, steps, canvas, returns, target,
    target_len, count).

    Args:
      layout: where the backbone's parameters and moments lie.
      shapes: of the learner's state; needed where the layout cuts arrays.
    """
    state: Any = WHOLE
    if shapes is not None and layout.num_devices > 1:
        state = state_specs(shapes, layout)
    if settings.algo == "plus":
        return spmd(
            make_update_plus(backbone, settings, layout),
            mesh,
            (state, ROWS, ROWS, ROWS, WHOLE),
            (state, WHOLE),
            mode=mode,
            donate=(0,),
        )
    return spmd(
        make_update_paper(backbone, settings, rollout_settings, layout),
        mesh,
        (state, WHOLE, WHOLE),
        (state, WHOLE),
        mode=mode,
        donate=(0,),
    )
