"""Run directories: outputs/<run_name>/<run_id>/ and which of them a stage works in.

What a stage leaves behind is complete when its manifest stands, which is written last. "latest" is
the newest run that has what the stage needs; LATEST holds the id of the last run that was mined or
selected.
"""

import contextlib
import dataclasses
import datetime
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from common import flags, log
from common.errors import UserError, require
from common.rundir import RunDir, atomic_write, atomic_write_json
from esm.files import read_object

LATEST = "LATEST"
_NOTE = "run.json"
MINED, SELECTED, STORED = "mine", "library", "memory"
# What a stage reads, of its own run.
NEEDS = {
    "mine": None,
    "mine.rollouts": None,
    "mine.states": None,
    "all": None,
    "tune": MINED,
    "select": MINED,
    "memory": SELECTED,
    "eval": STORED,
    "case": STORED,
    "rescore": "eval",
    "postprocess": "eval",
}
_CURES = {
    MINED: "run --stage=mine first",
    SELECTED: "run --stage=select first",
    STORED: "run --stage=memory first",
    "eval": "run --stage=eval first",
}
# Sections a stage's results depend on; another value is another run.
_STAGE_KEYS = {
    "mine": (
        "seed",
        "model.name_or_path",
        "model.revision",
        "model.dtype",
        "model.params_dtype",
        "task.dataset",
        "task.train_split",
        "task.train_offset",
        "task.max_train_examples",
        "task.split_seed",
        "prompt",
        "control_points",
        "offline_mine",
        "eval.grader",
    ),
}
_NEUTRAL = ("offline_mine.batch_size_examples",)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's directory.

    Attributes:
        path: absolute.
    """

    path: Path

    @property
    def mine(self) -> Path:
        """Rollouts, candidates, keys, vectors."""
        return self.path / "mine"

    @property
    def library(self) -> Path:
        """Selected entries."""
        return self.path / "library"

    @property
    def memory(self) -> Path:
        """What is looked up."""
        return self.path / "memory"

    @property
    def eval(self) -> Path:
        """One directory per method."""
        return self.path / "eval"

    @property
    def tune(self) -> Path:
        """The grid on the dev part and what it chose."""
        return self.path / "tune"

    @property
    def tables(self) -> Path:
        """CSV and JSON."""
        return self.path / "tables"

    def has(self, part: str) -> bool:
        """Whether a part is complete."""
        if part == "eval":
            return any(self.eval.glob("*/per_example.jsonl"))
        return (self.path / part / "manifest.json").is_file()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """No second process writes here; what a killed one left half written is removed."""
        with RunDir(self.path).lock():
            for path in self.path.rglob(".*.tmp"):
                path.unlink(missing_ok=True)
            yield


def open_run(config: ConfigDict, stage: str, workdir: str = "") -> Run:
    """The directory a stage works in.

    `workdir` or `outputs.run_id` names it. Otherwise a stage that starts the pipeline continues the
    newest unfinished run of the same config or makes a new one, and a later stage takes the newest
    run that has what it needs.

    Raises:
        UserError: there is no such run, or it lacks what the stage needs.
    """
    needed = NEEDS[stage]
    if stage in ("eval", "case") and config.eval.artifact_run_dir:
        needed = None
    parent = Path(config.outputs.root_dir).expanduser().resolve() / config.outputs.run_name
    name = config.outputs.run_id
    if workdir:
        run = Run(Path(workdir).expanduser().resolve())
    elif name and name != "latest":
        require(Path(name).name == name, f"outputs.run_id={name!r} must be one path component")
        run = Run(parent / name)
    elif name == "latest" or (needed is not None):
        run = find_latest(parent, needed or MINED if stage != "mine" else needed)
    else:
        run = _unfinished(parent, config, stage) or Run(_fresh(parent))
    if needed is not None and not run.has(needed):
        raise UserError(f"{run.path} has no finished {needed}; {_CURES[needed]}")
    return run


def find_latest(parent: Path, needed: str | None) -> Run:
    """The newest run of a name that has what is needed.

    Raises:
        UserError: there is none.
    """
    runs = [run for run in _runs(parent) if needed is None or run.has(needed)]
    if not runs:
        cure = _CURES.get(needed or "", "run --stage=mine first")
        raise UserError(f"no run under {parent} has a finished {needed or 'start'}; {cure}")
    pointed = read_latest(parent)
    for run in runs:
        if run.path.name == pointed:
            return run
    return runs[-1]


def artifact_run(config: ConfigDict, run: Run) -> Run:
    """The run whose library and memory are used: another one where the config names it.

    Raises:
        UserError: it has no memory.
    """
    named = config.eval.artifact_run_dir
    if not named:
        return run
    path = Path(named).expanduser()
    if not path.exists() and not path.is_absolute():
        path = Path(config.outputs.root_dir).expanduser() / path
    found = find_latest(path.parent.resolve(), STORED) if path.name == "latest" else Run(path)
    require(
        found.has(STORED),
        f"eval.artifact_run_dir={named}: {found.path} has no finished memory; run --stage=memory "
        "on it first",
    )
    return Run(found.path.resolve())


def read_latest(parent: Path) -> str:
    """The id in LATEST, "" if there is none."""
    try:
        return (parent / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def point_latest(run: Run) -> None:
    """Writes the run's id to LATEST."""
    atomic_write(run.path.parent / LATEST, run.path.name + "\n")


def write_config(config: ConfigDict, run: Run, stage: str) -> None:
    """Writes `config_resolved.<stage>.json` and `config_resolved.json`, the last stage's."""
    given: Any = flags.FLAGS if "config" in flags.FLAGS else None
    for name in (f"config_resolved.{stage}.json", "config_resolved.json"):
        flags.dump_config(config, run.path / name, given)


def check_same(config: ConfigDict, run: Run, stage: str) -> None:
    """Refuses to mix results of two settings in one run.

    Raises:
        UserError: the run was started with other values; lists them.
    """
    path = run.path / f"config_resolved.{stage}.json"
    if not path.exists():
        return
    saved = read_object(path, "choose another --run_id", {"config": dict})["config"]
    now = flags.select(config, _STAGE_KEYS[stage])
    changed = [
        f"{key}: saved {_get(saved, key)!r}, now {value!r}"
        for key, value in now.items()
        if key not in _NEUTRAL and _get(saved, key) != value
    ]
    if changed:
        raise UserError(
            f"{run.path} was mined with other settings ({'; '.join(changed[:4])}); choose another "
            "--run_id, or give the saved values"
        )


def _get(tree: dict[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def create(run: Run) -> None:
    """Makes the directory of a run, and notes when; again is harmless.

    Raises:
        UserError: it cannot be made.
    """
    try:
        for directory in (run.path / "logs", run.path / "tb"):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the run directory {run.path} ({error.strerror}); choose another "
            "outputs.root_dir"
        ) from error
    note = run.path / _NOTE
    if not note.is_file():
        now = datetime.datetime.now().isoformat()
        atomic_write_json(note, {"run_id": run.path.name, "created": now})


def discard_unstarted(run: Run) -> None:
    """Removes the directory of a run that was refused before it had any result."""
    for path in run.path.rglob("*"):
        # Logs and the resolved config say that a command was there; everything else is work.
        known = path.name == _NOTE or path.name.startswith((".", "config_resolved"))
        if path.is_file() and not known and path.parent.name not in ("logs", "tb"):
            return
    shutil.rmtree(run.path, ignore_errors=True)


def _runs(parent: Path) -> list[Run]:
    """Runs of a name, oldest first."""
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if (p / _NOTE).is_file()]
    return [Run(path) for path in sorted(found, key=_age)]


def _age(path: Path) -> tuple[str, str]:
    note = read_object(path / _NOTE, f"delete {path} or write it again", {"created": str})
    return note["created"], path.name


def _unfinished(parent: Path, config: ConfigDict, stage: str) -> Run | None:
    wanted = json.loads(config.to_json_best_effort())
    for run in reversed(_runs(parent)):
        try:
            text = (run.path / "config_resolved.mine.json").read_text(encoding="utf-8")
            same = json.loads(text)["config"] == wanted
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if same and not _done(run, stage).exists():
            log.info("continuing the unfinished run %s", run.path)
            return run
        return None
    return None


def _done(run: Run, stage: str) -> Path:
    return run.path / ("DONE.all" if stage == "all" else "DONE.mine")


def finish(run: Run, stage: str) -> None:
    """Marks a stage that starts the pipeline as finished, so that the next command starts anew."""
    if stage in ("mine", "all"):
        _done(run, stage).touch()


def _fresh(parent: Path) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    names: Iterable[str] = (stamp, *(f"{stamp}_{n}" for n in range(2, 1000)))
    for name in names:
        if not (parent / name).exists():
            return parent / name
    raise UserError(f"{parent}: too many runs started in the same second")
