"""--mode=train: draw, step, log, validate, save; one function read from top to bottom."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from common import dist, log
from common.checkpoint import Checkpointer
from common.errors import Interrupted, UserError
from common.fsdp import Layout
from common.metrics import MetricWriter, StepTimer, peak_memory
from common.rundir import RunDir, atomic_write_json
from common.signals import StopRequest
from halting_jax import log_names
from halting_jax.build import Built, build, parameter_count, time_penalty_target
from halting_jax.datasets.maze_tokens import VOCAB_SIZE
from halting_jax.evaluate import Evaluator, SetResult
from halting_jax.learner import (
    OptimSettings,
    TrainState,
    compile_steps,
    init_state,
    make_step,
    state_specs,
)
from halting_jax.reports import progress_text, training_row, write_report
from halting_jax.schedules import learning_rate, time_penalty
from halting_jax.source import Source, data_directory, file_source, generated_source, is_file_task
from halting_jax.structure import checkpoint_path, default_structure, structure
from halting_jax.tasks import maze_metrics


def make_source(config: ConfigDict, workdir: Path) -> tuple[Source, Built]:
    """The data of a run and the task and model that fit it."""
    if is_file_task(config):
        if config.data.dir == "generated" and config.task.name == "maze":
            # Generating takes minutes: a model that cannot be built is refused before.
            build(config, config.data.side**2, VOCAB_SIZE)
        source = file_source(config, data_directory(config, workdir))
        facts = source.facts
        return source, build(config, facts["seq_len"], facts["vocab_size"])
    built = build(config)
    evaluation = config.eval
    return (
        generated_source(built.task, evaluation.val_size, evaluation.test_size, evaluation.seed),
        built,
    )


def optim_settings(config: ConfigDict, steps: int, per_epoch: int) -> OptimSettings:
    """The optimiser of a run of `steps` steps."""
    optim = config.optim
    if optim.schedule_unit == "epoch":
        warmup, total, unit = optim.warmup_epochs, config.train.max_epochs, per_epoch
    else:
        warmup, total, unit = optim.warmup_steps or optim.warmup_epochs * per_epoch, steps, 1
    warmup = 0 if optim.schedule == "constant" else warmup
    return OptimSettings(
        rate=learning_rate(optim.lr, optim.schedule, warmup, total, unit),
        tau=time_penalty(
            time_penalty_target(config),
            config.act.time_penalty_start,
            config.act.time_penalty_warmup_steps,
        ),
        beta2=optim.beta2,
        weight_decay=optim.weight_decay,
        decay_mask=optim.decay_mask,
        clip_norm=optim.clip_norm,
        ema_decay=optim.ema.decay if optim.ema.enabled else 0.0,
        freeze_steps=config.act.halt_warmup_steps,
    )


def make_evaluator(config: ConfigDict, built: Built, mesh: Any) -> Evaluator:
    """The compiled evaluation that a config asks for."""
    return Evaluator(
        built.task,
        built.model,
        mesh,
        batch_size=config.eval.batch_size,
        tau=time_penalty_target(config),
        ponder_reduce=config.act.ponder_reduce,
        fixed_steps=config.act.fixed_ponder_steps,
        early_exit=config.eval.early_exit,
        path_metrics=maze_metrics.path_metrics if config.task.name == "maze" else None,
        finalize=maze_metrics.finalize if is_file_task(config) else None,
        mode=config.parallel.mode,
    )


def train(
    config: ConfigDict, run: RunDir, on_start: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train, validate, keep the best and the last checkpoints, and test at the end.

    Args:
      config: finalized tree.
      run: run directory; a checkpoint in it is continued.
      on_start: called when data and checkpoint are accepted, before anything is written.

    Returns:
      {set name: row of metrics} of the final test.

    Raises:
      UserError: bad data or an incompatible checkpoint. Interrupted: stopped on request.
    """
    begun = time.monotonic()
    mesh = dist.make_mesh(config.parallel.num_devices)
    batch_size = config.data.batch_size
    if batch_size % mesh.devices.size:
        raise UserError(
            f"config key data.batch_size={batch_size} must be a multiple of the "
            f"{mesh.devices.size} devices (parallel.num_devices)"
        )
    source, built = make_source(config, run.path)
    per_epoch = source.steps_per_epoch
    steps = config.train.max_steps or config.train.max_epochs * per_epoch
    settings = optim_settings(config, steps, per_epoch)
    state, layout = fresh_state(config, built, source, settings, mesh)
    step_fn = make_step(built.task, built.model, built.objective, settings, layout)
    run_steps = compile_steps(
        step_fn, source.draw, mesh, config.parallel.mode, layout, jax.eval_shape(lambda: state)
    )
    row_ids = dist.shard_batch(mesh, jnp.arange(batch_size, dtype=jnp.int32))
    evaluator = make_evaluator(config, built, mesh)
    save_every = config.train.save_every_steps or config.train.save_every_epochs * per_epoch
    task, model = config.task.name, config.model.type
    facts = source.facts | {
        "model_type": model,
        "task": task,
        "parameters": parameter_count(state.params),
        "steps": steps,
    }

    with (
        StopRequest() as stop,
        Checkpointer(
            run.checkpoints,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            best="max",
            settings=structure(config, source.facts),
            defaults=default_structure(),
        ) as checkpoints,
        MetricWriter(run.path, dist.is_main(), config.logging.tensorboard) as writer,
    ):
        step, spent = 0, 0.0
        rows: list[dict[str, Any]] = []
        resumable = checkpoints if checkpoints.latest_step() is not None else None
        if config.train.resume not in ("auto", "none") and resumable is None:
            resumable = Checkpointer(
                checkpoint_path(config.train.resume)[0],
                settings=structure(config, source.facts),
                defaults=default_structure(),
                read_only=True,
            )
        if config.train.resume != "none" and resumable is not None:
            state, host = resumable.restore(state)
            step, spent = host["step"], host["seconds"]
            rows = host.get("rows", [])
            log.info("resuming at step %d", step)
        on_start()
        if dist.is_main():
            atomic_write_json(run.path / "model.json", facts)
        writer.truncate_after(step, rows if resumable is checkpoints else ())

        def interrupted() -> bool:
            limit = config.train.max_walltime_s
            late = bool(limit and time.monotonic() - begun > limit)
            return dist.any_process(stop.requested or late)

        def leave(saved: str) -> None:
            stop.check(saved)
            if interrupted():
                raise Interrupted(
                    f"{saved} saved after train.max_walltime_s; run the same command again"
                )

        def save(metric: float | None = None) -> None:
            seconds = spent + time.monotonic() - begun
            host = {
                "step": step,
                "position": step * batch_size,
                "seconds": seconds,
                "rows": writer.take_recent(),
            }
            checkpoints.save(step, state, host, metric=metric)

        def evaluate_now(
            name: str, progress: str = "", saved: str = ""
        ) -> tuple[dict[str, float], SetResult]:
            before = (lambda: leave(saved)) if saved else (lambda: None)
            row: dict[str, float] = {}
            result = None
            for params, suffix in both_weights(state):
                result = evaluator.run(params, source.evaluation[name], progress, before)
                row |= log_names.eval_row(
                    task, model, name, result.metrics, result.ponder, result.losses, suffix
                )
            assert result is not None
            return row, result

        timer = StepTimer()
        bar = tqdm(total=steps, initial=step, unit="step", disable=not dist.is_main())
        with bar:
            while step < steps:
                stops = [config.train.log_every, config.eval.every, save_every]
                end = min([steps, *(next_multiple(step, every) for every in stops if every)])
                count = end - step
                sent = padded(source.send(step, count, batch_size), config.train.log_every)
                sent = dist.shard_batch(mesh, sent)
                with timer.part("train"):
                    state, sums = run_steps(state, row_ids, sent, count)
                    sums = jax.device_get(sums)
                step = end
                row = training_row(config, built, sums)
                if per_epoch:
                    row["epoch"] = step / per_epoch
                finite = np.isfinite(row["debug/grad_norm"])
                validated = config.eval.every and (step % config.eval.every == 0 or step == steps)
                metric = None
                if finite and validated:
                    with timer.part("evaluation"):
                        values, result = evaluate_now("val")
                    row |= values
                    metric = result.metrics[built.task.selection_metric]
                timing = timer.finish({"examples": count * batch_size, "steps": count})
                row["examples_per_s"] = timing["speed/examples_per_second"]
                writer.write(step, row | timing | peak_memory())
                if not finite:
                    raise UserError(
                        f"the gradient is not finite at step {step} (debug/grad_nan_param_count "
                        "in metrics.jsonl): lower optim.lr or set optim.clip_norm=1; the last "
                        "checkpoint is untouched"
                    )
                bar.update(count)
                bar.set_postfix_str(progress_text(config, row, timing))
                due = bool(save_every) and step % save_every == 0
                if validated or due or step == steps or interrupted():
                    save(metric)
                    leave(f"step {step}")
        table = {}
        results = {}
        for name in source.evaluation:
            row, result = evaluate_now(name, f"test {name}", f"step {step}")
            table[name], results[name] = row, result
    seconds = spent + time.monotonic() - begun
    write_report(config, run, step, table, results, source.trivial, seconds)
    if dist.is_main():
        run.finish()
    return table


def fresh_state(
    config: ConfigDict, built: Built, source: Source, settings: OptimSettings, mesh: Mesh
) -> tuple[TrainState, Layout]:
    """The state before any step, made where it lies; carried rows start from the first batch."""

    def carry() -> Any:
        if built.init_carry is None:
            return ()
        rows = jnp.arange(config.data.batch_size, dtype=jnp.int32)
        sent = jax.tree.map(lambda x: jnp.asarray(x[:, 0]), source.send(0, 1, len(rows)))
        return built.init_carry(source.draw(jax.random.key(config.seed), rows, sent))

    def make() -> TrainState:
        return init_state(built.model, settings, config.seed, carry)

    shapes = jax.eval_shape(make)
    layout = Layout.of(shapes.params, mesh, config.parallel.fsdp)
    return jax.jit(make, out_shardings=state_shardings(mesh, shapes, layout))(), layout


def state_shardings(mesh: Mesh, state: TrainState, layout: Layout) -> TrainState:
    """Where every array of a state (or its shapes) lies."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        state_specs(state, layout),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def place(mesh: Mesh, state: TrainState) -> TrainState:
    """Weights on every device, carried rows split over them."""
    return dist.place(state, state_shardings(mesh, state, Layout()))


def both_weights(state: TrainState) -> list[tuple[Any, str]]:
    """(weights, suffix in the log); the last are those the best checkpoint is chosen by."""
    averaged = [(state.ema, "_ema")] if state.ema != () else []
    return [(state.params, ""), *averaged]


def padded(sent: Any, count: int) -> Any:
    """Arrays [B, k] widened to a fixed number of steps, so that one program serves all k."""
    return jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, max(count - x.shape[1], 0)))), sent)


def next_multiple(step: int, every: int) -> int:
    """The next step above `step` that is a multiple of `every`."""
    return (step // every + 1) * every
