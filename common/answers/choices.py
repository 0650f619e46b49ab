"""Strict reading of multiple-choice letters and of yes/no answers from one span of text."""

import re

from common.answers.extract import clean_text

AMBIGUOUS = "ambiguous"
LETTERS = "ABCDE"
_MAX_NESTING = 4  # of text commands

_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed|fbox)\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"[*_`$]|\\[()\[\]]")
_BARE = re.compile(r"[\[(]?\s*([A-Ea-e1-5])\s*[\])]?\s*[.:;,!]?")
_LED = re.compile(r"(?:\(([A-Ea-e])\)|\[([A-Ea-e])\]|([A-E])\s*[.:),\-])")
_STATED = re.compile(
    r"\b(?:answer|option|choice)\s*(?:is|:|=)\s*:?\s*(?:option|choice)?\s*"
    r"(?:\(([A-Ea-e])\)|([A-E])\b(?!\s+[a-z])|([A-Eb-e])\b(?=\s*(?:[.,;:!)]|$))|([B-E])\b)",
    re.IGNORECASE,
)
_NAMED = re.compile(r"\b(?:option|choice|answer)\s*\(?([A-Ea-e])\)?(?![A-Za-z'])", re.IGNORECASE)
_CAPITAL = re.compile(r"(?<![A-Za-z'])([A-E])(?![A-Za-z'])")
_ARTICLE = re.compile(r"(?<![A-Za-z'])A(?=\s+(?!or\b|and\b)[a-z])")
_BOTH = re.compile(r"\byes\s*(?:/|or|\|)\s*no\b|\bno\s*(?:/|or|\|)\s*yes\b", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]+")
_YES_NO = {"yes": "Yes", "true": "Yes", "no": "No", "false": "No"}


def plain(span: str) -> str:
    """A span without mark-up and text commands."""
    text = clean_text(span)
    for _ in range(_MAX_NESTING):
        text = _WRAPPERS.sub(r"\1", text)
    return " ".join(_MARKUP.sub(" ", text).split())


def choice_letter(span: str) -> str | None:
    """The option a span names.

    Tried in this order: the span is `X`, `(X)`, `X.`; it starts with `(X)`, `X:`, `X.`; it says
    `answer|option|choice is X`; it says `option X`; it holds exactly one stand-alone capital. The
    article "A" and letters inside words never count. Digits 1 to 5 stand for A to E.

    Args:
        span: what follows a marker, stands in a box, or is a clause or line.

    Returns:
        "A" to "E"; `AMBIGUOUS` where two options are named; None where none is.
    """
    text = plain(span)
    bare = _BARE.fullmatch(text)
    if bare is not None:
        return letter_of(bare.group(1))
    led = _LED.match(text)
    if led is not None:
        return letter_of(next(filter(None, led.groups())))
    for rule in (_STATED, _NAMED):
        found = {letter_of(next(filter(None, hit.groups()))) for hit in rule.finditer(text)}
        if found:
            return found.pop() if len(found) == 1 else AMBIGUOUS
    capitals = set(_CAPITAL.findall(_ARTICLE.sub("", text)))
    if len(capitals) > 1:
        return AMBIGUOUS
    return capitals.pop() if capitals else None


def letter_of(label: str) -> str | None:
    """A label as a letter: "c" and "3" are "C"; None for what is no label."""
    label = label.strip().upper()
    if label.isdigit():
        number = int(label) if len(label) < 3 else 0
        return LETTERS[number - 1] if 1 <= number <= len(LETTERS) else None
    return label if len(label) == 1 and label in LETTERS else None


def yes_or_no(span: str) -> str | None:
    """What the first word of a span says.

    Args:
        span: as for `choice_letter`.

    Returns:
        "Yes" or "No" ("true" and "false" count), `AMBIGUOUS` for "yes/no", None otherwise.
    """
    text = plain(span)
    if _BOTH.search(text):
        return AMBIGUOUS
    word = _WORD.search(text)
    return _YES_NO.get(word.group().lower()) if word else None
