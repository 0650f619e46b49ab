"""Which directory a command works in: the one named, the unfinished one, or a new one."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from common import log
from common.processes import is_main, on_main
from common.rundir import RunDir, point_latest


def find_or_create(config: ConfigDict, root: str, name: str, workdir: str, resume: bool) -> RunDir:
    """The run directory of a training command.

    With --workdir that directory. Without, the newest run of the experiment with the same resolved
    config if it is not finished, so that the same command continues; else a new one.

    Args:
      config: the finalized config, compared with what a run directory holds.
      root: directory of all runs.
      name: of the experiment.
      workdir: value of --workdir, or "".
      resume: False always starts a new run where no workdir is named.

    Collective: the main process decides, the others work in the same directory.
    """
    return RunDir(
        Path(on_main(lambda: str(_find_or_create(config, root, name, workdir, resume).path)))
    )


@contextlib.contextmanager
def sole_command(run: RunDir) -> Iterator[None]:
    """Holds the run directory for the processes of this command; see `RunDir.lock`.

    Raises:
      UserError: on every process, if another command works in it.
    """
    with contextlib.ExitStack() as held:
        on_main(lambda: held.enter_context(run.lock()))
        yield


def _find_or_create(config: ConfigDict, root: str, name: str, workdir: str, resume: bool) -> RunDir:
    if workdir:
        return RunDir.create(root, name, workdir)
    if resume:
        same = [path for path in _runs(Path(root).expanduser() / name) if _has_config(path, config)]
        if same and not RunDir(same[-1]).finished:
            log.info("continuing the unfinished run %s", same[-1])
            run = RunDir.create(root, name, same[-1])
            point_latest(run.path)
            return run
    return RunDir.create(root, name)


def discard_empty(run: RunDir) -> None:
    """Remove a directory whose run never started, and point `latest` at the newest one left."""
    if not is_main() or run.config.exists():
        return
    shutil.rmtree(run.path, ignore_errors=True)
    left = _runs(run.path.parent)
    if left:
        point_latest(left[-1])
    else:
        (run.path.parent / "latest").unlink(missing_ok=True)


def _runs(parent: Path) -> list[Path]:
    """Directories of an experiment's runs, oldest first."""
    if not parent.is_dir():
        return []
    found = (p.resolve() for p in parent.iterdir() if p.is_dir() and not p.is_symlink())
    # The name is the start time; runs of one second are numbered -2, -3, ...
    return sorted(found, key=lambda p: (p.name[:15], len(p.name), p.name))


def _has_config(path: Path, config: ConfigDict) -> bool:
    try:
        saved = json.loads(RunDir(path).config.read_text())["config"]
    except (OSError, ValueError, KeyError):
        return False
    return saved == json.loads(config.to_json_best_effort())
