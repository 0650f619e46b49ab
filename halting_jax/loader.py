"""Trained models from their run directories: the class, sizes and weights the run itself names."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from common import dist, log
from common.checkpoint import Checkpointer
from common.errors import UserError
from common.json_files import read_json_object
from common.rundir import atomic_write_json
from halting_jax.build import Built, act_rnn_settings, build, ut_settings
from halting_jax.defaults import FILE_TASKS, check_overrides, finalize, get_default_config
from halting_jax.evaluate import SetResult, difficulty_rows, format_difficulty
from halting_jax.learner import init_state
from halting_jax.reports import format_table, format_trivial
from halting_jax.source import Source
from halting_jax.structure import checkpoint_path, default_structure, saved_config, structure
from halting_jax.train import make_evaluator, make_source, optim_settings

# What an evaluation may set anew; everything else belongs to the trained model.
EVALUATION_KEYS = (
    "eval.",
    "data.dir",
    "act.fixed_ponder_steps",
    "trm.halt_at_eval",
    "parallel.",
    "task.near_ood_bits",
    "task.ood_bits",
    "task.eval_",
    "task.test_max_digits",
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model as it was trained.

    Attributes:
      config: of the run.
      built: task, model and objective.
      params: the averaged weights where the run kept them, else the last ones.
      raw_params: the last weights.
      facts: sizes of the data (`model.json` of the run).
      step: optimiser steps done.
      path: the run directory.
    """

    config: ConfigDict
    built: Built
    params: Any
    raw_params: Any
    facts: dict[str, Any]
    step: int
    path: Path


def load_config(run: Path) -> ConfigDict:
    """The config of a run; keys that a later version added take their defaults.

    Raises:
      UserError: the run has none, or it holds unknown keys.
    """
    config = get_default_config()
    saved = saved_config(run)
    saved["model"].setdefault("type", "act_rnn")  # as in runs before there was a choice
    try:
        _merge(config, saved, "")
        finalize(config)
    except UserError as error:
        raise UserError(
            f"{run / 'config_resolved.json'}: {error}; restore the file, or name another run"
        ) from error
    return config


def load_trained(
    checkpoint: str | Path, overrides: dict[str, Any] | None = None, best: bool = True
) -> Trained:
    """Loads the model of a run.

    Args:
      checkpoint: RUN, RUN/checkpoints or RUN/checkpoints/STEP.
      overrides: {dotted key: value} of the evaluation's own keys.
      best: without a named step, take the best validated one instead of the last.

    Raises:
      UserError: no checkpoint, a damaged or other one, or an override that belongs to training.
    """
    directory, step = checkpoint_path(str(checkpoint))
    run = directory.parent if directory.name == "checkpoints" else directory
    config = load_config(run)
    apply_overrides(config, overrides or {})
    facts = _facts(run)
    built = build(config, facts.get("seq_len", 0), facts.get("vocab_size", 0))
    settings = optim_settings(config, max(int(facts["steps"]), 1), 1)
    # The rows a recursive model carries are of no use here, and Orbax may leave them out.
    target = jax.eval_shape(lambda: init_state(built.model, settings, config.seed))
    wanted = {"params": target.params, "ema": target.ema, "step": target.step}
    with Checkpointer(
        directory,
        best="max",
        settings=structure(config, facts),
        defaults=default_structure(),
        read_only=True,
    ) as checkpoints:
        if step is None and best:
            step = checkpoints.best_step()
        state, host = checkpoints.restore(_State(**wanted), step, partial=True)
    params = state.ema if config.optim.ema.enabled else state.params
    return Trained(config, built, params, state.params, facts, int(host["step"]), run)


def evaluate_run(
    checkpoint: str, overrides: dict[str, Any], output: str = ""
) -> dict[str, SetResult]:
    """--mode=eval: every evaluation set of a run's task, and a table by difficulty.

    Args:
      checkpoint: see `load_trained`.
      overrides: of the evaluation's own keys.
      output: JSON file of the report; default: eval_step<STEP>.json in the run directory.
    """
    trained = load_trained(checkpoint, overrides)
    config = trained.config
    source, built = make_source(config, trained.path)
    refuse_other_data(trained, source)
    mesh = dist.make_mesh(config.parallel.num_devices)
    evaluator = make_evaluator(config, built, mesh)
    params = dist.replicate(mesh, trained.params)
    kind = "averaged" if config.optim.ema.enabled else "last"
    log.info("%s of step %d, %s weights", config.model.type, trained.step, kind)
    results = {
        name: evaluator.run(params, examples, f"evaluate {name}")
        for name, examples in source.evaluation.items()
    }
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "step": trained.step,
        "weights": kind,
        "sets": {
            name: {**r.metrics, "steps": r.ponder["steps"], "loss": r.losses["classification"]}
            for name, r in results.items()
        },
        "by_difficulty": {name: difficulty_rows(r) for name, r in results.items()},
    }
    if source.trivial:
        report["copy_input"] = source.trivial
    if not dist.is_main():
        return results
    path = Path(output) if output else trained.path / f"eval_step{trained.step}.json"
    atomic_write_json(path, report)
    print(format_table(results) + format_trivial(source.trivial))
    if config.eval.by_difficulty:
        for name, rows in report["by_difficulty"].items():
            print(f"\n{name}, by difficulty\n{format_difficulty(rows)}")
    print(f"\nwritten to {path}")
    return results


def export_run(checkpoint: str, output: str) -> Path:
    """--mode=export: weights as safetensors, and the config as JSON.

    Weights of the ACT-RNN and the Universal Transformer stand under the names and in the layout of
    the PyTorch modules they are compared with; those of the recursive model under our own.

    Args:
      checkpoint: see `load_trained`.
      output: directory; default: RUN/export.

    Returns:
      The directory.
    """
    from common.torch_bridge import write_safetensors
    from halting_jax.act_torch_names import export_act_rnn
    from halting_jax.ut_torch_names import export_ut

    trained = load_trained(checkpoint)
    directory = Path(output) if output else trained.path / "export"
    directory.mkdir(parents=True, exist_ok=True)
    params = jax.device_get(trained.params)
    config, shape = trained.config, trained.built.task.shape
    if config.model.type == "act_rnn":
        tensors = export_act_rnn(params, shape, act_rnn_settings(config))
    elif config.model.type == "universal_transformer":
        tensors = export_ut(params, shape, ut_settings(config))
    else:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        tensors = {
            jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
            for path, leaf in leaves
        }
    write_safetensors(directory / "model.safetensors", tensors, {"step": str(trained.step)})
    saved = json.loads(config.to_json_best_effort())
    atomic_write_json(directory / "config.json", {"config": saved, "data": trained.facts})
    return directory


def apply_overrides(config: ConfigDict, overrides: dict[str, Any]) -> None:
    """Sets the evaluation's own keys.

    Raises:
      UserError: a key belongs to the trained model, or would do nothing.
    """
    for key, value in overrides.items():
        if not key.startswith(EVALUATION_KEYS):
            raise UserError(
                f"--config.{key} belongs to the trained model; an evaluation can set "
                f"{', '.join(EVALUATION_KEYS)}"
            )
        section, _, name = key.rpartition(".")
        target = config
        for part in section.split("."):
            target = target[part]
        target[name] = value
    finalize(config)
    check_overrides(config, overrides)


def refuse_other_data(trained: Trained, source: Source) -> None:
    """Checks that a data set has the sizes the model was trained on.

    Raises:
      UserError: they differ; the line names both.
    """
    if trained.config.task.name not in FILE_TASKS:
        return
    for name in ("seq_len", "vocab_size"):
        saved, found = trained.facts[name], source.facts[name]
        if saved != found:
            raise UserError(
                f"the model was trained on data of {name} {saved}, {source.facts['source']} has "
                f"{found}; set data.dir to a data set of the same kind"
            )


@dataclasses.dataclass(frozen=True)
class _State:
    params: Any
    ema: Any
    step: Any


jax.tree_util.register_dataclass(_State, ["params", "ema", "step"], [])


def _facts(run: Path) -> dict[str, Any]:
    return read_json_object(run / "model.json", "train first, or restore it", {"steps": int})


def _merge(config: ConfigDict, saved: dict[str, Any], prefix: str) -> None:
    for key, value in saved.items():
        if key not in config:
            raise UserError(f"the run's config has the unknown key {prefix}{key}")
        if isinstance(value, dict) != isinstance(config[key], ConfigDict):
            raise UserError(f"the run's config has no section or value {prefix}{key} as it should")
        if isinstance(value, dict):
            _merge(config[key], value, f"{prefix}{key}.")
            continue
        try:
            config[key] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError):
            raise UserError(f"the run's config has a wrong value of {prefix}{key}") from None
