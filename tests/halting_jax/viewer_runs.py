"""Run directories with random weights, as a training run leaves them but without the training."""

from pathlib import Path
from typing import Any

import jax

from common import flags
from common.checkpoint import Checkpointer
from common.rundir import append_jsonl, atomic_write_json
from halting_jax.defaults import finalize
from halting_jax.learner import init_state
from halting_jax.structure import structure
from halting_jax.train import make_source, optim_settings

STEPS = 40
MAZES = {
    "data.side": 5,
    "data.min_path_moves": 4,
    "data.train_size": 8,
    "data.val_size": 4,
    "data.test_size": 4,
}
# Name -> (config, what differs from it): every kind of task and of halting once.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "maze_ut": ("configs/halting_maze_ut.py:tiny", MAZES | {"optim.ema.enabled": True}),
    "maze_act": ("configs/halting_maze_act.py:tiny", MAZES),
    "maze_trm": ("configs/halting_maze_ut.py:tiny_trm", MAZES),
    "parity": ("configs/halting_parity.py:tiny", {}),
    "pondernet": ("configs/halting_parity.py:tiny", {"act.kind": "pondernet"}),
    "addition": ("configs/halting_addition.py:tiny", {}),
    "logic": ("configs/halting_logic.py:tiny", {"task.encoding": "original"}),
    "sort": ("configs/halting_sort.py:tiny", {}),
    "copy": ("configs/halting_copy.py:tiny", {}),
}


def write_run(path: Path, kind: str) -> Path:
    """Writes a run of one of KINDS; its weights are those before the first step.

    Returns:
      the directory.
    """
    spec, changes = KINDS[kind]
    config = flags.load_config(spec)
    config.unlock()
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        target = config
        for part in section.split("."):
            target = target[part]
        target[key] = value
    finalize(config)
    source, built = make_source(config, path)
    settings = optim_settings(config, STEPS, max(source.steps_per_epoch, 1))
    state = jax.jit(lambda: init_state(built.model, settings, config.seed))()
    with Checkpointer(
        path / "checkpoints", best="max", settings=structure(config, source.facts)
    ) as checkpoints:
        checkpoints.save(STEPS, state, {"step": STEPS, "position": 0, "seconds": 1.0}, metric=0.5)
    atomic_write_json(path / "model.json", source.facts | {"steps": STEPS, "parameters": 1234})
    flags.dump_config(config, path / "config_resolved.json")
    write_log(path)
    return path


def write_log(path: Path) -> None:
    """A short log and final test, with the names of a parity run."""
    for step in range(10, STEPS + 1, 10):
        row = {"iteration": step, "train/loss_classification": 1 / step, "lr": 1e-3}
        row |= {"train/accuracy": step / STEPS, "train/steps": 2.0}
        if step % 20 == 0:
            row |= {"val/accuracy": step / STEPS, "val/accuracy_ema": 0.5, "epoch": step / 20}
        append_jsonl(path / "metrics.jsonl", row)
    report = {
        "step": STEPS,
        "sets": {
            "id": {"test/id/accuracy": 0.75, "test/id/steps": 2.0},
            "ood": {"test/ood/accuracy": 0.5, "test/ood/accuracy_ema": 0.625},
        },
        "by_difficulty": {
            "id": [
                {"low": 1, "high": 1, "n": 5, "accuracy": 1.0, "steps": 2.0},
                {"low": 2, "high": 4, "n": 6, "accuracy": 0.5, "steps": 3.0},
            ]
        },
    }
    atomic_write_json(path / "eval.json", report)
