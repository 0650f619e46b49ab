"""Files that `qstar.main` reads, its own output among them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign import damage
from tests.campaign.mains import QSTAR
from tests.campaign.places import (
    LIST,
    MADE_GOOD,
    NOWHERE,
    ROWS,
    Place,
    Scene,
    config_place,
    done,
    fields,
    questions,
    without,
    write_rows,
)

write_config, CONFIG_PLACE = config_place(
    QSTAR, f"--config.data.name={NOWHERE}", "--config.run.output=TREE/new.jsonl"
)


def make(tree: Path) -> None:
    from common.lm.source import cache_root
    from qstar.tiny import tiny_directory

    write_rows(tree / "data" / "rows.jsonl", questions(3))
    (tree / "data" / "rows.json").write_text(json.dumps(questions(3)), encoding="utf-8")
    shutil.copytree(tiny_directory("tiny:1", cache_root()), tree / "model")
    write_config(tree)
    done("qstar.main", *QSTAR, f"--config.run.output={tree}/out/out.jsonl")


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


PLACES = (
    CONFIG_PLACE,
    Place("data/rows.jsonl", _qstar_data("rows.jsonl"), ROWS),
    Place("data/rows.json", _qstar_data("rows.json"), LIST),
    Place("model", _qstar_model, damage.DIRECTORY, "model"),
    Place("model/config.json", _qstar_model, fields("model_type hidden_size vocab_size")),
    Place("model/tokenizer.json", _qstar_model, fields("model"), "tokenizer"),
    Place(
        "model/tokenizer_config.json", _qstar_model, without(damage.TEXT, "missing"), "tokenizer"
    ),
    Place(
        "model/generation_config.json",
        _qstar_model,
        without(fields("eos_token_id"), "missing", "without: eos_token_id"),
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
        fields("sample_idx", rows=True),
        accepted=MADE_GOOD,
        outputs=_qstar_outputs,
    ),
    *(
        Place(
            f"out/out.{name}.jsonl",
            _qstar_again,
            without(fields("sample_idx", rows=True), "missing"),
            accepted=MADE_GOOD,
            outputs=_qstar_outputs,
        )
        for name in ("diagnostics", "tokens")
    ),
    # A file that is gone was taken away by someone: the samples stay.
    Place(
        "out/out.tokens.jsonl",
        _qstar_again,
        {"missing": damage.missing},
        accepted=MADE_GOOD,
        outputs=lambda tree: {"data": (tree / "out" / "out.jsonl").read_text()},
    ),
    Place("out/out.manifest.json", _qstar_again, fields("version seed config")),
)

SCENE = Scene("qstar", "qstar.main", make, PLACES)
