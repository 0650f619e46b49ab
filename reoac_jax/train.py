"""--mode=train: roll out, grade, update, log, save; one function read from top to bottom."""

import dataclasses
import json
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from common import dist, flags, log
from common.checkpoint import Checkpointer
from common.data import IndexShuffler
from common.errors import UserError
from common.fsdp import Layout
from common.lm.lora import save_peft
from common.metrics import MetricWriter, StepTimer, peak_memory
from common.rundir import RunDir, atomic_write_json
from common.signals import StopRequest
from reoac_jax import replay
from reoac_jax.collect import paper_episodes, roll_out_and_grade, write_samples
from reoac_jax.data import load_prompts
from reoac_jax.engine import compile_rollout, compile_update
from reoac_jax.episodes import Episodes
from reoac_jax.evaluate import format_table, run_policy, summary, write_report
from reoac_jax.learner_paper import PaperEpisode
from reoac_jax.learner_state import LearnerSettings, LearnerState, init_state, state_specs
from reoac_jax.models import Models, load_models
from reoac_jax.prompts import PromptSet, make_canvas
from reoac_jax.rewards import Grader
from reoac_jax.settings import (
    RolloutSettings,
    evaluation_settings,
    feature_size,
    training_settings,
)
from reoac_jax.types import OPERATORS

# A checkpoint can only continue a run that agrees in these.
SHAPE_SECTIONS = (
    "algo",
    "seed",
    "actor",
    "critic",
    "rollout.gen_len",
    "rollout.max_steps",
    "rollout.use_hidden",
    "rollout.group_size",
    "rollout.batch_size",
    "backbone.name",
    "backbone.max_length",
    "backbone.model_name_or_path",
    "finetune_mode",
    "lora",
    "episodes_per_iter",
    "buffer_size",
    "dataset",
)


def grader_for(config: ConfigDict, models: Models, *, evaluation: bool) -> Grader:
    """The grader of rewards, or of an evaluation (always strict)."""
    return Grader(
        models.tokenizer,
        models.backbone.mask_id,
        cut_at_eos=config.algo == "plus",
        task=config.dataset.task,
        mode="strict" if evaluation else config.reward.mode,
        verifier=config.eval.verifier if evaluation else config.reward.verifier,
        parser=config.eval.math_parser,
        workers=config.reward.workers,
        time_limit=config.reward.time_limit,
    )


def weights_digest(params: Any) -> str:
    """Checksum of a parameter tree; a checkpoint of frozen-backbone training names its backbone."""
    value = 0
    for leaf in jax.tree.leaves(params):
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return f"{value:08x}"


def fresh_state(
    config: ConfigDict,
    models: Models,
    settings: LearnerSettings,
    rollout: RolloutSettings,
    mesh: Mesh,
    layout: Layout,
) -> LearnerState:
    """The learner's state before any update, as config.seed draws it, on the mesh.

    Made where it will lie: no device ever holds more than its share.
    """

    def make(params: Any) -> LearnerState:
        return init_state(
            jax.random.fold_in(jax.random.key(config.seed), 0),
            settings,
            params,
            feature_size(rollout, models.backbone.hidden_size, config.algo),
            config.actor.hidden_size,
            config.critic.hidden_size,
            models.backbone.finetuning.trainable,
        )

    specs = state_specs(jax.eval_shape(make, models.params), layout)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
    params = dist.place(models.params, shardings.backbone)
    return jax.jit(make, out_shardings=shardings)(params)


def stored(state: LearnerState, settings: LearnerSettings, models: Models) -> LearnerState:
    """What a checkpoint holds: frozen parameters are named by their digest, not copied."""
    trained: Any = ()
    if settings.train_backbone:
        trained = models.backbone.finetuning.trainable(state.backbone)
    return dataclasses.replace(state, backbone=trained)


def restored(
    saved: LearnerState, state: LearnerState, settings: LearnerSettings, models: Models
) -> LearnerState:
    """Inverse of `stored`: what was saved, with the frozen parameters of `state`."""
    backbone = state.backbone
    if settings.train_backbone:
        backbone = models.backbone.finetuning.replace(backbone, saved.backbone)
    return dataclasses.replace(saved, backbone=backbone)


def checkpoint_settings(config: ConfigDict, models: Models) -> dict[str, Any]:
    """Keys that a checkpoint and a run must agree in."""
    return {
        **flags.select(config, SHAPE_SECTIONS),
        "backbone.digest": weights_digest(models.backbone.finetuning.frozen(models.params)),
    }


def train(
    config: ConfigDict, run: RunDir, on_start: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train the operator policy (and the backbone, unless frozen) and evaluate it.

    Args:
      config: finalized tree.
      run: run directory; a checkpoint in it is continued.
      on_start: called when data, weights and checkpoint are accepted, before anything is written.

    Returns:
      the final evaluation's summary.

    Raises:
      UserError: bad data, weights or an incompatible checkpoint. Interrupted: stopped on request.
    """
    plus = config.algo == "plus"
    mesh = dist.make_mesh(config.parallel.num_devices)
    models = load_models(config)
    prompts = load_prompts(config, "train", models.tokenizer)
    held_out = load_prompts(config, "test", models.tokenizer, config.eval.limit)
    if prompts.num_cut:
        log.warning("%d prompts are longer than backbone.max_length and were cut", prompts.num_cut)

    rollout_settings = training_settings(config)
    max_cost = rollout_settings.operators.max_cost
    settings = LearnerSettings.from_config(config, max_cost)
    compile_for = lambda s: compile_rollout(  # noqa: E731
        models.backbone, s, models.tables, config.algo, mesh, config.parallel.mode
    )
    rollout = compile_for(rollout_settings)
    greedy = compile_for(evaluation_settings(config))
    layout = Layout.of(models.params, mesh, config.parallel.fsdp)
    state = fresh_state(config, models, settings, rollout_settings, mesh, layout)
    shapes = jax.eval_shape(lambda: state)
    update = compile_update(
        models.backbone, settings, rollout_settings, mesh, config.parallel.mode, layout, shapes
    )
    run_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    eval_key = jax.random.fold_in(jax.random.key(config.seed), 2)
    shuffler = IndexShuffler(len(prompts), config.seed, shuffle=config.dataset.shuffle)
    group = config.rollout.group_size if plus else 1
    episodes_per_iter = config.episodes_per_iter
    batch_size = min(config.rollout.batch_size, episodes_per_iter)
    if episodes_per_iter % batch_size:
        raise UserError(
            f"config key episodes_per_iter={episodes_per_iter} must be a multiple of "
            f"rollout.batch_size={batch_size}"
        )
    numbers_of = {
        "cost_lambda": config.rollout.cost_lambda,
        "max_steps": config.rollout.max_steps,
        "max_cost": max_cost,
    }
    wanted = checkpoint_settings(config, models)
    facts = {
        "family": models.backbone.family,
        "score_mode": models.backbone.score_mode,
        "vocab_size": models.backbone.vocab_size,
        "parameters": sum(np.size(x) for x in jax.tree.leaves(models.params)),
        "digest": wanted["backbone.digest"],
        "provenance": models.provenance,
    }

    with (
        StopRequest() as stop,
        Checkpointer(
            run.checkpoints,
            keep=config.checkpoint.keep,
            best="max",
            settings=wanted,
        ) as checkpoints,
        MetricWriter(run.path, dist.is_main(), config.logging.tensorboard) as writer,
        grader_for(config, models, evaluation=False) as grader,
        grader_for(config, models, evaluation=True) as eval_grader,
    ):

        def evaluate_now(title: str, saved: str = "") -> dict[str, Any]:
            # With everything saved there is no need to finish before stopping.
            leave = (lambda: stop.check(saved)) if saved else (lambda: None)
            result = run_policy(
                greedy,
                state.backbone,
                state.agent,
                held_out,
                eval_grader,
                mesh,
                eval_key,
                mask_id=models.backbone.mask_id,
                pad_id=models.backbone.pad_id,
                batch_size=config.eval.batch_size,
                progress=title,
                before_batch=leave,
            )
            numbers = summary(result, **numbers_of)
            write_report(
                run.path / f"eval_{config.dataset.task}.json", numbers, result, held_out, 16
            )
            return numbers

        iteration, position = 0, 0
        rows_saved: list[dict[str, Any]] = []
        buffer = replay.ReplayBuffer(config.buffer_size)
        example = None if plus else _example(config, models, rollout_settings, held_out)
        if config.checkpoint.resume and checkpoints.latest_step() is not None:
            target: Any = {"learner": stored(state, settings, models)}
            if example is not None:
                target["buffer"] = replay.to_state(buffer, example)
            saved, host = checkpoints.restore(target)
            state = restored(saved["learner"], state, settings, models)
            iteration, position = host["iteration"], host["position"]
            rows_saved = host.get("rows", [])
            if example is not None:
                buffer = replay.from_state(dist.gather(saved["buffer"]))
            log.info("resuming at iteration %d", iteration)
        on_start()
        if dist.is_main():
            atomic_write_json(run.path / "backbone.json", facts)
        writer.truncate_after(iteration, rows_saved)
        before = None
        if iteration == 0:
            before = evaluate_now("evaluate untrained", "iteration 0")
            if dist.is_main():
                atomic_write_json(run.path / "eval_untrained.json", before)

        timer = StepTimer()
        bar = tqdm(
            total=config.num_iterations,
            initial=iteration,
            unit="iteration",
            disable=not dist.is_main(),
        )
        with bar:
            while iteration < config.num_iterations:
                key = jax.random.fold_in(run_key, iteration)
                rows = np.repeat(shuffler.indices(position, episodes_per_iter // group), group)
                row_ids = np.arange(episodes_per_iter)
                with timer.part("rollout"):
                    episodes, graded = roll_out_and_grade(
                        rollout,
                        state,
                        prompts,
                        rows,
                        row_ids,
                        batch_size,
                        models,
                        mesh,
                        grader,
                        jax.random.fold_in(key, 0),
                        grade_trials=bool(rollout_settings.tried_steps)
                        and not rollout_settings.tried_depth,
                    )
                if iteration % config.logging.sample_interval == 0:
                    write_samples(
                        run,
                        iteration,
                        episodes,
                        graded.rewards,
                        models,
                        grader,
                        prompts,
                        rows,
                        config,
                    )
                with timer.part("update"):
                    if plus:
                        reward, target_ids = dist.shard_batch(
                            mesh, (jnp.asarray(graded.rewards), prompts.canvas_target[rows])
                        )
                        state, metrics = update(
                            state,
                            dataclasses.replace(episodes, relation=None),
                            reward,
                            target_ids,
                            jax.random.fold_in(key, 1),
                        )
                        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                    else:
                        fresh = paper_episodes(
                            episodes, graded.rewards, prompts, rows, config.rollout.cost_lambda
                        )
                        buffer = replay.push(buffer, replay.unstack(fresh))
                        arrays = replay.to_state(buffer, example)
                        state, metrics = update(state, arrays.episodes, jnp.asarray(arrays.size))
                        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                        values |= _batch_metrics(
                            episodes, graded.rewards, config.rollout.cost_lambda
                        )
                position += episodes_per_iter // group
                iteration += 1
                row = _named(values, config, len(buffer) if not plus else episodes_per_iter)
                row["grading_failures"] = graded.num_failed
                row["grading_timeouts"] = graded.num_timeouts
                if any(not np.isfinite(row[f"{n}_loss"]) for n in ("critic", "actor", "backbone")):
                    raise UserError(
                        f"a loss is not finite at iteration {iteration}: lower the optim.*_lr"
                    )
                last = iteration == config.num_iterations
                if config.eval.interval and iteration % config.eval.interval == 0 and not last:
                    numbers = evaluate_now("")
                    row |= {f"eval/{k}": numbers[k] for k in ("accuracy", "avg_cost", "avg_return")}
                timing = timer.finish({"episodes": episodes_per_iter})
                writer.write(iteration, row | timing | peak_memory())
                bar.update(1)
                bar.set_postfix_str(
                    f"R={row['reward']:.3f} C={row['cost']:.2f} Lq={row['critic_loss']:.4f} "
                    f"Lp={row['actor_loss']:.4f} Lb={row['backbone_loss']:.4f} "
                    f"ep/s={timing['speed/episodes_per_second']:.1f}"
                )
                due = iteration % config.logging.checkpoint_interval == 0
                if due or last or stop.agreed():
                    tree: Any = {"learner": stored(state, settings, models)}
                    if example is not None:
                        tree["buffer"] = replay.to_state(buffer, example)
                    checkpoints.save(
                        iteration,
                        tree,
                        {
                            "iteration": iteration,
                            "position": position,
                            "rows": writer.take_recent(),
                        },
                        metric=row["return"],
                    )
                    stop.check(f"iteration {iteration}")
        after = evaluate_now("evaluate", f"iteration {iteration}")
    if not dist.is_main():
        return after
    if before is None and (run.path / "eval_untrained.json").is_file():
        before = json.loads((run.path / "eval_untrained.json").read_text())
    table = [("untrained policy", before)] if before else []
    print("\n" + format_table([*table, ("trained policy", after)]))
    usage = ", ".join(f"{name} {share:.0%}" for name, share in after["operators"].items())
    print(f"operators used: {usage}")
    print(f"{after['n']} problems; files in {run.path}")
    if models.lora is not None:
        adapter = dist.gather(state.backbone["lora"])
        if dist.is_main():
            save_peft(
                run.path / "adapter", adapter, models.lora, config.backbone.model_name_or_path
            )
    run.finish()
    return after


def _named(values: dict[str, float], config: ConfigDict, episodes: int) -> dict[str, Any]:
    """The row of metrics.jsonl: the original's names first, then everything else."""
    critic, actor = values["critic/loss"], values["actor/loss"]
    backbone = values["backbone/loss"]
    weights = config.losses
    total = values.get(
        "total_loss",
        weights.critic_weight * critic
        + weights.actor_weight * actor
        + weights.backbone_weight * backbone,
    )
    return {
        "critic_loss": critic,
        "actor_loss": actor,
        "backbone_loss": backbone,
        "total_loss": total,
        "episodes": episodes,
        **{k: v for k, v in values.items() if k != "total_loss"},
    }


def _batch_metrics(episodes: Episodes, rewards: np.ndarray, lam: float) -> dict[str, float]:
    """Reward, cost, steps and operator shares of a batch (paper; plus computes them on device)."""
    cost, operator = dist.gather((episodes.cost, episodes.steps.operator))
    share = np.bincount(operator.reshape(-1), minlength=len(OPERATORS)) / operator.size
    return {
        "reward": float(rewards.mean()),
        "cost": float(cost.mean()),
        "return": float((rewards - lam * cost).mean()),
        "steps": float(operator.shape[1]),
        **{f"operator/{n}": float(s) for n, s in zip(OPERATORS, share, strict=True)},
    }


def _example(
    config: ConfigDict, models: Models, settings: RolloutSettings, prompts: PromptSet
) -> PaperEpisode:
    """An empty episode of the buffer's shapes."""
    horizon, gen_len = settings.max_steps, settings.gen_len
    size = feature_size(settings, models.backbone.hidden_size, "paper")
    one = np.zeros(1, np.int64)
    canvas = make_canvas(prompts, one, one, models.backbone.mask_id, models.backbone.pad_id)
    return PaperEpisode(
        features=np.zeros((horizon, size), np.float32),
        operator=np.zeros(horizon, np.int32),
        gen_before=np.zeros((horizon, gen_len), np.int32),
        written=np.zeros((horizon, gen_len), bool),
        canvas=jax.tree.map(lambda x: np.zeros_like(x[0]), canvas),
        returns=np.float32(0.0),
        target=np.zeros(config.backbone.max_length, np.int32),
        target_len=np.int32(0),
    )
