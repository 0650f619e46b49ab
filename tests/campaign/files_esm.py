"""Files that `esm.main` reads: data, models, and what each stage leaves for the next."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign import damage
from tests.campaign.mains import ESM
from tests.campaign.places import (
    MADE_GOOD,
    NOWHERE,
    ROWS,
    Kinds,
    Place,
    Scene,
    config_place,
    done,
    fields,
    questions,
    without,
    write_rows,
)

ONE = "runs/esm_tiny/one"


write_config, CONFIG_PLACE = config_place(
    ESM, f"--config.model.name_or_path=./{NOWHERE}", "--config.outputs.root_dir=TREE/new"
)


def make(tree: Path) -> None:
    from esm.tiny import tiny_model

    write_rows(tree / "data" / "gsm8k" / "train.jsonl", questions(6))
    write_rows(tree / "data" / "gsm8k" / "test.jsonl", questions(4))
    shutil.copytree(tiny_model(), tree / "model")
    write_config(tree)
    done("esm.main", *stage("all")(tree))


def stage(name: str, *more: str) -> Callable[[Path], list[str]]:
    """The command of a stage in the run `one`; TREE in an argument is the tree."""
    words = [word for word in ESM if not word.startswith("--stage")]
    return lambda tree: [
        *words,
        f"--stage={name}",
        f"--config.outputs.root_dir={tree}/runs",
        f"--config.model.name_or_path={tree}/model",
        *(word.replace("TREE", str(tree)) for word in more),
    ]


def _fresh(name: str, *more: str) -> Callable[[Path], list[str]]:
    """The stage in a run of its own."""
    command = stage(name, *more)
    return lambda tree: [*(w for w in command(tree) if w != "--run_id=one"), "--run_id=new"]


def outputs(tree: Path) -> Any:
    """What an undisturbed run leaves, times apart."""
    from tests.campaign.mains import MAINS

    return MAINS["esm"].outputs(tree / "runs")


def take_away(*names: str) -> Callable[[Path], None]:
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


def _made_by(name: str, file: str, kinds: Kinds, **more: Any) -> Place:
    return Place(f"{ONE}/{file}", stage(name), kinds, **more)


PLACES = (
    CONFIG_PLACE,
    Place("data/gsm8k/train.jsonl", _fresh("mine.rollouts", *_GSM8K),
          without(fields("question answer", rows=True),
                  "other type: question", "other type: answer"),
          "train|data_root"),
    Place("data/gsm8k/test.jsonl", _fresh("eval", *_GSM8K, "--config.eval.methods=('greedy',)",
          "--config.eval.artifact_run_dir=TREE/runs/esm_tiny/one"), ROWS, "test|data_root"),
    Place("data", _fresh("mine.rollouts", *_GSM8K), damage.DIRECTORY, "data"),
    Place("model", _ESM_MODEL, damage.DIRECTORY, "model"),
    Place("model/config.json", _ESM_MODEL, fields("model_type hidden_size")),
    Place("model/tokenizer.json", _ESM_MODEL, fields("model"), "tokenizer"),
    Place("model/tokenizer_config.json", _ESM_MODEL, without(damage.TEXT, "missing"), "tokenizer"),
    Place("model/model.safetensors", _ESM_MODEL, damage.WEIGHTS, "model"),
    _made_by("all", "mine/rollouts.jsonl", fields(_ROLLOUT, rows=True), accepted=MADE_GOOD,
             outputs=outputs),
    _made_by("mine.states", "mine/rollouts.jsonl",
             without(fields(_ROLLOUT, rows=True), "truncated"),
             prepare=take_away(*_STATES)),
    _made_by("mine.states", "mine/rollouts.json", {"missing": damage.missing},
             prepare=take_away(*_STATES), named="rollouts"),
    _made_by("all", "config_resolved.mine.json", fields("config"), accepted={"missing": (0,)}),
    _made_by("all", "run.json", {}, ),
    _made_by("select", "mine/manifest.json", fields(f"{_OF_MODEL} pairs"), named="mine"),
    _made_by("select", "mine/candidates.jsonl", fields(_ENTRY, rows=True), named="mine"),
    _made_by("select", "mine/keys.npy", damage.ARRAY, named="mine"),
    _made_by("select", "mine/vectors.npy", damage.ARRAY, named="mine"),
    _made_by("memory", "library/manifest.json", fields(f"{_OF_MODEL} entries digest"),
             named="library"),
    _made_by("memory", "library/library.jsonl", fields(_ENTRY, rows=True), named="library"),
    _made_by("memory", "library/keys.npy", damage.ARRAY, named="library"),
    _made_by("memory", "library/vectors.npy", damage.ARRAY, named="library"),
    _made_by("eval", "memory/manifest.json", fields(f"{_OF_MODEL} entries digest"),
             named="memory"),
    _made_by("eval", "memory/entries.jsonl", fields(_ENTRY, rows=True), named="memory"),
    _made_by("eval", "memory/keys.npy", damage.ARRAY, named="memory"),
    _made_by("eval", "memory/vectors.npy", damage.ARRAY, named="memory"),
    _made_by("eval", "eval/greedy_T16/per_example.jsonl", fields(_RESULT, rows=True),
             accepted=MADE_GOOD, outputs=outputs),
    _made_by("eval", "eval/ESM_T16/per_example.jsonl", fields(_RESULT, rows=True),
             accepted=MADE_GOOD, outputs=outputs),
    _made_by("eval", "eval/ESM_T16/settings.json", fields("seed"), accepted={"missing": (0,)},
             named="settings.json|ESM_T16"),
    _made_by("rescore", "eval/ESM_T16/per_example.jsonl",
             without(fields(_RESULT, rows=True), "missing", "truncated"), named="ESM_T16"),
    _made_by("postprocess", "mine/manifest.json", without(fields("pairs skipped"), "missing"),
             named="mine", prepare=take_away("report.md")),
)  # fmt: skip

SCENE = Scene("esm", "esm.main", make, PLACES)
