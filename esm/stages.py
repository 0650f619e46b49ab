"""One stage, or all of them, in a run directory."""

from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from common import dist
from common.errors import UserError
from esm import runs
from esm.library import build_memory, select_library
from esm.monitor import Monitor
from esm.runs import Run
from esm.session import NEEDS, Sessions

Stage = Callable[[ConfigDict, Run, Sessions, Monitor, Any], None]


def run_stage(config: ConfigDict, stage: str, given: Any) -> Run:
    """Runs a stage and writes its resolved config; a refused stage leaves the run as it was.

    Args:
        config: finalized.
        stage: a key of STAGES, or "all".
        given: parsed flags.

    Returns:
        The run directory.

    Raises:
        UserError: the stage's input is missing or does not fit.
        Interrupted: stopped on request; the same command continues.
    """
    run = runs.open_run(config, stage, given.workdir)
    sessions = Sessions(config, purposes(config, stage))
    parts = PARTS[stage](config) if stage in PARTS else (stage,)
    if any(part.startswith("mine") for part in parts):
        runs.check_same(config, run, "mine")
    if any(part in WITH_MODEL for part in parts):
        dist.initialize()
        _ = sessions.source  # a missing model is refused before anything is made
    is_new = not run.path.exists()
    runs.create(run)
    try:
        with run.lock(), Monitor(run.path, config.outputs.tensorboard) as monitor:
            monitor.info(f"run directory {run.path}, stage {stage}")
            for part in parts:
                STAGES[part](config, run, sessions, monitor, given)
            runs.finish(run, stage)
    except UserError:
        if is_new:
            runs.discard_unstarted(run)
        raise
    return run


def purposes(config: ConfigDict, stage: str) -> tuple[str, ...]:
    """What a stage asks of the backends, checked before a model is loaded."""
    if stage == "all":
        return tuple(NEEDS)
    if stage.startswith("mine"):
        return {"mine.rollouts": ("rollouts",), "mine.states": ("states",)}.get(
            stage, ("rollouts", "states")
        )
    if stage in ("eval", "case", "tune"):
        return ("rollouts", "online")
    return ()


def _mine(config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any) -> None:
    _mine_rollouts(config, run, sessions, monitor, given)
    _mine_states(config, run, sessions, monitor, given)


def _mine_rollouts(
    config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any
) -> None:
    from esm.mine import mine_rollouts

    del given
    runs.write_config(config, run, "mine")
    mine_rollouts(config, run, sessions, monitor)
    runs.point_latest(run)


def _mine_states(
    config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any
) -> None:
    from esm.mine import mine_states

    del given
    runs.write_config(config, run, "mine")
    mine_states(config, run, sessions, monitor)
    runs.point_latest(run)


def _tune(config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any) -> None:
    from esm.tune import tune

    del given
    tune(config, run, sessions, monitor, lambda: runs.write_config(config, run, "tune"))


def _select(config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any) -> None:
    del sessions, given
    select_library(config, run, monitor)
    runs.write_config(config, run, "select")
    runs.point_latest(run)


def _memory(config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any) -> None:
    del sessions, given
    build_memory(config, run, monitor)
    runs.write_config(config, run, "memory")


def _eval(config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any) -> None:
    from esm.evaluate import evaluate

    del given
    evaluate(config, run, sessions, monitor, lambda: runs.write_config(config, run, "eval"))


def _case(config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any) -> None:
    from esm.case import run_case

    run_case(config, run, sessions, monitor, given)


def _rescore(
    config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any
) -> None:
    from esm.rescore import rescore

    del sessions, given
    rescore(config, run, monitor)


def _postprocess(
    config: ConfigDict, run: Run, sessions: Sessions, monitor: Monitor, given: Any
) -> None:
    from esm.report import write_report

    del config, sessions, given
    write_report(run, monitor)


STAGES: dict[str, Stage] = {
    "mine": _mine,
    "mine.rollouts": _mine_rollouts,
    "mine.states": _mine_states,
    "tune": _tune,
    "select": _select,
    "memory": _memory,
    "eval": _eval,
    "case": _case,
    "rescore": _rescore,
    "postprocess": _postprocess,
}
WITH_MODEL = ("mine", "mine.rollouts", "mine.states", "tune", "eval", "case")


def _all_parts(config: ConfigDict) -> Sequence[str]:
    tuned = ("tune",) if config.tune.k_scales else ()
    return ("mine", *tuned, "select", "memory", "eval")


PARTS: dict[str, Callable[[ConfigDict], Sequence[str]]] = {"all": _all_parts}
