"""Which directory a command works in: the one named, the unfinished one, or a new one."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from common import log
from common.rundir import RunDir

DONE = "DONE"


def find_or_create(config: ConfigDict, workdir: str, mode: str) -> RunDir:
    """The run directory of a training command.

    With --workdir that directory. Without, the newest run of the experiment if it has the same
    resolved config and is not finished, so that the same command continues; else a new one.
    """
    root, name = config.logging.output_dir, config.logging.exp_name
    if mode == "pretrain" and not name.endswith("pretrain"):
        name = f"{name}_pretrain"
    if workdir:
        return RunDir.create(root, name, workdir)
    latest = Path(root).expanduser() / name / "latest"
    if config.checkpoint.resume and latest.is_dir() and not (latest / DONE).exists():
        saved = latest / "config_resolved.json"
        try:
            same = json.loads(saved.read_text())["config"] == json.loads(
                config.to_json_best_effort()
            )
        except (OSError, ValueError, KeyError):
            same = False
        if same:
            path = latest.resolve()
            log.info("continuing the unfinished run %s", path)
            return RunDir.create(root, name, str(path))
    return RunDir.create(root, name)
