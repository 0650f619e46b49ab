"""A campaign of wrong input: configs, files and checkpoints, on every main.

    python -m tests.campaign.bad_input
    python -m tests.campaign.bad_input --mains esm,qstar --json table.json

Every wrong input must end with status 2 and one line that names the thing and the cure, without a
traceback, and with nothing overwritten; damage that a crash leaves must be made good. Prints a
table of what was tried, and what failed; ends with status 1 if anything did. The commands run in
this process, so that hundreds of them take minutes.
"""

import argparse
import collections
import dataclasses
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.rundir import atomic_write_json
from tests.campaign import bad_config

PARTS = ("config", "file", "checkpoint")
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        main: a key of `scenes`.
        part: one of PARTS.
        kind: what was wrong.
        where: the key or file.
        problem: what is wrong with how it ended; "" if nothing.
    """

    main: str
    part: str
    kind: str
    where: str
    problem: str


def config_cases(main: str, share: float = 1.0) -> Iterator[Result]:
    """Wrong configs of a main."""
    for name, command in bad_config.COMMANDS.items():
        if name.partition("_")[0] != main:
            continue
        rng = random.Random(name)
        for kind, key, argument in bad_config.cases(command):
            if rng.random() <= share:
                yield Result(main, "config", kind, key, bad_config.refused(command.check, argument))


def tree_cases(main: str, part: str, directory: Path, share: float = 1.0) -> Iterator[Result]:
    """Wrong files or checkpoints of a main.

    Args:
        main: a key of `SCENES`.
        part: "file" or "checkpoint".
        directory: for the trees.
        share: of the cases that are tried. All of them also try every command on good files:
            what is refused there says nothing.
    """
    from tests.campaign import checkpoints
    from tests.campaign.scenes import SCENES
    from tests.campaign.trees import Trees, cases

    scene = SCENES[main]
    if part == "checkpoint":
        files = scene.make

        def both(tree: Path) -> None:
            files(tree)
            checkpoints.MAKERS[main](tree)

        scene = dataclasses.replace(scene, make=both, places=checkpoints.PLACES[main])
    trees = Trees(directory / part)
    rng = random.Random(f"{main} {part}")
    for place, kind in cases(scene):
        if rng.random() > share:
            continue
        if share == 1.0 and kind == next(iter(place.kinds)):
            try:
                trees.outputs(scene, place)
            except AssertionError as error:
                yield Result(main, part, "good files", place.file, str(error)[:2000])
        yield Result(main, part, kind, place.file, trees.problem(scene, place, kind))


def table(results: Sequence[Result]) -> str:
    """Counts per main and kind; fields of a file count as one kind."""
    counts: dict[tuple[str, str, str], collections.Counter[str]] = {}
    for result in results:
        kind = result.kind.partition(":")[0]
        counter = counts.setdefault((result.main, result.part, kind), collections.Counter())
        counter["tried"] += 1
        counter["proper"] += not result.problem
    head = f"{'main':9}{'part':12}{'kind':36}{'tried':>7}{'proper':>8}"
    lines = [head, "-" * len(head)]
    for (main, part, kind), counter in counts.items():
        lines.append(f"{main:9}{part:12}{kind:36}{counter['tried']:>7}{counter['proper']:>8}")
    proper = sum(not result.problem for result in results)
    return "\n".join([*lines, f"{'all':57}{len(results):>7}{proper:>8}"])


def run(mains: Sequence[str], parts: Sequence[str], share: float = 1.0) -> list[Result]:
    """All cases, with a bar."""
    from tqdm import tqdm

    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="bad-input-") as name,
        tqdm(unit="case", dynamic_ncols=True) as bar,
    ):
        for main in mains:
            for part in parts:
                found = (
                    config_cases(main, share)
                    if part == "config"
                    else tree_cases(main, part, Path(name), share)
                )
                for result in found:
                    results.append(result)
                    bar.set_postfix_str(f"{main} {part}", refresh=False)
                    bar.update()
    return results


def main() -> int:
    """The command line."""
    names = tuple(dict.fromkeys(name.partition("_")[0] for name in bad_config.COMMANDS))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mains", default=",".join(names), help="separated by commas")
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, drawn at random")
    parser.add_argument("--json", type=Path, help="write every case into this file")
    given = parser.parse_args()
    mains, parts = given.mains.split(","), given.parts.split(",")
    for word, known in [*((m, names) for m in mains), *((p, PARTS) for p in parts)]:
        if word not in known:
            parser.error(f"{word!r} is none of {', '.join(known)}")
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    cache = Path(__file__).resolve().parents[2] / ".cache" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    results = run(mains, parts, given.share)
    failed = [result for result in results if result.problem]
    print(table(results))
    for result in failed:
        print(f"FAILED {result.main}, {result.where}, {result.kind}: {result.problem}")
    if given.json:
        rows: list[dict[str, Any]] = [dataclasses.asdict(result) for result in results]
        atomic_write_json(given.json, {"tried": len(results), "failed": len(failed), "cases": rows})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
