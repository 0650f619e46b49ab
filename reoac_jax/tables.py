"""Per-vocabulary tables: every string rule of the method becomes a lookup by token id."""

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from common.errors import UserError
from common.rundir import atomic_write
from reoac_jax.types import SpecialIds

NUMBER = re.compile(r"[+-]?(?:\d+\.\d+|\d+|\d+/\d+)%?")
OPERATOR_CHARS = frozenset("+-*/=<>&^_")
# The stricter set of the stripped mode: "_" and "&" are far more often parts of words.
MATHS_CHARS = frozenset("+-*/=<>^×÷−·≤≥")
SPACE_MARKERS = ("Ġ", "▁", " ")
STRING_MODES = ("raw", "stripped")

_WORD = re.compile(r"[^\W\d_]{2,}")
_TAG = re.compile(r"<\|?[\w/ ]+\|?>|\[[A-Z]+\]")
_BYTE_BLANKS = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t", "č": "\r"})
_FORMAT = 1


@struct.dataclass
class Tables:
    """Lookup tables of a vocabulary of V ids (M = most number literals inside one token).

    Attributes:
        num_full: [V] bool, the string is a number literal.
        op_char: [V] bool, the string contains an operator character.
        has_digit: [V] bool, the string contains a decimal digit.
        str_id: [V] i32, equal ids <=> equal strings.
        lower_id: [V] i32, equal ids <=> equal strings after lower-casing.
        num_ids: [V, M] i32, ids of the literals found inside the token, -1 padded.
        tail: [V] i8, last piece of the string: 0 no literal, 1 has a literal, 2 string is blank.
        special: [V] bool, eos, pad, bos or mask.
        is_digits: [V] bool, digits only, after at most one leading-space marker.
        digit_value: [V] u32, value of such a token modulo 2^32.
        digit_count: [V] i32, its number of digits.
        digit_zeros: [V] i32, how many zeros it ends with (all of them when its value is 0).
        starts_with_space: [V] bool.
        is_dot: [V] bool, exactly ".".
        is_comma: [V] bool, exactly ",".
    """

    num_full: jax.Array
    op_char: jax.Array
    has_digit: jax.Array
    str_id: jax.Array
    lower_id: jax.Array
    num_ids: jax.Array
    tail: jax.Array
    special: jax.Array
    is_digits: jax.Array
    digit_value: jax.Array
    digit_count: jax.Array
    digit_zeros: jax.Array
    starts_with_space: jax.Array
    is_dot: jax.Array
    is_comma: jax.Array
    eos_id: int = struct.field(pytree_node=False)
    pad_id: int = struct.field(pytree_node=False)
    bos_id: int = struct.field(pytree_node=False)
    mask_id: int = struct.field(pytree_node=False)
    strings_mode: str = struct.field(pytree_node=False, default="raw")

    @property
    def vocab_size(self) -> int:
        """Number of ids the tables cover."""
        return int(np.shape(self.num_full)[0])


def number_literals(text: str) -> list[str]:
    """Number literals found by searching a text from left to right.

    Args:
        text: any text.

    Returns:
        The literals in order; "1/2" gives "1" and "2".
    """
    return NUMBER.findall(text)


def build_tables(
    strings: Sequence[str | None],
    special: SpecialIds,
    strings_mode: str = "raw",
    *,
    vocab_size: int | None = None,
    cache_dir: str | None = None,
) -> Tables:
    """Builds the tables of a vocabulary on the host (per-vocabulary tables, spec 5.1 and 5.4).

    Args:
        strings: raw vocabulary string per id (byte-level "Ġ12", not " 12"); None = no string.
        special: ids that are never text; -1 = the tokenizer lacks this role.
        strings_mode: "raw", or "stripped" = without the leading-space marker, and only maths
            symbols count as operators.
        vocab_size: number of ids of the model when larger than the number of strings.
        cache_dir: where to keep the result under a hash of its inputs.

    Returns:
        The tables as device arrays.

    Raises:
        UserError: for an unknown mode or a special id outside the vocabulary.
    """
    if strings_mode not in STRING_MODES:
        raise UserError(
            f"relation.strings: '{strings_mode}' is not one of {', '.join(STRING_MODES)}"
        )
    size = max(len(strings), vocab_size or 0)
    for name, value in special._asdict().items():
        if not -1 <= value < size:
            raise UserError(f"{name} = {value} lies outside the vocabulary of {size} ids")
    filled = _fill(list(strings) + [None] * (size - len(strings)))
    path = ""
    if cache_dir is not None:
        digest = _digest(filled, special, strings_mode)
        path = os.path.join(cache_dir, f"token_tables_{digest}.npz")
    if path and os.path.exists(path):
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
    else:
        arrays = _table_arrays(filled, special, strings_mode)
        if path:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, allow_pickle=False, **arrays)
            atomic_write(path, buffer.getvalue())
    fields: dict[str, Any] = {name: jnp.asarray(array) for name, array in arrays.items()}
    return Tables(**fields, **special._asdict(), strings_mode=strings_mode)


def _fill(strings: list[str | None]) -> list[str]:
    """Gives every id without a string a unique one that no rule matches (letters only)."""
    filled: list[str] = []
    for index, string in enumerate(strings):
        if string is None:
            letters = "".join(chr(ord("a") + int(digit)) for digit in str(index))
            string = f"\ue000{letters}"
        filled.append(string)
    return filled


def _digest(strings: list[str], special: SpecialIds, strings_mode: str) -> str:
    content = json.dumps([_FORMAT, strings_mode, list(special), strings], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _without_marker(string: str) -> str:
    return string[1:] if string.startswith(SPACE_MARKERS) else string


def _has_operator(string: str, strings_mode: str) -> bool:
    if strings_mode == "raw":
        return not OPERATOR_CHARS.isdisjoint(string)
    return not MATHS_CHARS.isdisjoint(string) and _WORD.search(string) is None


def _tail_code(string: str) -> int:
    pieces = string.split()
    if not pieces:
        return 2
    return int(NUMBER.search(pieces[-1]) is not None)


def _group(strings: list[str]) -> np.ndarray:
    seen: dict[str, int] = {}
    return np.asarray([seen.setdefault(string, len(seen)) for string in strings], np.int32)


def _table_arrays(
    filled: list[str], special: SpecialIds, strings_mode: str
) -> dict[str, np.ndarray]:
    size = len(filled)
    strings = filled
    if strings_mode == "stripped":
        tags = {i for i in range(size) if i in special or _TAG.fullmatch(filled[i])}
        # Tags such as "<|mask|>" are no text, whatever characters they are written with.
        strings = [
            f"\ue001{i:x}".translate({ord(str(d)): 0xE010 + d for d in range(10)})
            if i in tags
            else _without_marker(string).translate(_BYTE_BLANKS)
            for i, string in enumerate(filled)
        ]
    literals: dict[str, int] = {}
    found = [
        [literals.setdefault(item, len(literals)) for item in number_literals(string)]
        for string in strings
    ]
    most = max(1, max(map(len, found), default=1))
    num_ids = np.full((size, most), -1, np.int32)
    for index, row in enumerate(found):
        num_ids[index, : len(row)] = row
    special_flags = np.zeros(size, bool)
    special_flags[[i for i in special if i >= 0]] = True
    digits = [_without_marker(string) for string in filled]
    is_digits = np.asarray([bool(string) and string.isdecimal() for string in digits])
    values = [int(d) if flag else 0 for d, flag in zip(digits, is_digits, strict=True)]
    counts = [len(d) if flag else 0 for d, flag in zip(digits, is_digits, strict=True)]
    zeros = [
        count - len(str(value).rstrip("0")) - (count - len(str(value))) if value else count
        for value, count in zip(values, counts, strict=True)
    ]
    return {
        "num_full": np.asarray([NUMBER.fullmatch(s) is not None for s in strings]),
        "op_char": np.asarray([_has_operator(s, strings_mode) for s in strings]),
        "has_digit": np.asarray([any(c.isdecimal() for c in s) for s in strings]),
        "str_id": _group(strings),
        "lower_id": _group([s.lower() for s in strings]),
        "num_ids": num_ids,
        "tail": np.asarray([_tail_code(s) for s in strings], np.int8),
        "special": special_flags,
        "is_digits": is_digits,
        "digit_value": np.asarray([v % 2**32 for v in values], np.uint32),
        "digit_count": np.asarray(counts, np.int32),
        "digit_zeros": np.asarray(zeros, np.int32),
        "starts_with_space": np.asarray([s.startswith(SPACE_MARKERS) for s in filled]),
        "is_dot": np.asarray([s == "." for s in filled]),
        "is_comma": np.asarray([s == "," for s in filled]),
    }
