"""Key tokens of a prompt: numbers, units, operator words and symbols (host side, once a prompt)."""

import re
from collections.abc import Sequence

import numpy as np

_UNITS = (
    *("dollars?", "usd", "cents?", "kg", "kilograms?", "g", "grams?", "meters?", "cm", "mm", "km"),
    *("hours?", "minutes?", "seconds?", "percent", "percentage", "each", "per", "rate"),
)
_OPERATOR_WORDS = (
    *("sum", "difference", "product", "ratio", "times", "total", "plus", "minus"),
    *("divide", "divided", "equal", "equals"),
)
_LATEX = r"\\(?:frac|sqrt|boxed|log|sin|cos|tan|cdot|times|div|le|ge)"

_NUMBER_BODY = r"(?<![\w.])[+-]?(?:\d+\.\d+|\d+|\d+/\d+)%?(?!\w)"
_NUMBER = re.compile(_NUMBER_BODY + r"(?!\.)")
_NUMBER_OR_SENTENCE_END = re.compile(_NUMBER_BODY + r"(?!\.(?!\s|$))")
_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    *(("unit", re.compile(rf"\b{word}\b", re.IGNORECASE)) for word in _UNITS),
    *(("operator_word", re.compile(rf"\b{word}\b", re.IGNORECASE)) for word in _OPERATOR_WORDS),
    ("latex", re.compile(_LATEX)),
    ("operator_symbol", re.compile(r"[+*/=<>&^_-]")),
    ("latex_delim", re.compile(r"\$\$|\$")),
)
_BLANKLESS = re.compile(r"\S+")


def key_spans(text: str, *, sentence_final_numbers: bool = False) -> list[tuple[int, int, str]]:
    """Character spans that make a token a key token (key tokens of the prompt, spec 3.5).

    Args:
        text: raw prompt text.
        sentence_final_numbers: also take numbers followed by "." and then a blank or the end.

    Returns:
        (start, end, kind) in the order of the rules.
    """
    numbers = _NUMBER_OR_SENTENCE_END if sentence_final_numbers else _NUMBER
    rules = (("number", numbers), *_RULES)
    return [(*match.span(), kind) for kind, rule in rules for match in rule.finditer(text)]


def whitespace_offsets(text: str) -> list[tuple[int, int]]:
    """Runs of non-blanks: the tokens of a text whose tokenizer gives no offsets."""
    return [match.span() for match in _BLANKLESS.finditer(text)]


def key_mask(
    text: str,
    offsets: Sequence[Sequence[int]] | None = None,
    *,
    length: int | None = None,
    sentence_final_numbers: bool = False,
) -> np.ndarray:
    """Marks the tokens whose character range overlaps a key span.

    Args:
        text: raw prompt text.
        offsets: (start, end) per token; None = runs of non-blanks.
        length: cut or pad (with False) to this many tokens.
        sentence_final_numbers: see `key_spans`.

    Returns:
        [number of tokens or length] bool.
    """
    if offsets is None:
        offsets = whitespace_offsets(text)
    inside = np.zeros(len(text) + 1, np.int64)
    for start, end, _ in key_spans(text, sentence_final_numbers=sentence_final_numbers):
        inside[start:end] = 1
    before = np.concatenate([[0], np.cumsum(inside)])
    mask = np.asarray([before[end] > before[start] for start, end in offsets], bool)
    if length is not None:
        mask = np.pad(mask[:length], (0, max(0, length - len(mask))))
    return mask
