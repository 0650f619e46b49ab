"""Cases of a scene: a fresh copy of its tree, damaged, and the command run on it."""

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.campaign.in_process import Ended, run
from tests.campaign.places import NOWHERE, Place, Scene
from tests.campaign.verdicts import contents, refused_properly

ENVIRON = {"HF_HUB_OFFLINE": "1", "REOAC_DATA_ROOT": "", "TOKENIZERS_PARALLELISM": "false"}


class Trees:
    """Scenes below a directory, made when they are first needed."""

    def __init__(self, directory: Path) -> None:
        """Nothing is made yet.

        Args:
            directory: empty; what is below it belongs to this object.
        """
        self._directory = directory
        self._outputs: dict[tuple[str, str, int], Any] = {}

    def good(self, scene: Scene) -> Path:
        """The tree of good files."""
        good = self._directory / scene.main / "good"
        if not good.exists():
            # Made where the copies will lie: some of the files name their place.
            tree = good.with_name("tree")
            tree.mkdir(parents=True)
            scene.make(tree)
            tree.rename(good)
        return good

    def copy(self, scene: Scene, place: Place) -> Path:
        """A tree of its own for one command."""
        # Always of the same name: a path is part of some resolved configs.
        tree = self._directory / scene.main / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(self.good(scene), tree, symlinks=True)
        place.prepare(tree)
        return tree

    def outputs(self, scene: Scene, place: Place) -> Any:
        """What the command leaves where nothing is wrong; fails if it is refused."""
        key = (scene.main, place.file, scene.places.index(place))
        if key not in self._outputs:
            tree = self.copy(scene, place)
            ended = run(scene.module, place.arguments(tree), ENVIRON)
            assert ended.status == place.good, (place.file, ended.status, ended.stderr[-2000:])
            assert place.good != 2 or NOWHERE in ended.stderr, (place.file, ended.stderr[-2000:])
            self._outputs[key] = place.outputs(tree) if place.outputs else None
        return self._outputs[key]

    def problem(self, scene: Scene, place: Place, kind: str) -> str:
        """Damages one file and runs the command; what is wrong with its end, "" if nothing."""
        tree = self.copy(scene, place)
        place.kinds[kind](tree / place.file)
        before = contents(tree)
        ended = run(scene.module, place.arguments(tree), ENVIRON)
        after = {
            name: digest
            for name, digest in contents(tree).items()
            if name in before or not name.startswith(place.may_make or ("\0",))
        }
        if kind in place.accepted and ended.status in place.accepted[kind]:
            found = place.outputs(tree) if place.outputs else {}
            wanted = self.outputs(scene, place) if place.outputs else {}
            return _accepted(ended, wanted, found)
        return refused_properly(
            ended, place.named or re.escape(Path(place.file).name), before, after
        )


def _accepted(ended: Ended, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Damage that is made good must leave what an undisturbed run leaves."""
    if "Traceback" in ended.stderr:
        return "a traceback, though it ended well"
    differing = [k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)]
    return f"accepted, but other results in {sorted(differing)[:3]}" if differing else ""


def cases(scene: Scene) -> Iterator[tuple[Place, str]]:
    """Every place with every kind."""
    for place in scene.places:
        for kind in place.kinds:
            yield place, kind
