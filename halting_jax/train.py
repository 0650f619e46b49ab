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

from common import dist, flags, log
from common.checkpoint import Checkpointer
from common.errors import Interrupted, UserError
from common.fsdp import Layout
from common.json_files import Fields, read_json_object
from common.metrics import MetricWriter, StepTimer, peak_memory
from common.rundir import RunDir, atomic_write_json
from common.signals import StopRequest
from halting_jax import log_names
from halting_jax.build import Built, build, parameter_count, time_penalty_target
from halting_jax.defaults import get_default_config
from halting_jax.evaluate import Evaluator, SetResult, difficulty_rows, format_difficulty
from halting_jax.learner import (
    OptimSettings,
    Sums,
    TrainState,
    compile_steps,
    init_state,
    make_step,
    state_specs,
)
from halting_jax.ponder_sums import ponder_report
from halting_jax.schedules import learning_rate, time_penalty
from halting_jax.source import Source, data_directory, file_source, generated_source, is_file_task
from halting_jax.tasks import maze_metrics
from halting_jax.tasks.maze_metrics import finalize as maze_finalize

# A checkpoint can only continue a run that agrees in these; lengths and cadence may change.
STRUCTURE = ("task", "model", "act", "ut", "trm", "optim.ema.enabled", "seed", "data.batch_size")
# What a model and its data must share for an evaluation.
_NOT_STRUCTURE = (
    "act.time_penalty",
    "act.disable_ponder_cost",
    "act.ponder_reduce",
    "act.halt_warmup_steps",
    "act.fixed_ponder_steps",
    "act.execution",
    "act.chunk",
    "act.prior",
    "act.kl_weight",
    "act.epsilon",
    "ut.act_loss_weight",
    "ut.remat",
    "ut.attn_impl",
    "ut.supervise_every",
    "trm.halt_exploration",
    "trm.halt_at_eval",
    "task.near_ood_bits",
    "task.ood_bits",
    "task.eval_",
    "task.test_max_digits",
)


def structure(config: ConfigDict, facts: dict[str, Any]) -> dict[str, Any]:
    """Keys that a checkpoint and a run must agree in, with the sizes of the data."""
    chosen = flags.select(config, STRUCTURE)
    chosen = {k: v for k, v in chosen.items() if not k.startswith(_NOT_STRUCTURE)}
    return chosen | {f"dataset.{k}": facts[k] for k in ("seq_len", "vocab_size") if k in facts}


def default_structure() -> dict[str, Any]:
    """What `structure` gives for the default config."""
    return structure(get_default_config(), {})


def make_source(config: ConfigDict, workdir: Path) -> tuple[Source, Built]:
    """The data of a run and the task and model that fit it."""
    if is_file_task(config):
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
        finalize=maze_finalize if is_file_task(config) else None,
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
                row = training_row(config, built, sums, float(settings.tau(step - 1)))
                row["lr"] = float(settings.rate(step - 1))
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
    write_report(config, run, step, table, results, spent + time.monotonic() - begun)
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


def training_row(config: ConfigDict, built: Built, sums: Sums, tau: float) -> dict[str, float]:
    """The logged values of the steps behind some sums."""
    finalize = maze_finalize if is_file_task(config) else _mean_values
    means = dict(sums.means)
    terms = {name: _value(means.pop(name)) for name in ("classification", "ponder")}
    charged = config.act.kind == "act" or config.model.type == "universal_transformer"
    added = 0.0 if config.act.disable_ponder_cost or not charged else tau * terms["ponder"]
    losses = {
        "classification": terms["classification"],
        "ponder": terms["ponder"],
        "ponder_added": added,
        "total": terms["classification"] + added,
    }
    row = log_names.train_row(
        config.task.name,
        config.model.type,
        finalize(means),
        ponder_report(sums.ponder),
        losses,
        tau,
    )
    row["debug/grad_norm"] = float(sums.grad_norm)
    row["mean_inner_steps_executed"] = ponder_report(sums.ponder)["mean_inner_steps_executed"]
    if sums.nan_count or sums.inf_count:
        row["debug/grad_nan_param_count"] = int(sums.nan_count)
        row["debug/grad_inf_param_count"] = int(sums.inf_count)
        row["debug/grad_norm_at_anomaly"] = row["debug/grad_norm"]
    return row


def _value(ratio: Any) -> float:
    return float(ratio.total) / float(ratio.count) if ratio.count else 0.0


def _mean_values(means: dict[str, Any]) -> dict[str, float]:
    return {name: _value(ratio) for name, ratio in means.items()}


def progress_text(config: ConfigDict, row: dict[str, float], timing: dict[str, float]) -> str:
    """What the progress bar shows beside its rate."""
    prefix = "" if is_file_task(config) else "train/"
    loss = row[f"{prefix}loss_cls" if not prefix else f"{prefix}loss_classification"]
    steps = row["steps" if not prefix else f"{prefix}ponder_steps"]
    shown = [f"loss={loss:.4f}", f"ponder={steps:.2f}"]
    shown += [
        f"{name.removeprefix(prefix)}={row[name]:.3f}"
        for name in (f"{prefix}{n}" for n in _ACCURACIES)
        if name in row
    ]
    return " ".join([*shown, f"ex/s={timing['speed/examples_per_second']:.0f}"])


_ACCURACIES = (
    "puz_acc",
    "cell_acc",
    "accuracy",
    "accuracy_sequence",
    "sequence_accuracy",
    "per_token_accuracy",
)


def checkpoint_path(name: str) -> tuple[Path, int | None]:
    """The checkpoint directory behind RUN, RUN/checkpoints or RUN/checkpoints/STEP, and the step.

    Raises:
      UserError: there is no such directory.
    """
    path = Path(name).expanduser()
    step = int(path.name) if path.name.isdigit() and path.parent.name == "checkpoints" else None
    path = path.parent if step is not None else path
    if not path.is_dir():
        raise UserError(f"{name}: no such directory; name the run directory of a training run")
    inner = path / "checkpoints"
    return (inner if inner.is_dir() else path), step


def write_report(
    config: ConfigDict,
    run: RunDir,
    step: int,
    table: dict[str, dict[str, float]],
    results: dict[str, SetResult],
    seconds: float,
) -> None:
    """Writes eval.json and prints the final table; the main process does."""
    if not dist.is_main():
        return
    report: dict[str, Any] = {"step": step, "seconds": seconds, "sets": table}
    if config.eval.by_difficulty:
        report["by_difficulty"] = {name: difficulty_rows(r) for name, r in results.items()}
    atomic_write_json(run.path / "eval.json", report)
    print("\n" + format_table(results))
    last = list(results)[-1] if len(results) > 1 else "val"
    shown = next((n for n in results if n not in ("val", last)), last)
    if config.eval.by_difficulty:
        print(f"\n{shown}, by difficulty (bits, digits, gates, items, symbols or moves)")
        print(format_difficulty(report["by_difficulty"][shown]))
    print(f"\n{step} steps, {seconds:.0f} s of training; files in {run.path}")


def format_table(results: dict[str, SetResult]) -> str:
    """One line per set: examples, loss, steps, and every metric of the task."""
    names = list(dict.fromkeys(n for result in results.values() for n in result.metrics))
    head = ["set", "examples", "loss", "steps", *names]
    lines = ["  ".join(f"{h:>10}" for h in head)]
    lines.append("-" * len(lines[0]))
    for name, result in results.items():
        cells = [f"{name:>10}", f"{len(result.correct):>10}"]
        cells += [f"{result.losses['classification']:>10.4f}", f"{result.ponder['steps']:>10.2f}"]
        cells += [f"{result.metrics[n]:>{max(len(n), 10)}.4f}" for n in names]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def saved_config(run: Path) -> dict[str, Any]:
    """The resolved config that a run directory holds.

    Raises:
      UserError: there is none.
    """
    cure = "train first, or name the run directory of a training run"
    path = run / "config_resolved.json"
    fields: Fields = {"config": dict, "config.model": dict, "config.task": dict}
    config: dict[str, Any] = read_json_object(path, cure, fields)["config"]
    return config
