"""Which files the mains read, in small trees of good ones: what a campaign of wrong files damages.

A scene is made once by the mains themselves; every case works on a copy.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.campaign import damage
from tests.campaign.in_process import run
from tests.campaign.mains import ESM, HALTING, QSTAR, REOAC

Kinds = Mapping[str, Callable[[Path], None]]
NOWHERE = "nowhere.jsonl"


@dataclasses.dataclass(frozen=True)
class Place:
    """A file that a command reads.

    Attributes:
        file: below the tree of the scene.
        arguments: tree -> command line.
        kinds: name -> what is done to the file.
        named: regular expression for what the error line must name; "" = the file's name.
        accepted: kind -> statuses that are documented for it instead of a refusal.
        prepare: tree -> made ready for the command.
        outputs: tree -> what an accepted run must leave as an undisturbed one does.
        good: status of the undamaged command; 2 where it is refused for `NOWHERE`, which is found
            out later than anything about the file.
        may_make: files that a refused command may make (prefixes).
    """

    file: str
    arguments: Callable[[Path], list[str]]
    kinds: Kinds
    named: str = ""
    accepted: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Path], None] = lambda tree: None
    outputs: Callable[[Path], Any] | None = None
    good: int = 0
    may_make: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scene:
    """A main and the files around it.

    Attributes:
        main: name in the table.
        module: of the main.
        make: fills an empty directory.
        places: what is damaged in it.
    """

    main: str
    module: str
    make: Callable[[Path], None]
    places: tuple[Place, ...]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _questions(count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Tom has {n} apples and buys {n + 1}. How many?",
            "answer": f"#### {2 * n + 1}",
        }
        for n in range(1, count + 1)
    ]


def _done(module: str, *arguments: str) -> None:
    ended = run(module, list(arguments))
    assert ended.status == 0, f"{module} {arguments}: {ended.stderr[-2000:]}"


def _fields(names: str, rows: bool = False, text: Kinds = damage.TEXT) -> Kinds:
    """Wrong texts and wrong fields of a JSON file."""
    return {**text, **damage.json_kinds(rows, tuple(names.split()))}


def _but(kinds: Kinds, *without: str) -> Kinds:
    return {name: do for name, do in kinds.items() if name not in without}


# What a crash can do to a journal is made good; any beginning of an object counts as torn.
_LOST = {
    "missing": (0,),
    "empty": (0,),
    "truncated": (0,),
    "huge line": (0,),
    "long number": (0,),
}


# ---------------------------------------------------------------------------------------- reoac
def _reoac(tree: Path) -> None:
    from reoac_jax.backbone.store import EMBEDDED_DIR

    _write_rows(tree / "data" / "train.jsonl", _questions(8))
    _write_rows(tree / "data" / "test.jsonl", _questions(5))
    (tree / "data" / "train.json").write_text(json.dumps(_questions(8)), encoding="utf-8")
    shutil.copytree(EMBEDDED_DIR, tree / "model")
    _done("reoac_jax.main", *REOAC, "--config.num_iterations=2", f"--workdir={tree}/run")


def _reoac_train(*more: str, late: bool = False) -> Callable[[Path], list[str]]:
    """Training; `late` adds a refusal that comes after the model is read."""
    after = [f"--config.dataset.eval_path={NOWHERE}"] if late else []
    return lambda tree: [
        *REOAC,
        f"--workdir={tree}/new",
        *(word.replace("TREE", str(tree)) for word in (*more, *after)),
    ]


def _viz(tree: Path) -> list[str]:
    sample = f"--sample={tree}/run/samples/iter0_step0.json"
    return ["--mode=viz", f"--run_dir={tree}/run", sample, f"--output={tree}/pictures"]


_ROWS = {**damage.TEXT, **damage.json_kinds(True, ())}
_LIST = _but({**damage.TEXT, **damage.json_kinds(False, ())}, "list for object", "half character")
_MODEL = _reoac_train(
    "--config.backbone.name=e2d2", "--config.backbone.model_name_or_path=TREE/model", late=True
)
_REOAC_PLACES = (
    Place(
        "data/train.jsonl",
        _reoac_train("--config.dataset.train_path=TREE/data/train.jsonl", late=True),
        _ROWS,
        good=2,
    ),
    Place(
        "data/test.jsonl",
        _reoac_train("--config.dataset.eval_path=TREE/data/test.jsonl", "--config.seed=1"),
        _ROWS,
    ),
    Place(
        "data/train.json",
        _reoac_train("--config.dataset.train_path=TREE/data/train.json", late=True),
        _LIST,
        good=2,
    ),
    *(
        Place(
            f"data/{name}.jsonl",
            lambda tree: [
                *REOAC,
                "--mode=prep",
                f"--config.dataset.raw_train_path={tree}/data/train.jsonl",
                f"--config.dataset.raw_eval_path={tree}/data/test.jsonl",
                f"--config.dataset.data_root={tree}/out",
            ],
            _ROWS,
            may_make=("out/dataset/raw/gsm8k/train", "out/dataset/processed/gsm8k_train")
            if name == "test"
            else (),
        )
        for name in ("train", "test")
    ),
    Place("model/config.json", _MODEL, _fields("model_type"), "config.json|model", good=2),
    Place("model/base_config.json", _MODEL, _but(_fields(""), "missing"), good=2),
    Place("model/model.safetensors", _MODEL, damage.WEIGHTS, "model", good=2),
    Place("model/tokenizer.json", _MODEL, _fields("model"), "tokenizer", good=2),
    Place("model/tokenizer_config.json", _MODEL, _but(damage.TEXT, "missing"), good=2),
    Place(
        "run/metrics.jsonl",
        lambda tree: [*REOAC, "--config.num_iterations=2", f"--workdir={tree}/run"],
        _ROWS,
        accepted=_LOST,
    ),
    Place("run/samples/iter0_step0.json", _viz, _fields("")),
    Place("run/metrics.jsonl", _viz, _ROWS, accepted=_LOST),
)  # fmt: skip


# -------------------------------------------------------------------------------------- halting
MAZE = "--config=configs/halting_maze_ut.py:tiny"


def _halting(tree: Path) -> None:
    from halting_jax.datasets.build_maze import Recipe, ensure_generated

    recipe = Recipe(
        style="random_walls", side=5, min_path_moves=3, loops=0, labels="canonical",
        train_size=16, val_size=8, test_size=8, seed=0,
    )  # fmt: skip
    shutil.move(ensure_generated(tree / "made", recipe), tree / "maze")
    shutil.rmtree(tree / "made")
    _done("halting_jax.main", *HALTING, "--config.train.max_steps=40", f"--workdir={tree}/run")


def _maze(tree: Path) -> list[str]:
    # The run to go on from is looked for when the data are read.
    return [
        MAZE,
        f"--config.data.dir={tree}/maze",
        f"--workdir={tree}/new",
        f"--config.train.resume={tree}/{NOWHERE}",
    ]


def _evaluate(tree: Path) -> list[str]:
    return ["--mode=eval", f"--checkpoint={tree}/run", f"--output={tree}/report.json"]


_GROUPS = {k: v for k, v in damage.ARRAY.items() if k not in ("missing", "flat")}
_HALTING_PLACES = (
    *(
        Place(f"maze/{split}/dataset.json", _maze, _fields("seq_len vocab_size"), good=2)
        for split in ("train", "val")
    ),
    *(
        Place(f"maze/{split}/all__{name}.npy", _maze, damage.ARRAY, good=2)
        for split in ("train", "test")
        for name in ("inputs", "labels")
    ),
    Place("maze/train/all__group_indices.npy", _maze, _GROUPS, good=2),
    Place("run/config_resolved.json", _evaluate, _fields("config config.task config.model")),
    Place("run/model.json", _evaluate, _fields("steps")),
    Place(
        "run/metrics.jsonl",
        lambda tree: [*HALTING, "--config.train.max_steps=40", f"--workdir={tree}/run"],
        _ROWS,
        accepted=_LOST,
    ),
)


# ---------------------------------------------------------------------------------------- qstar
def _qstar(tree: Path) -> None:
    from common.lm.source import cache_root
    from qstar.tiny import tiny_directory

    _write_rows(tree / "data" / "rows.jsonl", _questions(3))
    (tree / "data" / "rows.json").write_text(json.dumps(_questions(3)), encoding="utf-8")
    shutil.copytree(tiny_directory("tiny:1", cache_root()), tree / "model")
    _done("qstar.main", *QSTAR, f"--config.run.output={tree}/out/out.jsonl")


def _qstar_data(name: str) -> Callable[[Path], list[str]]:
    return lambda tree: [
        *QSTAR,
        f"--config.data.name={tree}/data/{name}",
        f"--config.run.output={tree}/new.jsonl",
    ]


def _qstar_model(tree: Path) -> list[str]:
    return [
        *QSTAR,
        f"--config.model.theta={tree}/model",
        f"--config.model.t={tree}/model",
        "--config.run.num_samples=2",
        f"--config.run.output={tree}/new.jsonl",
    ]


def _qstar_again(tree: Path) -> list[str]:
    return [*QSTAR, f"--config.run.output={tree}/out/out.jsonl"]


def _qstar_outputs(tree: Path) -> Any:
    names = ("out.jsonl", "out.diagnostics.jsonl", "out.tokens.jsonl")
    return {
        name: [json.loads(line) for line in (tree / "out" / name).read_text().splitlines()]
        for name in names
    }


_QSTAR_PLACES = (
    Place("data/rows.jsonl", _qstar_data("rows.jsonl"), _ROWS),
    Place("data/rows.json", _qstar_data("rows.json"), _LIST),
    Place("model/config.json", _qstar_model, _fields("model_type hidden_size vocab_size")),
    Place("model/tokenizer.json", _qstar_model, _fields("model"), "tokenizer"),
    Place("model/tokenizer_config.json", _qstar_model, _but(damage.TEXT, "missing"), "tokenizer"),
    Place(
        "model/generation_config.json",
        _qstar_model,
        _but(_fields("eos_token_id"), "missing", "without: eos_token_id"),
    ),
    Place(
        "model/model.safetensors",
        _qstar_model,
        damage.WEIGHTS,
        "model",
        # The settings are written before the weights are read: hours may lie between.
        may_make=("new.manifest.json",),
    ),
    Place(
        "out/out.jsonl",
        _qstar_again,
        _fields("sample_idx", rows=True),
        accepted=_LOST,
        outputs=_qstar_outputs,
    ),
    *(
        Place(
            f"out/out.{name}.jsonl",
            _qstar_again,
            _but(_fields("sample_idx", rows=True), "missing"),
            accepted=_LOST,
            outputs=_qstar_outputs,
        )
        for name in ("diagnostics", "tokens")
    ),
    # A file that is gone was taken away by someone: the samples stay.
    Place(
        "out/out.tokens.jsonl",
        _qstar_again,
        {"missing": damage.missing},
        accepted=_LOST,
        outputs=lambda tree: {"data": (tree / "out" / "out.jsonl").read_text()},
    ),
    Place("out/out.manifest.json", _qstar_again, _fields("version seed config")),
)


# ------------------------------------------------------------------------------------------ esm
ONE = "runs/esm_tiny/one"


def _esm(tree: Path) -> None:
    from esm.tiny import tiny_model

    _write_rows(tree / "data" / "gsm8k" / "train.jsonl", _questions(6))
    _write_rows(tree / "data" / "gsm8k" / "test.jsonl", _questions(4))
    shutil.copytree(tiny_model(), tree / "model")
    _done("esm.main", *_esm_stage("all")(tree))


def _esm_stage(stage: str, *more: str) -> Callable[[Path], list[str]]:
    words = [word for word in ESM if not word.startswith("--stage")]
    return lambda tree: [
        *words,
        f"--stage={stage}",
        f"--config.outputs.root_dir={tree}/runs",
        f"--config.model.name_or_path={tree}/model",
        *(word.replace("TREE", str(tree)) for word in more),
    ]


def _fresh(stage: str, *more: str) -> Callable[[Path], list[str]]:
    """The stage in a run of its own."""
    command = _esm_stage(stage, *more)
    return lambda tree: [*(w for w in command(tree) if w != "--run_id=one"), "--run_id=new"]


def _esm_outputs(tree: Path) -> Any:
    from tests.campaign.mains import MAINS

    return MAINS["esm"].outputs(tree / "runs")


def _without(*names: str) -> Callable[[Path], None]:
    """Takes later results away, so that the stage has something to do."""

    def prepare(tree: Path) -> None:
        for name in names:
            path = tree / ONE / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    return prepare


_GSM8K = ("--config.task.dataset=gsm8k", "--config.task.data_root=TREE/data")
_ENTRY = "tool_id tool_name has_vector layer control_point_m quality pair_id"
_OF_MODEL = "model model.digest prompt.hash hidden_size num_layers layers delimiter mined"
_STATES = ("mine/manifest.json", "mine/candidates.jsonl", "mine/keys.npy", "mine/vectors.npy")
_ROLLOUT = "example_id k text token_ids gen_tokens finish_reason correct reward"
_RESULT = "example_id correct tokens_used text finish_reason"
_ESM_MODEL = _fresh("mine.rollouts")


def _made_by(stage: str, file: str, kinds: Kinds, **more: Any) -> Place:
    return Place(f"{ONE}/{file}", _esm_stage(stage), kinds, **more)


_ESM_PLACES = (
    Place("data/gsm8k/train.jsonl", _fresh("mine.rollouts", *_GSM8K),
          _but(_fields("question answer", rows=True), "other type: question", "other type: answer"),
          "train|data_root"),
    Place("data/gsm8k/test.jsonl", _fresh("eval", *_GSM8K, "--config.eval.methods=('greedy',)",
          "--config.eval.artifact_run_dir=TREE/runs/esm_tiny/one"), _ROWS, "test|data_root"),
    Place("model/config.json", _ESM_MODEL, _fields("model_type hidden_size")),
    Place("model/tokenizer.json", _ESM_MODEL, _fields("model"), "tokenizer"),
    Place("model/tokenizer_config.json", _ESM_MODEL, _but(damage.TEXT, "missing"), "tokenizer"),
    Place("model/model.safetensors", _ESM_MODEL, damage.WEIGHTS, "model"),
    _made_by("all", "mine/rollouts.jsonl", _fields(_ROLLOUT, rows=True), accepted=_LOST,
             outputs=_esm_outputs),
    _made_by("mine.states", "mine/rollouts.jsonl",
             _but(_fields(_ROLLOUT, rows=True), "truncated"),
             prepare=_without(*_STATES)),
    _made_by("mine.states", "mine/rollouts.json", {"missing": damage.missing},
             prepare=_without(*_STATES), named="rollouts"),
    _made_by("all", "config_resolved.mine.json", _fields("config"), accepted={"missing": (0,)}),
    _made_by("all", "run.json", {}, ),
    _made_by("select", "mine/manifest.json", _fields(f"{_OF_MODEL} pairs"), named="mine"),
    _made_by("select", "mine/candidates.jsonl", _fields(_ENTRY, rows=True), named="mine"),
    _made_by("select", "mine/keys.npy", damage.ARRAY, named="mine"),
    _made_by("select", "mine/vectors.npy", damage.ARRAY, named="mine"),
    _made_by("memory", "library/manifest.json", _fields(f"{_OF_MODEL} entries digest"),
             named="library"),
    _made_by("memory", "library/library.jsonl", _fields(_ENTRY, rows=True), named="library"),
    _made_by("memory", "library/keys.npy", damage.ARRAY, named="library"),
    _made_by("memory", "library/vectors.npy", damage.ARRAY, named="library"),
    _made_by("eval", "memory/manifest.json", _fields(f"{_OF_MODEL} entries digest"),
             named="memory"),
    _made_by("eval", "memory/entries.jsonl", _fields(_ENTRY, rows=True), named="memory"),
    _made_by("eval", "memory/keys.npy", damage.ARRAY, named="memory"),
    _made_by("eval", "memory/vectors.npy", damage.ARRAY, named="memory"),
    _made_by("eval", "eval/greedy_T16/per_example.jsonl", _fields(_RESULT, rows=True),
             accepted=_LOST, outputs=_esm_outputs),
    _made_by("eval", "eval/ESM_T16/per_example.jsonl", _fields(_RESULT, rows=True),
             accepted=_LOST, outputs=_esm_outputs),
    _made_by("eval", "eval/ESM_T16/settings.json", _fields("seed"), accepted={"missing": (0,)},
             named="settings.json|ESM_T16"),
    _made_by("rescore", "eval/ESM_T16/per_example.jsonl",
             _but(_fields(_RESULT, rows=True), "missing", "truncated"), named="ESM_T16"),
    _made_by("postprocess", "mine/manifest.json", _but(_fields("pairs skipped"), "missing"),
             named="mine", prepare=_without("report.md")),
)  # fmt: skip

SCENES = {
    "reoac": Scene("reoac", "reoac_jax.main", _reoac, _REOAC_PLACES),
    "halting": Scene("halting", "halting_jax.main", _halting, _HALTING_PLACES),
    "qstar": Scene("qstar", "qstar.main", _qstar, _QSTAR_PLACES),
    "esm": Scene("esm", "esm.main", _esm, _ESM_PLACES),
}
