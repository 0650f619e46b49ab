"""Damaged JSON files end in one line that names the file, what is wrong, and the cure."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.json_files import NotJson, check_fields, parse_json, read_json_object

CURE = "write it again"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"a": 1', r"not valid JSON: .*line 1, column 8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 10_000 + b"]", "digits"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"a": "\\uDFFF"}', "half a character"),
    ],
)
def test_what_is_no_json(raw: bytes, reason: str) -> None:
    with pytest.raises(NotJson, match=reason) as error:
        parse_json(raw)
    assert "\n" not in str(error.value)


def test_what_is_json() -> None:
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]
    assert parse_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("content", "fields", "problem"),
    [
        ({"a": 1}, {"a": int}, ""),
        ({"a": 1}, {"a": float}, ""),
        ({"a": True}, {"a": int}, "'a' is a truth value"),
        ({"a": True}, {"a": float}, "'a' is a truth value"),
        ({"a": True}, {"a": bool}, ""),
        ({"a": None}, {"a": (str, type(None))}, ""),
        ({"a": "x"}, {"a": int}, "'a' is a text"),
        ({}, {"a": int}, "lacks 'a'"),
        ({"a": {"b": 1}}, {"a.b": int}, ""),
        ({"a": {"b": []}}, {"a.b": int}, "'a.b' is a list"),
        ({"a": 7}, {"a.b": int}, "lacks 'a.b'"),
    ],
)
def test_fields(content: dict[str, Any], fields: dict[str, Any], problem: str) -> None:
    assert check_fields(content, fields) == problem


def _refused(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        read_json_object(path, CURE, **options)
    text = str(error.value)
    assert str(path) in text and CURE in text and "\n" not in text
    return text


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert "no such file" in _refused(path)
    assert "Is a directory" in _refused(tmp_path)
    path.write_text("[1]")
    assert "a list, not an object" in _refused(path)
    path.write_text('{"a": 1}')
    assert read_json_object(path, CURE, {"a": int}) == {"a": 1}
    assert "lacks 'b'" in _refused(path, fields={"b": int})


@pytest.mark.parametrize("found", [2, 99])
def test_a_newer_format_is_refused(tmp_path: Path, found: int) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"version": found}))
    assert f"format {found}" in _refused(path, version=("version", 1))


@pytest.mark.parametrize("found", [0, -1, "1", None, True])
def test_what_is_no_format(tmp_path: Path, found: Any) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"version": found}))
    assert "no version ever wrote" in _refused(path, version=("version", 1))


def test_a_file_without_a_number_is_of_the_first_format(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("{}")
    assert read_json_object(path, CURE, version=("version", 1)) == {}
