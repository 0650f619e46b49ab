"""What a checkpoint step must be to be read: its files as they were written, in a known format."""

import zlib
from pathlib import Path
from typing import Any

from common.json_files import NotJson, check_fields, check_version, parse_json
from common.processes import on_main

SUMMARY = "summary.json"
FORMAT = 1
"""Of a step: what its items and `summary.json` hold. A step without the number is of the first."""

_VERSION = ("format", FORMAT)
_NEWER_CURE = "start in another --workdir"


class Damaged(Exception):
    """The files of a step are not what was written."""


def files_of(directory: Path) -> list[str]:
    """Files of a step that have a checksum, relative to it."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(directory)) for path in paths if path.name != SUMMARY)


def checksum(path: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def verify(directory: Path) -> bool:
    """Checks the files of a step; False when it was killed before its checksums were written.

    Raises:
        UserError: a later version wrote it.
        Damaged: a file is missing or has changed.
    """
    path = directory / SUMMARY
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, NotJson) as error:
        raise Damaged(f"{SUMMARY} is not valid") from error
    if not isinstance(content, dict):
        raise Damaged(f"{SUMMARY} is not valid")
    check_version(content, path, _VERSION, _NEWER_CURE)
    if problem := check_fields(content, {"files": dict}):
        raise Damaged(f"{SUMMARY} {problem}")
    for name, wanted in content["files"].items():
        try:
            actual = checksum(directory / name)
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error
        if actual != wanted:
            raise Damaged(f"{name} has changed since it was written")
    return True


def check_document(directory: Path, document: Any) -> None:
    """Checks the form of the JSON item of a step.

    Raises:
        UserError: a later version wrote it.
        Damaged: it is none of ours.
    """
    if not isinstance(document, dict):
        raise Damaged("its JSON item is no object")
    check_version(document, directory, _VERSION, _NEWER_CURE)
    if problem := check_fields(document, {"host": dict, "settings": dict, "leaves": dict}):
        raise Damaged(f"its JSON item {problem}")
    for name, leaf in document["leaves"].items():
        if not (isinstance(leaf, list) and len(leaf) == 2 and isinstance(leaf[0], list)):
            raise Damaged(f"its JSON item says nothing about {name}")


def verify_together(directory: Path) -> bool:
    """`verify` by the main process, its verdict for all: the files are read once."""

    def verdict() -> list[Any]:
        try:
            return [verify(directory), ""]
        except Damaged as error:
            return [False, str(error)]

    verified, damage = on_main(verdict)
    if damage:
        raise Damaged(damage)
    return bool(verified)
