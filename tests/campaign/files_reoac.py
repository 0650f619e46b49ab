"""Files that `reoac_jax.main` reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.campaign import damage
from tests.campaign.mains import REOAC
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
    REOAC, f"--config.dataset.eval_path={NOWHERE}", "--workdir=TREE/new"
)


def make(tree: Path) -> None:
    from reoac_jax.backbone.store import EMBEDDED_DIR

    write_rows(tree / "data" / "train.jsonl", questions(8))
    write_rows(tree / "data" / "test.jsonl", questions(5))
    (tree / "data" / "train.json").write_text(json.dumps(questions(8)), encoding="utf-8")
    shutil.copytree(EMBEDDED_DIR, tree / "model")
    write_config(tree)
    done("reoac_jax.main", *REOAC, "--config.num_iterations=2", f"--workdir={tree}/run")


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


# The log of two rows: what is wrong with the second counts as torn.
_LAST_ROW = {**MADE_GOOD, "half character": (0,)}
_MODEL = _reoac_train(
    "--config.backbone.name=e2d2", "--config.backbone.model_name_or_path=TREE/model", late=True
)
PLACES = (
    CONFIG_PLACE,
    Place(
        "data/train.jsonl",
        _reoac_train("--config.dataset.train_path=TREE/data/train.jsonl", late=True),
        ROWS,
        good=2,
    ),
    Place(
        "data/test.jsonl",
        _reoac_train("--config.dataset.eval_path=TREE/data/test.jsonl", "--config.seed=1"),
        ROWS,
    ),
    Place(
        "data/train.json",
        _reoac_train("--config.dataset.train_path=TREE/data/train.json", late=True),
        LIST,
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
            ROWS,
            may_make=("out/dataset/raw/gsm8k/train", "out/dataset/processed/gsm8k_train")
            if name == "test"
            else (),
        )
        for name in ("train", "test")
    ),
    Place("model", _MODEL, damage.DIRECTORY, "model", good=2),
    Place("model/config.json", _MODEL, fields("model_type"), "config.json|model", good=2),
    Place("model/base_config.json", _MODEL, without(fields(""), "missing"), good=2),
    Place("model/model.safetensors", _MODEL, damage.WEIGHTS, "model", good=2),
    Place("model/tokenizer.json", _MODEL, fields("model"), "tokenizer", good=2),
    Place("model/tokenizer_config.json", _MODEL, without(damage.TEXT, "missing"), good=2),
    Place(
        "run/metrics.jsonl",
        lambda tree: [*REOAC, "--config.num_iterations=2", f"--workdir={tree}/run"],
        ROWS,
        accepted=_LAST_ROW,
    ),
    Place("run/samples/iter0_step0.json", _viz, fields("")),
    Place("run/metrics.jsonl", _viz, ROWS, accepted=_LAST_ROW),
)  # fmt: skip

SCENE = Scene("reoac", "reoac_jax.main", make, PLACES)
