"""Wrong checkpoints and manifests: of another model, incomplete, damaged, from a later version."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign import damage
from tests.campaign.files_esm import ONE, outputs, stage
from tests.campaign.files_halting import evaluate
from tests.campaign.mains import HALTING, QSTAR, REOAC
from tests.campaign.places import Kinds, Place, done

NEWER = 99
STEPS = "checkpoint"  # how the line must name what is wrong


def _each_step(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit(checkpoints: Path) -> None:
        for step in sorted(p for p in checkpoints.iterdir() if p.name.isdigit()):
            change(step)

    return edit


def _newest(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit(checkpoints: Path) -> None:
        change(
            max((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
        )

    return edit


def _summary(**values: Any) -> Callable[[Path], None]:
    def edit(step: Path) -> None:
        path = step / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}), encoding="utf-8")

    return edit


def _written(name: str, content: bytes, trusted: bool = False) -> Callable[[Path], None]:
    """A file of the step overwritten; `trusted` removes the checksums that would tell."""

    def edit(step: Path) -> None:
        found = sorted(step.glob(name))
        assert found, name
        found[0].write_bytes(content)
        if trusted:
            (step / "summary.json").unlink()

    return edit


def _gone(name: str, trusted: bool = False) -> Callable[[Path], None]:
    def edit(step: Path) -> None:
        path = step / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if trusted:
            (step / "summary.json").unlink()

    return edit


def _emptied(step: Path) -> None:
    damage.empty_directory(step)


def _from_other(checkpoints: Path) -> None:
    """The checkpoints of the run beside it, of another architecture."""
    shutil.rmtree(checkpoints)
    shutil.copytree(checkpoints.parent.parent / "other" / "checkpoints", checkpoints)


def _host(step: Path, **values: Any) -> None:
    """Changes the JSON item of a step, and takes the checksums away."""
    path = step / "host" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}), encoding="utf-8")
    (step / "summary.json").unlink()


KINDS: Kinds = {
    "other architecture": _from_other,
    "no state": _each_step(_gone("state")),
    "no state, no checksums": _each_step(_gone("state", trusted=True)),
    "no host item": _each_step(_gone("host")),
    "no host item, no checksums": _each_step(_gone("host", trusted=True)),
    "checksums no JSON": _each_step(_written("summary.json", b"\xff{")),
    "checksums a list": _each_step(_written("summary.json", b"[]")),
    "checksums of another form": _each_step(_summary(files=[1, 2])),
    "metadata damaged": _each_step(_written("state/_METADATA", b"{}")),
    "metadata damaged, no checksums": _each_step(_written("state/_METADATA", b"{", trusted=True)),
    "host item damaged, no checksums": _each_step(_written("host/metadata", b"[1]", trusted=True)),
    "host item empty, no checksums": _each_step(_written("host/metadata", b"", trusted=True)),
    "host item of another form": _each_step(lambda step: _host(step, leaves=7, settings="x")),
    "newer format": _each_step(_summary(format=NEWER)),
    "newer format of the host item": _each_step(lambda step: _host(step, format=NEWER)),
    "steps empty": _each_step(_emptied),
    "no step": damage.empty_directory,
    "a file": damage.file_for_directory,
}
# Where nothing readable is left a run may start again only where nothing was there to continue.
RESUMED: Kinds = {name: do for name, do in KINDS.items() if name not in ("no step", "a file")}
RECOVERED: Kinds = {
    "newest damaged": _newest(_written("state/_METADATA", b"{}")),
    "newest without state": _newest(_gone("state")),
}


def _reoac(tree: Path) -> None:
    done(
        "reoac_jax.main",
        *REOAC,
        "--config.num_iterations=1",
        "--config.actor.hidden_size=12",
        f"--workdir={tree}/other",
    )


def _reoac_eval(tree: Path) -> list[str]:
    return [*REOAC, "--mode=eval", f"--checkpoint={tree}/run", f"--output={tree}/report.json"]


REOAC_PLACES = (
    Place("run/checkpoints", _reoac_eval, KINDS, STEPS),
    Place(
        "run/checkpoints",
        lambda tree: [*REOAC, "--config.num_iterations=3", f"--workdir={tree}/run"],
        RESUMED,
        STEPS,
    ),
)


def _halting(tree: Path) -> None:
    done(
        "halting_jax.main",
        *HALTING,
        "--config.train.max_steps=20",
        "--config.model.hidden_size=12",
        f"--workdir={tree}/other",
    )


def _training(*more: str) -> Callable[[Path], list[str]]:
    return lambda tree: [
        *HALTING,
        "--config.train.max_steps=60",
        *(word.replace("TREE", str(tree)) for word in more),
    ]


HALTING_PLACES = (
    Place("run/checkpoints", evaluate, KINDS, STEPS),
    Place(
        "run/checkpoints",
        lambda tree: ["--mode=export", f"--checkpoint={tree}/run", f"--output={tree}/exported"],
        KINDS,
        STEPS,
    ),
    Place(
        "run/checkpoints",
        _training("--workdir=TREE/run"),
        {**RESUMED, **RECOVERED},
        STEPS,
        accepted={name: (0,) for name in RECOVERED},
    ),
    Place(
        "run/checkpoints",
        _training("--workdir=TREE/new", "--config.train.resume=TREE/run"),
        KINDS,
        STEPS,
    ),
)


# ------------------------------------------------------------------------------- esm and qstar
def _esm(tree: Path) -> None:
    """A second run, of a model with other weights."""
    from esm.tiny import tiny_model

    shutil.copytree(tiny_model(seed=1), tree / "model1")
    words = stage("all")(tree)
    changed = [w.replace(f"{tree}/model", f"{tree}/model1") for w in words if w != "--run_id=one"]
    done("esm.main", *changed, "--run_id=two")


def _replaced_by_two(name: str) -> Callable[[Path], None]:
    """A part of the run replaced by that of the run of the other model."""

    def edit(path: Path) -> None:
        run = path.parent
        while run.name != "one":
            run = run.parent
        shutil.rmtree(run / name)
        shutil.copytree(run.parent / "two" / name, run / name)

    return edit


def _newer(key: str) -> Kinds:
    def edit(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), key: NEWER}), encoding="utf-8")

    return {"newer format": edit}


ESM_PLACES = (
    Place(
        f"{ONE}/memory/manifest.json",
        stage("eval"),
        {**_newer("format_version"), "memory of another model": _replaced_by_two("memory")},
        "memory",
    ),
    Place(
        f"{ONE}/eval/ESM_T16/settings.json",
        stage("eval"),
        {"results of another model": _replaced_by_two("eval")},
        "eval",
        outputs=outputs,
    ),
    Place(f"{ONE}/library/manifest.json", stage("memory"), _newer("format_version"), "library"),
    Place(f"{ONE}/mine/manifest.json", stage("select"), _newer("format_version"), "mine"),
)


def _qstar(tree: Path) -> None:
    done(
        "qstar.main",
        *QSTAR,
        "--config.model.t=tiny:3",
        "--config.sampling.max_new_tokens=5",
        f"--config.run.output={tree}/other/out.jsonl",
    )


def _of_other_output(path: Path) -> None:
    shutil.copyfile(path.parent.parent / "other" / path.name, path)


QSTAR_PLACES = (
    Place(
        "out/out.manifest.json",
        lambda tree: [*QSTAR, f"--config.run.output={tree}/out/out.jsonl"],
        {**_newer("version"), "manifest of another config": _of_other_output},
    ),
)
MAKERS = {"reoac": _reoac, "halting": _halting, "esm": _esm, "qstar": _qstar}
PLACES = {
    "reoac": REOAC_PLACES,
    "halting": HALTING_PLACES,
    "esm": ESM_PLACES,
    "qstar": QSTAR_PLACES,
}
