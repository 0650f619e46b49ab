"""Files that `halting_jax.main` reads."""

import shutil
from pathlib import Path

from tests.campaign import damage
from tests.campaign.mains import HALTING
from tests.campaign.places import (
    MADE_GOOD,
    NOWHERE,
    ROWS,
    Place,
    Scene,
    config_place,
    done,
    fields,
)

MAZE = "--config=configs/halting_maze_ut.py:tiny"


write_config, CONFIG_PLACE = config_place(
    HALTING, f"--config.train.resume=TREE/{NOWHERE}", "--workdir=TREE/new"
)


def make(tree: Path) -> None:
    from halting_jax.datasets.build_maze import Recipe, ensure_generated

    recipe = Recipe(
        style="random_walls", side=5, min_path_moves=3, loops=0, labels="canonical",
        train_size=16, val_size=8, test_size=8, seed=0,
    )  # fmt: skip
    shutil.move(ensure_generated(tree / "made", recipe), tree / "maze")
    shutil.rmtree(tree / "made")
    write_config(tree)
    done("halting_jax.main", *HALTING, "--config.train.max_steps=40", f"--workdir={tree}/run")


def _maze(tree: Path) -> list[str]:
    # The run to go on from is looked for when the data are read.
    return [
        MAZE,
        f"--config.data.dir={tree}/maze",
        f"--workdir={tree}/new",
        f"--config.train.resume={tree}/{NOWHERE}",
    ]


def evaluate(tree: Path) -> list[str]:
    return ["--mode=eval", f"--checkpoint={tree}/run", f"--output={tree}/report.json"]


_GROUPS = {k: v for k, v in damage.ARRAY.items() if k not in ("missing", "flat")}
PLACES = (
    CONFIG_PLACE,
    Place("maze", _maze, damage.DIRECTORY, "maze", good=2),
    *(
        Place(f"maze/{split}/dataset.json", _maze, fields("seq_len vocab_size"), good=2)
        for split in ("train", "val")
    ),
    *(
        Place(f"maze/{split}/all__{name}.npy", _maze, damage.ARRAY, good=2)
        for split in ("train", "test")
        for name in ("inputs", "labels")
    ),
    Place("maze/train/all__group_indices.npy", _maze, _GROUPS, good=2),
    Place("run/config_resolved.json", evaluate, fields("config config.task config.model")),
    Place("run/model.json", evaluate, fields("steps")),
    Place(
        "run/metrics.jsonl",
        lambda tree: [*HALTING, "--config.train.max_steps=40", f"--workdir={tree}/run"],
        ROWS,
        accepted=MADE_GOOD,
    ),
)

SCENE = Scene("halting", "halting_jax.main", make, PLACES)
