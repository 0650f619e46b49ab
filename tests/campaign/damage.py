"""Ways in which a file can be wrong, as changes of a good one."""

import io
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HUGE = 4 << 20  # bytes of one line

# What stands in for a value of another type.
_OTHER: dict[type, Any] = {
    str: 7,
    int: "many",
    float: "much",
    bool: "maybe",
    list: {"a": 1},
    dict: [1],
}


def empty(path: Path) -> None:
    """No byte."""
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    """The first two thirds, in the midst of a line."""
    raw = path.read_bytes()
    cut = max(2 * len(raw) // 3, 1)
    while cut > 1 and raw[cut - 1 : cut] in (b"\n", b"}", b"{"):
        cut -= 1
    path.write_bytes(raw[:cut])


def binary(path: Path) -> None:
    """Random bytes, with ends of lines among them."""
    path.write_bytes(random.Random(path.name).randbytes(4096))


def huge_line(path: Path) -> None:
    """One line of megabytes that never ends."""
    path.write_bytes(b'{"question": "' + b"x" * HUGE)


def deep(path: Path) -> None:
    """Brackets in brackets, more than a parser can stack."""
    path.write_bytes(b"[" * 200_000)


def long_number(path: Path) -> None:
    """A number of more digits than Python reads."""
    path.write_bytes(b'{"number": ' + b"9" * 20_000 + b"}\n")


def missing(path: Path) -> None:
    """No such file."""
    path.unlink()


def directory(path: Path) -> None:
    """A directory of its name."""
    path.unlink()
    path.mkdir()


def not_utf8(path: Path) -> None:
    """A byte inside the first text that is no UTF-8."""
    raw = path.read_bytes()
    place = raw.index(b'"') + 1
    path.write_bytes(raw[:place] + b"\xff\xfe" + raw[place:])


ANY: Mapping[str, Callable[[Path], None]] = {
    "empty": empty,
    "truncated": truncated,
    "binary": binary,
    "missing": missing,
    "directory": directory,
}
TEXT: Mapping[str, Callable[[Path], None]] = {
    **ANY,
    "huge line": huge_line,
    "deep": deep,
    "long number": long_number,
    "not UTF-8": not_utf8,
}


# --------------------------------------------------------------------------------------- JSON
def _change_object(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))), encoding="utf-8")


def _change_row(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes the second row: neither the schema's first nor a last one that may be torn."""
    lines = path.read_text().splitlines()
    place = min(1, len(lines) - 1)
    lines[place] = json.dumps(change(json.loads(lines[place])))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _with(content: Any, key: str, change: Callable[[dict[str, Any], str], None]) -> Any:
    """The content with one field (dots lead inside) changed."""
    *sections, name = key.split(".")
    node = content
    for section in sections:
        node = node[section]
    change(node, name)
    return content


def _other_type(node: dict[str, Any], name: str) -> None:
    node[name] = _OTHER[type(node[name])]


def _absent(node: dict[str, Any], name: str) -> None:
    del node[name]


def _half_character(node: dict[str, Any], name: str) -> None:
    node[name] = "\ud800"


def json_kinds(rows: bool, fields: tuple[str, ...]) -> dict[str, Callable[[Path], None]]:
    """What can be wrong with JSON beyond its text.

    Args:
        rows: a file of one object a line.
        fields: those that are needed; each is left out, and given another type.
    """
    edit = _change_row if rows else _change_object
    kinds: dict[str, Callable[[Path], None]] = {
        "list for object": lambda path: edit(path, lambda content: [content]),
        "number for object": lambda path: edit(path, lambda _: 7),
        "half character": lambda path: edit(path, lambda content: {**content, "note": "\ud800"}),
    }
    for key in fields:
        kinds[f"other type: {key}"] = lambda path, key=key: edit(  # type: ignore[misc]
            path, lambda content: _with(content, key, _other_type)
        )
        kinds[f"without: {key}"] = lambda path, key=key: edit(  # type: ignore[misc]
            path, lambda content: _with(content, key, _absent)
        )
    return kinds


def set_field(key: str, value: Any) -> Callable[[Path], None]:
    """A JSON object with one field (dots lead inside) set to a value."""

    def put(node: dict[str, Any], name: str) -> None:
        node[name] = value

    return lambda path: _change_object(path, lambda content: _with(content, key, put))


# -------------------------------------------------------------------------------------- arrays
def _save(path: Path, array: np.ndarray, allow_pickle: bool = False) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    path.write_bytes(buffer.getvalue())


def _rewritten(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: _save(path, change(np.load(path)))


def _objects(path: Path) -> None:
    """An array that only unpickling could read."""
    _save(path, np.asarray([{"a": 1}], object), allow_pickle=True)


ARRAY: Mapping[str, Callable[[Path], None]] = {
    **ANY,
    "objects": _objects,
    "texts": _rewritten(lambda array: np.full(array.shape, "x")),
    "fewer rows": _rewritten(lambda array: array[:-1]),
    "narrower": _rewritten(lambda array: array[..., :-1]),
    "flat": _rewritten(lambda array: array.reshape(-1)),
}


# ------------------------------------------------------------------------------------- weights
def _tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def _drop_one(tensors: dict[str, np.ndarray]) -> None:
    # Neither the first nor the last: those may be tied to another.
    del tensors[sorted(tensors)[len(tensors) // 2]]


def _add_one(tensors: dict[str, np.ndarray]) -> None:
    tensors["no.such.tensor"] = np.zeros(3, np.float32)


def _reshape_one(tensors: dict[str, np.ndarray]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = np.ascontiguousarray(tensors[name][:-1])


WEIGHTS: Mapping[str, Callable[[Path], None]] = {
    **ANY,
    "tensor missing": _tensors(_drop_one),
    "tensor unknown": _tensors(_add_one),
    "other shape": _tensors(_reshape_one),
}


def empty_directory(path: Path) -> None:
    """A directory without its files."""
    shutil.rmtree(path)
    path.mkdir()


def file_for_directory(path: Path) -> None:
    """A file of the directory's name."""
    shutil.rmtree(path)
    path.write_text("not a directory\n", encoding="utf-8")


DIRECTORY: Mapping[str, Callable[[Path], None]] = {
    "missing": shutil.rmtree,
    "empty directory": empty_directory,
    "file for directory": file_for_directory,
}
