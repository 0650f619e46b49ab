"""JSON from files that may be damaged: every way in which one can be wrong ends in one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError

Fields = Mapping[str, type | tuple[type, ...]]
"""Keys an object must have and the types of their values; dots lead into objects inside it, and
`float` accepts whole numbers."""


class NotJson(ValueError):
    """A text that is no JSON, with the reason in a few words.

    Attributes:
        line: where, counted from 1; 0 = not known.
    """

    def __init__(self, reason: str, line: int = 0) -> None:
        """Keeps both."""
        super().__init__(reason)
        self.line = line


def parse_json(raw: bytes) -> Any:
    """Parses UTF-8 JSON, with or without a byte-order mark.

    Raises:
        NotJson: not UTF-8, not JSON, nested or long beyond what the parser takes, or a text with
            half a character (an escaped surrogate), which could not be written again.
    """
    try:
        # utf-8-sig: files saved by Windows editors start with a byte-order mark.
        value = json.loads(raw.decode("utf-8-sig"))
        if b"\\ud" in raw.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise NotJson(f"not valid JSON: {error.msg} ({place})", error.lineno) from None
    except RecursionError:
        raise NotJson("not valid JSON: nested too deeply") from None
    except UnicodeEncodeError:
        raise NotJson("holds half a character (an escaped surrogate)") from None
    except ValueError:
        raise NotJson("not valid JSON: a number has thousands of digits") from None
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {list: "a list", dict: "an object", str: "a text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def check_fields(content: Mapping[str, Any], fields: Fields) -> str:
    """What is wrong with the fields of an object; "" if nothing."""
    for name, kind in fields.items():
        value: Any = content
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return f"lacks {name!r}"
            value = value[part]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        allowed = (*kinds, int) if float in kinds else kinds
        # A truth value is an int to Python, but no number to whoever wrote the file.
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            return f"{name!r} is {kind_of(value)}"
    return ""


def read_json_object(
    path: str | Path,
    cure: str,
    fields: Fields | None = None,
    version: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """Reads a file with one JSON object.

    Args:
        path: the file.
        cure: what to do about a wrong one; the end of the message.
        fields: what the object must hold.
        version: (key, highest known number) of its format; a file without the key is of the first.

    Returns:
        The object.

    Raises:
        UserError: the file is missing, unreadable, damaged, of a newer format, or lacks a field.
    """
    try:
        content = parse_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {cure}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {cure}") from None
    except NotJson as error:
        raise UserError(f"{path} is damaged: {error}; {cure}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: {kind_of(content)}, not an object; {cure}")
    if version is not None:
        check_version(content, path, version, cure)
    if problem := check_fields(content, fields or {}):
        raise UserError(f"{path} is damaged: {problem}; {cure}")
    return content


def check_version(
    content: Mapping[str, Any], path: str | Path, version: tuple[str, int], cure: str
) -> None:
    """Refuses what a later version of this program wrote.

    Args:
        content: the object.
        path: its file.
        version: (key, highest known number).
        cure: what else can be done.

    Raises:
        UserError: the format is newer, or its number is none.
    """
    key, newest = version
    found = content.get(key, 1)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{path} has format {found!r:.40}, which no version ever wrote; {cure}")
    if found > newest:
        raise UserError(
            f"{path} has format {found}, this version reads up to {newest}: use the version of "
            f"this program that wrote it, or {cure}"
        )
