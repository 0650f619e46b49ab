"""--mode=eval: a checkpoint on the held-out prompts, greedy, strict."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common import dist
from common.checkpoint import Checkpointer
from common.errors import UserError
from common.fsdp import Layout
from reoac_jax.data import load_prompts
from reoac_jax.engine import compile_rollout
from reoac_jax.evaluate import format_table, run_policy, summary, write_report
from reoac_jax.learner_state import LearnerSettings, LearnerState
from reoac_jax.models import Models, load_models
from reoac_jax.settings import RolloutSettings, evaluation_settings
from reoac_jax.train import checkpoint_settings, fresh_state, grader_for, restored, stored


def load_learner(
    config: ConfigDict, models: Models, checkpoint: str | Path, mesh: Mesh
) -> tuple[LearnerState, int]:
    """The learner state of a checkpoint and its iteration.

    Args:
      checkpoint: a run directory, its checkpoints directory, or one step in it.
      mesh: where it goes.

    Raises:
      UserError: there is no checkpoint, or it belongs to another architecture.
    """
    path = Path(checkpoint).expanduser()
    step = int(path.name) if path.name.isdigit() and path.parent.name == "checkpoints" else None
    if step is not None:
        path = path.parent
    if not path.is_dir():
        raise UserError(f"--checkpoint={checkpoint}: no such directory")
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    rollout = RolloutSettings.from_config(config)
    settings = LearnerSettings.from_config(config, rollout.operators.max_cost)
    layout = Layout.of(models.params, mesh, config.parallel.fsdp)
    state = fresh_state(config, models, settings, rollout, mesh, layout)
    wanted = checkpoint_settings(config, models)
    # Evaluation may use another data set and seed than training did.
    relevant = {
        k: v
        for k, v in wanted.items()
        if not k.startswith("dataset.")
        and k not in ("seed", "episodes_per_iter", "buffer_size")
        and k != "rollout.batch_size"
    }
    with Checkpointer(path, settings=relevant, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            raise UserError(
                f"{path} holds no finished checkpoint: train first, or name another run"
            )
        saved, host = checkpoints.restore(
            {"learner": stored(state, settings, models)}, step, partial=True
        )
    learner = restored(saved["learner"], state, settings, models)
    return learner, int(host["iteration"])


def evaluate_checkpoint(config: ConfigDict, checkpoint: str, output: str = "") -> dict[str, Any]:
    """Evaluate and print a table; writes eval_<task>.json (default: runs/).

    Raises:
      UserError: no checkpoint was named or it cannot be used.
    """
    if not checkpoint:
        raise UserError("--mode=eval needs --checkpoint=RUN: the run directory of a training run")
    mesh = dist.make_mesh(config.parallel.num_devices)
    models = load_models(config)
    state, iteration = load_learner(config, models, checkpoint, mesh)
    prompts = load_prompts(config, "test", models.tokenizer, config.eval.limit)
    settings = evaluation_settings(config)
    rollout = compile_rollout(
        models.backbone, settings, models.tables, config.algo, mesh, config.parallel.mode
    )
    with grader_for(config, models, evaluation=True) as grader:
        result = run_policy(
            rollout,
            state.backbone,
            state.agent,
            prompts,
            grader,
            mesh,
            jax.random.fold_in(jax.random.key(config.seed), 2),
            mask_id=models.backbone.mask_id,
            pad_id=models.backbone.pad_id,
            batch_size=config.eval.batch_size,
            progress="evaluate",
        )
    numbers = summary(
        result,
        cost_lambda=config.rollout.cost_lambda,
        max_steps=config.rollout.max_steps,
        max_cost=settings.operators.max_cost,
    )
    numbers |= {
        "checkpoint": str(checkpoint),
        "iteration": iteration,
        "score_mode": models.backbone.score_mode,
    }
    path = Path(output or Path(config.logging.output_dir) / f"eval_{config.dataset.task}.json")
    if not dist.is_main():
        return numbers
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, numbers, result, prompts, 16)
    print(format_table([(f"iteration {iteration}", numbers)]))
    print(f"{numbers['n']} problems; written to {path}")
    return numbers
