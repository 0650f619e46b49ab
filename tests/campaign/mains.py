"""The mains that a campaign drives: the command of a run, its progress, and what it leaves.

A main joins when its module is there. Arguments make the smallest run that passes through every
part of it; `fixed` files must be equal byte for byte to an undisturbed run's, records are compared
as records.
"""

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.launch.runs import arrays, metrics

REOAC = (
    "--config=configs/gsm8k.py:tiny",
    "--config.backbone.name=simple",
    "--config.backbone.hidden_size=8",
    "--config.backbone.max_length=48",
    "--config.rollout.gen_len=6",
    "--config.rollout.max_steps=3",
    "--config.rollout.batch_size=4",
    "--config.episodes_per_iter=8",
    "--config.dataset.max_ops=1",
    "--config.dataset.train_size=8",
    "--config.dataset.eval_size=5",
    "--config.eval.batch_size=4",
    "--config.actor.hidden_size=8",
    "--config.critic.hidden_size=8",
    "--config.num_iterations=12",
    "--config.logging.tensorboard=False",
)
HALTING = (
    "--config=configs/halting_parity.py:tiny",
    "--config.train.max_steps=300",
    "--config.train.log_every=5",
    "--config.eval.every=20",
    "--config.checkpoint.keep=3",
    "--config.logging.tensorboard=False",
)
QSTAR = (
    "--config=configs/qstar.py:tiny",
    "--config.run.deterministic=True",
    "--config.run.save_tokens=True",
    "--config.run.sort_output=True",
    "--config.run.slots=2",
    "--config.run.burst=2",
)
ESM = (
    "--config=configs/esm_gsm8k_small.py:tiny",
    "--stage=all",
    "--run_id=one",
    "--config.tune.k_scales=()",
    "--config.eval.ablations=()",
    "--config.task.max_train_examples=4",
    "--config.task.max_eval_examples=3",
    "--config.decode.max_new_tokens=16",
    "--config.offline_mine.max_new_tokens=24",
    "--config.outputs.tensorboard=False",
    "--config.jax.slots=2",
    "--config.jax.sample_slots=2",
)


@dataclasses.dataclass(frozen=True)
class Main:
    """One main.

    Attributes:
        module: run as `python -m module`.
        arguments: workdir -> flags.
        records: files of one line per record whose last line a crash may tear (patterns).
        checkpoints: files whose damage must be survived (patterns).
        outputs: workdir -> {name: value} that must equal those of an undisturbed run.
        stopped: exit statuses of a run that was asked to stop.
        refused: exit statuses of a run whose disk is full.
    """

    module: str
    arguments: Callable[[Path], list[str]]
    records: tuple[str, ...]
    checkpoints: tuple[str, ...]
    outputs: Callable[[Path], dict[str, Any]]
    stopped: tuple[int, ...] = (3,)
    refused: tuple[int, ...] = (2,)

    @property
    def present(self) -> bool:
        """Whether the module exists in this tree."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False


def _training(workdir: Path) -> dict[str, Any]:
    """Rows of the log (each once, in order), arrays of the last checkpoint, reports, samples."""
    found: dict[str, Any] = {f"array {k}": _digest(v) for k, v in arrays(workdir).items()}
    rows = metrics(workdir)
    found["iterations"] = [row["iteration"] for row in rows]
    # The one value that XLA's CPU threads may add in another order.
    found["rows"] = [{k: v for k, v in row.items() if k != "debug/grad_norm"} for row in rows]
    for path in sorted(workdir.glob("eval*.json")):
        report = json.loads(path.read_text())
        report.pop("seconds", None)
        found[path.name] = report
    for path in sorted((workdir / "samples").glob("*.json")):
        found[f"sample {path.name}"] = path.read_text()
    found["finished"] = (workdir / "DONE").exists()
    return found


def _lines(*names: str) -> Callable[[Path], dict[str, Any]]:
    """Records of JSON-lines files, in the order of the files."""

    def read(workdir: Path) -> dict[str, Any]:
        return {
            name: [json.loads(line) for line in (workdir / name).read_text().splitlines()]
            for name in names
        }

    return read


_ESM_VOLATILE = {"run.json", "logs", "tb", "timing.json", "summary.jsonl", "checkpoint", ".lock"}


def _esm(workdir: Path) -> dict[str, Any]:
    """Every file of the run but those that hold times and identities; timings in records apart."""
    found: dict[str, Any] = {}
    root = workdir / "esm_tiny" / "one"
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        relative = path.relative_to(root)
        if _ESM_VOLATILE & set(relative.parts) or path.suffix in (".pdf", ".png", ".log"):
            continue
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[str(relative)] = sorted(json.dumps(_timeless(r), sort_keys=True) for r in rows)
        elif path.suffix == ".npy":
            found[str(relative)] = _digest(np.load(path, allow_pickle=False))
        elif relative.parts[0] in ("mine", "library", "eval", "tune"):
            continue  # manifests name times; what they describe is compared
        else:
            found[str(relative)] = path.name
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not _is_time(k)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def _is_time(key: str) -> bool:
    return any(word in key for word in ("time", "sec", "latency", "wall", "speed", "per_s"))


def _digest(value: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]


MAINS = {
    "reoac": Main(
        "reoac_jax.main",
        lambda d: [*REOAC, f"--workdir={d}"],
        ("metrics.jsonl",),
        ("checkpoints/*/state/**/*", "checkpoints/*/host/*"),
        _training,
    ),
    "halting": Main(
        "halting_jax.main",
        lambda d: [*HALTING, f"--workdir={d}"],
        ("metrics.jsonl",),
        ("checkpoints/*/state/**/*", "checkpoints/*/host/*"),
        _training,
    ),
    "qstar": Main(
        "qstar.main",
        lambda d: [*QSTAR, f"--config.run.output={d}/out.jsonl"],
        ("out.jsonl", "out.diagnostics.jsonl", "out.tokens.jsonl"),
        (),
        _lines("out.jsonl", "out.diagnostics.jsonl", "out.tokens.jsonl"),
        stopped=(0, 3),
    ),
    "esm": Main(
        "esm.main",
        lambda d: [*ESM, f"--config.outputs.root_dir={d}"],
        ("esm_tiny/one/**/per_example.jsonl", "esm_tiny/one/mine/rollouts.jsonl"),
        (),
        _esm,
    ),
}


def mains() -> dict[str, Main]:
    """The mains of this tree."""
    return {name: main for name, main in MAINS.items() if main.present}
