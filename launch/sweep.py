"""The runs of a config file's `sweep(add)`: every `add(...)` is one run with its own overrides.

def sweep(add):
    for rate in (1e-3, 3e-4):
        for seed in range(3):
            add({"optim.lr": rate, "seed": seed})
"""

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import flags
from common.errors import UserError

SWEEP_FLAG = "--sweep"
INDEX = "SLURM_ARRAY_TASK_ID"


def runs_of(spec: str) -> list[dict[str, Any]]:
    """The overrides of every run, checked against the config's keys.

    Args:
        spec: `path[:variant]`, as for --config.

    Raises:
        UserError: the file has no sweep, two runs are equal, or a key is unknown.
    """
    config = flags.load_config(spec)
    path = Path(spec.partition(":")[0]).expanduser()
    if not path.is_file() and not path.is_absolute():
        path = flags.REPOSITORY / path
    module_spec = importlib.util.spec_from_file_location(f"sweep_of_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    sweep: Callable[..., None] | None = getattr(module, "sweep", None)
    if not callable(sweep):
        raise UserError(f"config file {path.name!r} has no function sweep(add)")
    runs: list[dict[str, Any]] = []

    def add(overrides: Mapping[str, Any]) -> None:
        runs.append(dict(overrides))

    sweep(add)
    if not runs:
        raise UserError(f"config file {path.name!r}: sweep(add) adds no run")
    known = flags.flatten(config)
    for index, run in enumerate(runs):
        for key in run:
            if key not in known:
                raise UserError(
                    f"config file {path.name!r}, run {index} of its sweep: unknown config key "
                    f"{key}{flags.nearest(key, known)}"
                )
        if run in runs[:index]:
            raise UserError(
                f"config file {path.name!r}: runs {runs.index(run)} and {index} of its sweep are "
                "equal"
            )
    return runs


def name_of(index: int, run: Mapping[str, Any]) -> str:
    """A directory name that says what is special about a run."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in run.items()]
    return re.sub(r"[^A-Za-z0-9=.,_-]+", "_", ",".join([f"{index:03d}", *parts]))[:100]


def arguments_of(run: Mapping[str, Any]) -> list[str]:
    """The overrides as flags."""
    return [f"--config.{key}={value}" for key, value in run.items()]


def settings(arguments: Sequence[str], index: int) -> list[str]:
    """The flags of one run of the sweep: the common ones, its own, and its directory.

    Args:
        arguments: MODULE and flags, with --config and (the sweep's) --workdir.

    Raises:
        UserError: no config was named, or there is no such run.
    """
    specs = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    if not specs:
        raise UserError("a sweep needs --config=FILE, whose sweep(add) names the runs")
    runs = runs_of(specs[-1])
    if not 0 <= index < len(runs):
        raise UserError(f"run {index} of a sweep of {len(runs)} runs (0 to {len(runs) - 1})")
    roots = [word.partition("=")[2] for word in arguments if word.startswith("--workdir=")]
    root = roots[-1] if roots else f"runs/sweep_{Path(specs[-1].partition(':')[0]).stem}"
    common = [word for word in arguments if not word.startswith("--workdir=")]
    run = runs[index]
    return [*common, *arguments_of(run), f"--workdir={Path(root) / name_of(index, run)}"]


def with_settings(arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """In a job array started with --sweep: the flags of this task's run; else what was given.

    Raises:
        UserError: --sweep outside a job array.
    """
    if SWEEP_FLAG not in arguments:
        return list(arguments)
    rest = [word for word in arguments if word != SWEEP_FLAG]
    if not environ.get(INDEX, "").isdigit():
        raise UserError(f"{SWEEP_FLAG} needs a job array ({INDEX}); start it with launch/array.py")
    return settings(rest, int(environ[INDEX]))
