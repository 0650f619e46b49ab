"""Wrong files and checkpoints: a part of the campaign in every run, all of it in slow ones."""

from pathlib import Path

import pytest

from tests.campaign import damage, in_process
from tests.campaign.bad_input import PARTS, Result, run, table, tree_cases
from tests.campaign.in_process import Ended
from tests.campaign.scenes import SCENES
from tests.campaign.trees import ENVIRON, Trees
from tests.campaign.verdicts import changes, contents, refused_properly
from tests.e2e import commands

MAINS = ("reoac", "halting", "qstar", "esm")


@pytest.mark.parametrize(("main", "share"), [("esm", 0.03), ("qstar", 0.05)])
def test_a_part_of_all_wrong_files(main: str, share: float, tmp_path: Path) -> None:
    results = list(tree_cases(main, "file", tmp_path, share))
    failed = [(r.where, r.kind, r.problem) for r in results if r.problem]
    assert len(results) > 5 and not failed, failed


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("main", MAINS)
def test_all_wrong_files_and_checkpoints(main: str) -> None:
    results = run([main], PARTS[1:])
    print("\n" + table(results))
    failed = [(r.where, r.kind, r.problem) for r in results if r.problem]
    assert not failed, failed


@pytest.mark.slow
@pytest.mark.parametrize("main", MAINS)
def test_a_process_ends_as_the_call_does(main: str, tmp_path: Path) -> None:
    """The campaign calls the mains; started as a shell does, one says the same."""
    scene, trees = SCENES[main], Trees(tmp_path)
    place = scene.places[0]
    tree = trees.copy(scene, place)
    place.kinds["binary"](tree / place.file)
    arguments = place.arguments(tree)
    called = in_process.run(scene.module, arguments, ENVIRON)
    started = commands.run(*arguments, module=scene.module, **ENVIRON)
    assert called.status == started.returncode == 2
    lines = [
        [line for line in text.splitlines() if line.startswith("error:")]
        for text in (called.stderr, started.stderr)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 1


GOOD = "error: data.jsonl:3: not valid JSON; mend the line\n"


@pytest.mark.parametrize(
    ("ended", "problem"),
    [
        (Ended(2, "", GOOD), ""),
        (Ended(2, "", f"warning: x\n{GOOD}"), ""),
        (Ended(0, "", ""), "accepted"),
        (Ended(1, "", "Traceback (most recent call last)\nKeyError: 'a'\n"), "a traceback"),
        (Ended(3, "", GOOD), "ended with 3"),
        (Ended(2, "", GOOD * 2), "2 error lines"),
        (Ended(2, "", "error: something is wrong; mend it\n"), "does not name"),
        (Ended(2, "", "error: data.jsonl is wrong\n"), "no cure"),
        (Ended(2, "", f"error: data.jsonl: mend {'x' * 2000}\n"), "characters"),
    ],
)
def test_verdicts(ended: Ended, problem: str) -> None:
    verdict = refused_properly(ended, r"data\.jsonl", {}, {})
    assert verdict.startswith(problem) if problem == "" else problem in verdict
    assert bool(verdict) == bool(problem)


def test_a_refusal_that_overwrites_is_found(tmp_path: Path) -> None:
    for name in ("kept", "changed", "removed"):
        (tmp_path / name).write_text(name)
    before = contents(tmp_path)
    (tmp_path / "changed").write_text("other")
    (tmp_path / "removed").unlink()
    (tmp_path / "made").write_text("")
    (tmp_path / ".lock").write_text("a lock is no result")
    after = contents(tmp_path)
    assert changes(before, after) == ["changed changed", "made made", "removed removed"]
    assert "refused, but" in refused_properly(Ended(2, "", GOOD), "data", before, after)


def test_damage_changes_the_file(tmp_path: Path) -> None:
    for rows, text in ((True, '{"a": "x"}\n{"a": "y"}\n{"a": "z"}\n'), (False, '{"a": "x"}\n')):
        for kind, do in {**damage.TEXT, **damage.json_kinds(rows, ("a",))}.items():
            path = tmp_path / "file"
            path.write_text(text)
            do(path)
            assert not path.is_file() or path.read_bytes() != text.encode(), kind
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


def test_the_table_counts() -> None:
    results = [
        Result("esm", "file", "other type: k", "a.json", ""),
        Result("esm", "file", "other type: j", "a.json", "accepted"),
        Result("esm", "file", "empty", "a.json", ""),
    ]
    lines = [line.split() for line in table(results).splitlines()]
    assert ["esm", "file", "other", "type", "2", "1"] in lines
    assert ["esm", "file", "empty", "1", "1"] in lines
    assert lines[-1] == ["all", "3", "2"]
