"""Curves of a training run from its metrics.jsonl, and the numbers of its final test."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.rundir import read_jsonl
from halting_jax.loader import Trained

MAX_WINDOW = 100
POINT_LIMIT = 400
AXES = ("step", "epoch")
STEP_KEY = "iteration"

# Quantities worth a chart, in order: title and the name they have in the log, without the split.
_CHARTS = (
    ("Classification loss", ("loss_classification", "loss_cls")),
    ("Examples right", ("puz_acc", "acc", "accuracy_sequence", "sequence_accuracy")),
    ("Answers right", ("cell_acc", "accuracy", "accuracy_place", "char_accuracy")),
    ("Answers right", ("per_token_accuracy",)),
    ("Paths valid", ("valid_path",)),
    ("Paths optimal", ("optimal_path",)),
    ("Inner steps", ("steps", "ponder_steps")),
    ("Mass of the last step", ("remainder_mean",)),
    ("Stopped by the limit", ("halt_forced_ratio", "forced_halt_ratio")),
    ("Halting head right", ("halt_accuracy",)),
    ("Gradient norm", ("debug/grad_norm",)),
    ("Learning rate", ("lr",)),
    ("Examples per second", ("examples_per_s",)),
)
_SPLIT = re.compile(r"^(train/|val/|test/[^/]+/|train_|val_|test_)?(.*?)(_ema)?$")


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve: its name in the legend, and points in order of x."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves of one quantity."""

    title: str
    series: tuple[Series, ...]


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What a run is, for the head of a page.

    Attributes:
      name: of the run directory.
      task, model: `task.name` and `model.type`.
      facts: (label, value) pairs.
    """

    name: str
    task: str
    model: str
    facts: tuple[tuple[str, str], ...]


def run_facts(trained: Trained, data: Path | None = None) -> RunFacts:
    """What is worth knowing of a run before its samples.

    Args:
      trained: the loaded model.
      data: the directory its examples are read from, None for generated tasks.
    """
    config = trained.config
    model = config.model.type
    facts = [
        ("parameters", f"{int(trained.facts.get('parameters', 0)):,}"),
        ("width", str(config.model.hidden_size)),
        ("step", f"{trained.step:,}"),
        ("weights", "averaged" if config.optim.ema.enabled else "last"),
        ("limit of inner steps", str(trained.built.model.max_steps)),
    ]
    if model == "act_rnn":
        facts += [("cell", config.act.cell), ("halting", config.act.kind)]
        if config.act.kind == "act":
            facts.append(("time penalty", f"{config.act.time_penalty:g}"))
    elif model == "universal_transformer":
        facts.append(("halting", f"act, {config.ut.act_mix} mix" if config.ut.act else "none"))
        if config.ut.act:
            facts.append(("ponder weight", f"{config.ut.act_loss_weight:g}"))
    else:
        facts.append(("halting", "own head" if config.trm.halt_at_eval else "all steps"))
    facts += [
        ("batch", str(config.data.batch_size)),
        ("learning rate", f"{config.optim.lr:g}"),
        ("data", data.name if data else "generated"),
    ]
    return RunFacts(trained.path.name, config.task.name, model, tuple(facts))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, or of the one in a run directory.

    Raises:
      UserError: there is none, or a line is damaged.
    """
    path = Path(path).expanduser()
    return read_jsonl(path / "metrics.jsonl" if path.is_dir() else path)


def read_report(run: str | Path) -> dict[str, Any] | None:
    """The final test of a run (eval.json), None where it has not come to it.

    Raises:
      UserError: the file is damaged.
    """
    path = Path(run) / "eval.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); write it anew with --mode=eval --output={path}"
        ) from error
    return report


def find_metrics(root: str | Path) -> list[Path]:
    """Every metrics.jsonl under a directory, newest first.

    Raises:
      UserError: there is no such directory, or nothing in it.
    """
    directory = Path(root).expanduser()
    if not directory.is_dir():
        raise UserError(f"{root}: no such directory; name one that holds runs")
    # Runs are linked as `latest` too: each file once.
    found = {path.resolve() for path in directory.rglob("metrics.jsonl")}
    if not found:
        raise UserError(f"{root} holds no metrics.jsonl; train first or name another directory")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def split_name(key: str) -> tuple[str, str]:
    """A logged name as (split with its weights, quantity): "val_steps_ema" ->
    ("val, averaged weights", "steps")."""
    match = _SPLIT.match(key)
    assert match
    split = (match[1] or "").rstrip("/_") or "train"
    return split + (", averaged weights" if match[3] else ""), match[2]


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of all numbers in the log, in order of first use, the step apart."""
    names: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != STEP_KEY:
                names[key] = None
    return list(names)


def series(rows: Sequence[Mapping[str, Any]], key: str, axis: str = "step") -> Series:
    """The points of one logged name; rows without it, or without the axis, are left out.

    Args:
      rows: of `read_metrics`.
      key: the name.
      axis: "step" or "epoch".

    Raises:
      UserError: the axis is unknown.
    """
    if axis not in AXES:
        raise UserError(f"the x axis must be one of {', '.join(AXES)}, got {axis!r}")
    x_key = STEP_KEY if axis == "step" else "epoch"
    points = [
        (float(row[x_key]), float(row[key]))
        for row in rows
        if isinstance(row.get(key), (int, float)) and isinstance(row.get(x_key), (int, float))
    ]
    return Series(key, tuple(x for x, _ in points), tuple(y for _, y in points))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Rolling mean over the last `window` values, fewer at the start.

    Raises:
      UserError: the window is not 1..100.
    """
    if not 1 <= window <= MAX_WINDOW:
        raise UserError(f"the smoothing window must be 1 to {MAX_WINDOW}, got {window}")
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, float))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return [float(v) for v in (sums[ends] - sums[starts]) / (ends - starts)]


def thinned(curve: Series, limit: int = POINT_LIMIT) -> Series:
    """At most `limit` points, each the mean of its neighbours."""
    if len(curve.x) <= limit:
        return curve
    parts = zip(
        np.array_split(np.asarray(curve.x), limit),
        np.array_split(np.asarray(curve.y), limit),
        strict=True,
    )
    means = [(float(x.mean()), float(y.mean())) for x, y in parts]
    return Series(curve.name, tuple(x for x, _ in means), tuple(y for _, y in means))


def charts(rows: Sequence[Mapping[str, Any]]) -> tuple[Chart, ...]:
    """The curves a reader wants first: one chart per quantity, one curve per split."""
    by_quantity: dict[str, list[tuple[str, str]]] = {}
    for key in columns(rows):
        split, quantity = split_name(key)
        by_quantity.setdefault(quantity, []).append((split, key))
    result = []
    for title, quantities in _CHARTS:
        curves: dict[str, Series] = {}
        for quantity in quantities:
            for split, key in by_quantity.get(quantity, ()):
                points = thinned(series(rows, key))
                if split not in curves and points.x:
                    curves[split] = dataclasses.replace(points, name=split)
        if curves:
            result.append(Chart(title, tuple(curves.values())))
    return tuple(result)
