"""Places: files that a main reads, in a tree of good ones, with what a campaign does to them."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.campaign import damage
from tests.campaign.in_process import run

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


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def questions(count: int) -> list[dict[str, Any]]:
    """Rows as GSM8K has them."""
    return [
        {
            "question": f"Tom has {n} apples and buys {n + 1}. How many?",
            "answer": f"#### {2 * n + 1}",
        }
        for n in range(1, count + 1)
    ]


def done(module: str, *arguments: str) -> None:
    """Runs a command that must succeed."""
    ended = run(module, list(arguments))
    assert ended.status == 0, f"{module} {arguments}: {ended.stderr[-2000:]}"


def fields(names: str, rows: bool = False, text: Kinds = damage.TEXT) -> Kinds:
    """Wrong texts and wrong fields of a JSON file."""
    return {**text, **damage.json_kinds(rows, tuple(names.split()))}


def without(kinds: Kinds, *names: str) -> Kinds:
    """All but some of the kinds."""
    return {name: do for name, do in kinds.items() if name not in names}


# What a crash can do to a journal is made good; any beginning of an object counts as torn.
MADE_GOOD = {
    "missing": (0,),
    "empty": (0,),
    "truncated": (0,),
    "huge line": (0,),
    "long number": (0,),
}


def config_place(words: tuple[str, ...], *more: str) -> tuple[Callable[[Path], None], Place]:
    """A config file of one's own: how it is written, and what is damaged in it.

    Args:
        words: the command; its `--config=configs/NAME.py:tiny` is what the file calls.
        more: arguments that end the command early, below the tree.
    """
    given = next(word for word in words if word.startswith("--config="))
    module = given.removeprefix("--config=").removesuffix(".py:tiny").replace("/", ".")
    others = [word for word in words if word != given]

    def write(tree: Path) -> None:
        lines = (
            f"import {module}",
            "",
            "def get_config():",
            f'    return {module}.get_config("tiny")',
        )
        (tree / "own_config.py").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def arguments(tree: Path) -> list[str]:
        return [
            f"--config={tree}/own_config.py",
            *others,
            *(word.replace("TREE", str(tree)) for word in more),
        ]

    # Python reads the text; a line without an end is a name nobody defined.
    kinds = without(damage.TEXT, "long number")
    return write, Place("own_config.py", arguments, kinds, good=2)


ROWS = {**damage.TEXT, **damage.json_kinds(True, ())}
LIST = without({**damage.TEXT, **damage.json_kinds(False, ())}, "list for object", "half character")
