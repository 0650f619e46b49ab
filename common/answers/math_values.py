r"""Typed values of MATH answers.

One parser for every grader: number or expression, ordered tuple or interval with its brackets,
list or set, union, matrix, equation or inequality, number in a base, text. Where notation is
ambiguous ("100,200", "5 m", "(C) 36") an answer has several readings.
"""

import functools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from common.answers.expressions import Node, ParseError, parse_expression
from common.answers.math_text import SPAN, SPAN_CLOSE, SPAN_OPEN, normalize

MAX_TEXT = 2000  # characters of one answer; longer ones are compared as text
MAX_PARTS = 64
MAX_NESTING = 6


class Value(NamedTuple):
    """A typed answer.

    Attributes:
        kind: "scalar", "tuple", "list" (unordered), "union", "matrix", "relation", "base", "text".
        parts: elements, entries by row, or sides of a relation.
        node: the expression of a scalar; the number of a "base".
        text: brackets of a tuple, shape of a matrix, signs of a relation (joined by blanks), digits
            and base, or the text itself.
    """

    kind: str
    parts: tuple["Value", ...] = ()
    node: Node | None = None
    text: str = ""


_MATRIX = re.compile(
    r"\\begin\s*\{(?P<kind>[pbBvV]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(?P<body>.*)"
    r"\\end\s*\{(?P=kind)\}",
    re.DOTALL,
)
_BASE = re.compile(r"([0-9A-Z]+)\s*_\s*(?:\{\s*([0-9]{1,2})\s*\}|([0-9]{1,2}))")
_RELATION = re.compile(r"\\(?:le|ge|ne|approx|equiv|sim)(?![A-Za-z])|[<>=]")
_MEMBERSHIP = re.compile(r"[A-Za-z]\s*\\in(?![A-Za-z])\s*(?=\S)")
_CONJUNCTION = re.compile(
    rf"\s*,?\s*{SPAN_OPEN}\s*,?\s*(?:and|or)\s*,?\s*{SPAN_CLOSE}\s*|\s*,?\s+(?:and|or)\s+",
    re.IGNORECASE,
)
_COMMA_GROUPS = re.compile(r"(?<![0-9.,_^])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])")
_LABEL = re.compile(r"\(?\s*([A-J])\s*\)\s*[:.]?\s*(?=[-+\\0-9.(\[])")
_ANSWER_WORDS = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s*(?:is|=|:)\s*:?\s*", re.IGNORECASE)
_APPROXIMATE = re.compile(r"^\\(?:approx|phantom\s*\{[^{}]*\}|phantom)(?![A-Za-z])\s*")
_POWER = re.compile(r"\s*\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9])\s*")
_UNITS_TEXT = (
    "cm mm km m dm nm in inch inches ft foot feet yd yard yards mi mile miles mph kg g mg gram "
    "grams kilogram kilograms lb lbs pound pounds oz ounce ounces ton tons s sec second seconds "
    "min minute minutes h hr hrs hour hours day days week weeks month months year years dollar "
    "dollars cent cents degree degrees radian radians percent unit units square cubic meter "
    "meters metre metres centimeter centimeters kilometer kilometers millimeter millimeters liter "
    "liters litre litres ml gallon gallons per sq cu rad deg digits people ways times points"
)
_UNITS = frozenset(_UNITS_TEXT.split())
_NOT_UNITS_TEXT = (
    "and but choose else equals if infinity minus mod nor not or over plus then times to"
)
_NOT_UNITS = frozenset(_NOT_UNITS_TEXT.split())
_UNIT_TAIL = re.compile(
    r"(?P<rest>.*[0-9})])(?P<gap>\s*)(?P<tail>[A-Za-z][A-Za-z /^0-9{}.]*)", re.DOTALL
)
_UNIT_SPLIT = re.compile(r"[ /]+")
_OPENERS, _CLOSERS = "([{" + SPAN_OPEN, ")]}" + SPAN_CLOSE


@functools.lru_cache(maxsize=8192)
def readings(text: str) -> tuple[Value, ...]:
    """All readings of an answer, the most literal first.

    Args:
        text: the answer part of a text (see `common.answers.math_text.math_answer`).

    Returns:
        At least one value; an empty answer is the text "".
    """
    if len(text) > 4 * MAX_TEXT:
        return (Value("text", text=text),)
    text = normalize(text)
    if len(text) > MAX_TEXT:
        return (Value("text", text=text),)
    grouped = _COMMA_GROUPS.sub(lambda hit: hit.group().replace(",", ""), text)
    if grouped == text or _inside_brackets(text):
        found = [parse_value(text)]
    elif ",0" in text:
        # "4,000" is no list of 4 and 000.
        found = [parse_value(grouped)]
    else:
        found = [parse_value(grouped), parse_value(text)]
    label = _LABEL.match(text.replace(SPAN_OPEN, " ").replace(SPAN_CLOSE, " ").lstrip())
    if label is not None:
        plain = text.replace(SPAN_OPEN, " ").replace(SPAN_CLOSE, " ").lstrip()
        found += [parse_value(plain[label.end() :]), parse_value(label.group(1))]
    tail = _UNIT_TAIL.fullmatch(text)
    if tail is not None and tail.group("gap") and found[0].kind in ("scalar", "text"):
        words = _UNIT_SPLIT.split(tail.group("tail"))
        if all(re.sub(r"[\^0-9{}.]", "", word) in _UNITS for word in words):
            found.append(parse_value(tail.group("rest")))
    return tuple(dict.fromkeys(found))


def _inside_brackets(text: str) -> bool:
    return text[:1] in ("(", "[") or text.startswith("\\{")


def parse_value(text: str, depth: int = 0) -> Value:
    """Parses one normalised answer.

    Args:
        text: output of `common.answers.math_text.normalize`, or a part of it.
        depth: how many brackets are around it.

    Returns:
        The value; whatever has no mathematical reading is text.
    """
    text = text.strip()
    if text.endswith((",", ";")):
        text = text[:-1].rstrip()
    if not text or depth > MAX_NESTING:
        return Value("text", text=_words(text))
    whole = SPAN.fullmatch(text)
    if whole is not None:
        return _of_text(whole.group(1), depth)
    text = _APPROXIMATE.sub("", _without_unit_spans(text))
    told = _ANSWER_WORDS.match(_words(text))
    if told is not None:
        return parse_value(_words(text)[told.end() :], depth + 1)
    for attempt in _ATTEMPTS:
        value = attempt(text, depth)
        if value is not None:
            return value
    return Value("text", text=_words(text))


def _of_text(content: str, depth: int) -> Value:
    content = content.strip().rstrip(".")
    if len(content) > 2 and content[0] == "(" and content[-1] == ")":
        content = content[1:-1]
    return parse_value(content, depth + 1)


def _without_unit_spans(text: str) -> str:
    """Drops `\text{..}` (with a power, a quotient) behind something with a number in it."""
    spans = list(SPAN.finditer(text))
    if not spans or spans[0].start() == 0:
        return text
    if any(word in ("and", "or") for span in spans for word in span.group(1).strip(" ,").split()):
        return text
    head = text[: spans[0].start()].rstrip()
    tail = _POWER.sub(" ", SPAN.sub(" ", text[spans[0].start() :]))
    countable = any(char.isdigit() for char in head) or "\\pi" in head
    if countable and not tail.strip(" /.") and head[-1] not in "=<>+-*/,(":
        return head
    return text


def _words(text: str) -> str:
    text = SPAN.sub(r" \1 ", text)
    return " ".join(text.split())


def _matrix(text: str, depth: int) -> Value | None:
    hit = _MATRIX.fullmatch(text)
    if hit is None or "\\begin" in hit.group("body"):
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", hit.group("body")) if row.strip()]
    cells = [row.split("&") for row in rows]
    if not cells or len({len(row) for row in cells}) != 1 or len(cells) * len(cells[0]) > MAX_PARTS:
        return None
    kind = "v" if hit.group("kind") in ("vmatrix", "Vmatrix") else ""
    parts = tuple(parse_value(cell, depth + 1) for row in cells for cell in row)
    return Value("matrix", parts, text=f"{kind}{len(cells)}x{len(cells[0])}")


def _based(text: str, depth: int) -> Value | None:
    hit = _BASE.fullmatch(text)
    if hit is None:
        return None
    digits, base = hit.group(1), int(hit.group(2) or hit.group(3))
    if not 2 <= base <= 36 or len(digits) > MAX_PARTS or not any(d.isdigit() for d in digits):
        return None
    try:
        number = Fraction(int(digits, base))
    except ValueError:
        return None
    return Value("base", node=Node("num", value=number), text=f"{digits.lstrip('0')}_{base}")


def _braced(text: str, depth: int) -> Value | None:
    if not (text.startswith("\\{") and text.endswith("\\}")):
        return None
    inner = text[2:-2]
    if _closes_early(text):
        return None
    parts = _split(inner, _is_comma)
    return _list([parse_value(part, depth + 1) for part in parts]) if inner.strip() else None


def _listed(text: str, depth: int) -> Value | None:
    """Comma and semicolon lists at the top level, "a and b", "a or b"."""
    parts = _split(text, _is_comma)
    spread = [piece for part in parts for piece in _CONJUNCTION.split(part) if piece.strip()]
    if len(spread) < 2 or len(spread) > MAX_PARTS:
        return None
    values = [parse_value(part, depth + 1) for part in spread]
    if len(spread) > len(parts) and any(value.kind == "text" for value in values):
        # "red and blue" is one text, "2, red" still a list.
        return None
    if all(value.kind == "text" for value in values) and any(" " in v.text for v in values):
        return None
    return _list(values)


def _list(values: list[Value]) -> Value:
    flat: list[Value] = []
    for value in values:
        flat.extend(value.parts if value.kind == "list" else [value])
    return Value("list", tuple(flat[:MAX_PARTS]))


def _union(text: str, depth: int) -> Value | None:
    if "\\cup" not in text:
        return None
    parts = _split(text, lambda s, i: 4 if s.startswith("\\cup", i) else 0)
    if len(parts) < 2:
        return None
    return Value("union", tuple(parse_value(part, depth + 1) for part in parts))


def _membership(text: str, depth: int) -> Value | None:
    hit = _MEMBERSHIP.match(text)
    return parse_value(text[hit.end() :], depth + 1) if hit else None


def _related(text: str, depth: int) -> Value | None:
    signs: list[str] = []

    def sign_at(s: str, i: int) -> int:
        hit = _RELATION.match(s, i)
        if hit is None:
            return 0
        signs.append(hit.group())
        return len(hit.group())

    sides = _split(text, sign_at)
    if len(sides) < 2 or len(sides) > 5 or any(not side.strip() for side in sides):
        return None
    values = tuple(parse_value(side, depth + 1) for side in sides)
    return Value("relation", values, text=" ".join(signs))


def _bracketed(text: str, depth: int) -> Value | None:
    text = text.replace("\\langle", "(").replace("\\rangle", ")")
    if text[0] not in "([" or text[-1] not in ")]" or _closes_early(text):
        return None
    parts = _split(text[1:-1], _is_comma)
    if len(parts) < 2:
        return None
    values = tuple(parse_value(part, depth + 1) for part in parts[:MAX_PARTS])
    return Value("tuple", values, text=text[0] + text[-1])


def _plus_minus(text: str, depth: int) -> Value | None:
    if "\\pm" not in text and "\\mp" not in text:
        return None
    if text.count("\\pm") + text.count("\\mp") > 4:
        return None
    upper = text.replace("\\pm", "+").replace("\\mp", "-")
    lower = text.replace("\\pm", "-").replace("\\mp", "+")
    values = [parse_value(upper, depth + 1), parse_value(lower, depth + 1)]
    return None if any(value.kind == "text" for value in values) else _list(values)


def _scalar(text: str, depth: int) -> Value | None:
    try:
        return Value("scalar", node=parse_expression(text))
    except ParseError:
        return None


def _counted(text: str, depth: int) -> Value | None:
    """A number with plain words behind it ("5 apples", "12 cm^2", "3 m/s")."""
    hit = _UNIT_TAIL.fullmatch(text)
    if hit is None or depth > 0:
        return None
    words = [re.sub(r"[\^0-9{}.]", "", word) for word in _UNIT_SPLIT.split(hit.group("tail"))]
    units = all(word in _UNITS for word in words)
    plain = all(word.islower() and len(word) > 2 and word not in _NOT_UNITS for word in words)
    if not units and not (plain and hit.group("gap") and len(words) <= 4):
        return None
    return _scalar(hit.group("rest"), depth)


# First reading that applies; commas bind weaker than relation signs, those weaker than brackets.
_ATTEMPTS: tuple[Callable[[str, int], Value | None], ...] = (
    _matrix,
    _based,
    _braced,
    _listed,
    _membership,
    _related,
    _union,
    _bracketed,
    _plus_minus,
    _scalar,
    _counted,
)


def _is_comma(text: str, at: int) -> int:
    return 1 if text[at] in ",;" else 0


def _split(text: str, separator: Callable[[str, int], int]) -> list[str]:
    """Splits at separators outside brackets, matrices and text spans."""
    parts: list[str] = []
    level = start = at = 0
    while at < len(text):
        char = text[at]
        if text.startswith("\\begin", at):
            level += 1
        elif text.startswith("\\end", at):
            level -= 1
        elif char in _OPENERS:
            level += 1
        elif char in _CLOSERS:
            level -= 1
        elif level == 0 and (width := separator(text, at)):
            parts.append(text[start:at])
            at += width
            start = at
            continue
        at += 1
    return [*parts, text[start:]]


def _closes_early(text: str) -> bool:
    """Tells whether the first bracket is closed before the end of the text."""
    level = 0
    for at, char in enumerate(text):
        if char in _OPENERS:
            level += 1
        elif char in _CLOSERS:
            level -= 1
            if level == 0 and at < len(text) - 1:
                return True
    return False
