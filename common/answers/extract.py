"""Text clean-up, answer markers and exact number literals shared by the graders."""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

MARKER = "####"

# Bounds on what one number literal may expand to; beyond them the literal is no number. They keep
# every comparison cheap whatever a model writes ("9^9^9", a million digits, "1e999999999").
MAX_DIGITS = 400
MAX_DECIMAL_EXPONENT = 400
MAX_POWER = 400

_SPECIAL_TOKEN = re.compile(r"<\|[^<>|\n]*\|>")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_MINUS_SIGNS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789"
)
_SUPERSCRIPT_RUN = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_VULGAR_AFTER_DIGIT = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])")

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_UNBRACED = re.compile(r"[^\s{}$]+")
# An escaped brace is text, and so is the second backslash of a line break.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LATEX_FRACTION = re.compile(
    r"\\[dt]?frac\s*\{\s*([0-9]+(?:\.[0-9]+)?)\s*\}\s*\{\s*([0-9]+(?:\.[0-9]+)?)\s*\}"
)
_LATEX_SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9]{3}(?![0-9]))")

# Three-digit groups only: "1,2" and "1,2345" are lists, "1,200" is one number. Their count is
# bounded to keep the scan linear. An exponent must not run into a word ("3em").
_UNSIGNED = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3}){1,60}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_FACTOR = (
    rf"(?:{_UNSIGNED})(?:[eE][+-]?[0-9]+(?!\w))?"
    r"(?:(?:\^|\*\*)(?:[+-]?[0-9]+(?!\.?[0-9])|\{[+-]?[0-9]+\}))?"
)
_NUMBER = re.compile(
    rf"""
    (?P<clock> [0-9]{{1,2}}:[0-9]{{2}} (?: :[0-9]{{2}} )? (?![0-9:]) )
    | (?P<sign> (?<![\w.)\]}}]) [+-] (?: \\?[$\u20ac\u00a3\u00a5\u20b9] )? )?
      (?:
        (?P<whole> [0-9]+ ) [ ]+ (?P<top> [0-9]+ ) / (?P<bottom> [0-9]+ ) (?! [0-9./^] )
        | (?P<first> {_FACTOR} ) (?P<rest> (?: / (?: {_FACTOR} ) )* )
      )
    """,
    re.VERBOSE,
)
_CLOSES = re.compile(r"[\w.)\]}]")
_FACTOR_PARTS = re.compile(
    r"(?P<base>[0-9,]*(?:\.[0-9]+)?)(?:[eE](?P<exponent>[+-]?[0-9]+))?"
    r"(?:(?:\^|\*\*)\{?(?P<power>[+-]?[0-9]+)\}?)?"
)


class Literal(NamedTuple):
    """One number literal of a text.

    Attributes:
        value: the exact value.
        start: offset of its first character (its sign, if it has one).
        end: offset after its last character.
    """

    value: Fraction
    start: int
    end: int


def clean_text(text: str) -> str:
    """Removes what is notation and not content from a text.

    Unicode compatibility forms become plain ones (full-width digits, no-break spaces, "1/2" as one
    character, superscript powers), typographic minus signs become "-", special tokens `<|..|>` and
    calculator annotations `<<..>>` are dropped (robust verifier, text rule).

    Args:
        text: any text.

    Returns:
        The cleaned text, outer blanks removed.
    """
    # Compatibility forms would glue these to the digit before them: "2½" -> "21/2", "2³" -> "23".
    text = _VULGAR_AFTER_DIGIT.sub(" ", text)
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^" + run.group().translate(_SUPERSCRIPTS), text)
    text = unicodedata.normalize("NFKC", text).translate(_MINUS_SIGNS).replace("\u2044", "/")
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(char, char)) for char in text)
    # A blank where a digit stands before: dropping must not glue two numbers together.
    text = _SPECIAL_TOKEN.sub(" ", text)
    return _ANNOTATION.sub(lambda hit: " " if _before(text, hit).isdigit() else "", text).strip()


def after_marker(text: str) -> str | None:
    """Returns what follows the last `####`, or None where there is no marker."""
    head, marker, tail = text.rpartition(MARKER)
    return tail if marker else None


def last_box(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{..}` or `\fbox{..}` with balanced braces.

    Without braces (`\boxed 7`) the content is the next run of non-blanks, as TeX reads a command
    with one argument that people do not delimit.

    Args:
        text: any text.

    Returns:
        The content without its braces; None where there is no complete box.
    """
    closing = _closing_braces(text)
    for hit in reversed(list(_BOX.finditer(text))):
        if text[hit.end() : hit.end() + 1] != "{":
            run = _UNBRACED.match(text, hit.end())
            if run:
                return run.group()
        elif hit.end() in closing:
            return text[hit.end() + 1 : closing[hit.end()]]
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """Maps the offset of every brace that is closed to the offset of its partner."""
    # One pass with a stack: counting anew from each box would take quadratic time on hostile text.
    open_at: list[int] = []
    pairs: dict[int, int] = {}
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            open_at.append(brace.start())
        elif brace.group() == "}" and open_at:
            pairs[open_at.pop()] = brace.start()
    return pairs


def numbers(text: str) -> Iterator[Literal]:
    r"""Yields the number literals of a cleaned text from left to right.

    Read are signs (not after a word character, dot or closing bracket, where "-" is binary),
    thousands groups of three, leading-dot decimals, exponents, `a^b`, `a/b`, mixed numbers
    "2 1/2", and `\frac{a}{b}` of literals. Currency and percent signs are ignored. Not numbers:
    clock times, chains `a/b/c`, division by zero, exponents of symbols ("m^2"), and literals
    beyond the size bounds of this module.

    Args:
        text: a text that went through `clean_text`.

    Yields:
        Literals; offsets refer to the text after its LaTeX fractions became `a/b`.
    """
    text = plain_fractions(text)
    position = 0
    while hit := _NUMBER.search(text, position):
        position = hit.end()
        if hit.group("clock") or _in_power(text, hit):
            continue
        if hit.group("whole") is not None:
            value = _mixed(hit)
            if value is None:
                # "2 10/5" is no mixed number but two numbers: read the second one by itself.
                position = hit.end("whole")
                value = _factor(hit.group("whole"))
        else:
            value = _quotient(hit, glued=bool(_CLOSES.match(_before(text, hit))))
        if value is not None:
            negative = (hit.group("sign") or "").startswith("-")
            yield Literal(-value if negative else value, hit.start(), position)


def plain_fractions(text: str) -> str:
    r"""Rewrites `\frac{1}{2}` as `1/2` and LaTeX thousands separators as nothing."""
    if "\\" not in text and "{" not in text:
        return text
    text = _LATEX_SEPARATOR.sub("", text)
    # "2\frac{1}{2}" is the mixed number 2 1/2, not 21/2.
    return _LATEX_FRACTION.sub(
        lambda hit: " " * _before(text, hit).isdigit() + "/".join(hit.groups()), text
    )


def _before(text: str, hit: re.Match[str]) -> str:
    """Returns the character before a match, empty at the start of the text."""
    return text[max(hit.start() - 1, 0) : hit.start()]


def _in_power(text: str, hit: re.Match[str]) -> bool:
    """Tells whether a literal is part of a power that is not one of literals ("m^2", "5^x")."""
    before = text[max(hit.start() - 2, 0) : hit.start()]
    return before.endswith(("^", "^{", "^(")) or text.startswith("^", hit.end())


def _mixed(hit: re.Match[str]) -> Fraction | None:
    whole, top, bottom = (_integer(hit.group(part)) for part in ("whole", "top", "bottom"))
    if whole is None or top is None or not bottom or top >= bottom:
        return None
    return whole + Fraction(top, bottom)


def _quotient(hit: re.Match[str], glued: bool) -> Fraction | None:
    first = hit.group("first")
    # ".5" directly after a word ends a sentence ("day.5 apples"): the dot is no decimal point.
    value = _factor(first[1:] if first.startswith(".") and glued else first)
    divisors = [_factor(part) for part in hit.group("rest").split("/")[1:]]
    if value is None or len(divisors) > 1:
        return None
    if not divisors:
        return value
    return value / divisors[0] if divisors[0] else None


def _factor(text: str) -> Fraction | None:
    """Evaluates an unsigned literal with its exponent and power; None beyond the size bounds."""
    parts = _FACTOR_PARTS.fullmatch(text)
    if parts is None:
        return None
    base = parts.group("base").replace(",", "")
    exponent = _integer(parts.group("exponent") or "0")
    power = _integer(parts.group("power") or "1")
    if len(base) > MAX_DIGITS or exponent is None or power is None:
        return None
    if abs(exponent) > MAX_DECIMAL_EXPONENT or abs(power) > MAX_POWER:
        return None
    value = Fraction(base) * Fraction(10) ** exponent
    if power == 1:
        return value
    size = max(value.numerator.bit_length(), value.denominator.bit_length())
    if size * abs(power) > 4 * MAX_DIGITS or (power < 0 and value == 0):
        return None
    return value**power


def _integer(digits: str) -> int | None:
    return int(digits) if len(digits) <= MAX_DIGITS else None
