r"""Where the answer of a MATH solution stands, and its notation reduced to one form.

Text commands (`\text{..}` and the like) survive normalisation as spans between two private
characters, because what they mean depends on their place: unit, list separator, or the answer.
"""

import re

from common.answers.extract import clean_text, last_box

SPAN_OPEN, SPAN_CLOSE = "\ue000", "\ue001"
SPAN = re.compile(f"{SPAN_OPEN}([^{SPAN_OPEN}{SPAN_CLOSE}]*){SPAN_CLOSE}")

ANSWER_PHRASE = re.compile(
    # Blanks are bounded: runs of them would be tried in every division.
    r"(?:final\s{1,4})?answer\s{0,4}(?:\*\*|__)?\s{0,4}(?:is|=|:)\s{0,4}:?\s{0,9}(?:\*\*|__)?\s{0,9}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n|(?:,\s*|\s)(?:because|since|as we|which|where)\b")
_MATH_OPEN = re.compile(r"\$\$?|\\\(|\\\[")
_LEAD_IN = re.compile(
    r"(?:(?:therefore|thus|then|hence|just|simply|exactly|now|given by|equal to)[ ,]{1,4}){1,3}"
)
_MATH_CLOSE = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}

_SYMBOLS = str.maketrans(
    {
        "\u221e": "\\infty ", "\u03c0": "\\pi ", "\u221a": "\\sqrt ", "\u00d7": "\\times ",
        "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u00f7": "/", "\u2264": "\\le ",
        "\u2265": "\\ge ", "\u2260": "\\ne ", "\u00b1": "\\pm ", "\u222a": "\\cup ",
        "\u2208": "\\in ", "\u03b8": "\\theta ", "\u03b1": "\\alpha ", "\u03b2": "\\beta ",
        "\u03c6": "\\phi ", "\u03bb": "\\lambda ", "\u00b0": "", "\u20ac": "", "\u00a3": "",
        "~": " ", SPAN_OPEN: " ", SPAN_CLOSE: " ",
    }
)  # fmt: skip
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|emph)\s*\{([^{}]*)\}"
)
_UPRIGHT = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bm|operatorname\*?)\s*\{([^{}]*)\}"
)
_BARE_TEXT = re.compile(r"\\(?:rm|bf|it|displaystyle|textstyle|limits|nolimits)\b\s*")
_SIZING = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\s*\.?")
_SPACE = re.compile(r"(?<!\\)\\(?:[,;: ]|q?quad\b|thinspace\b|enspace\b|hspace\*?\{[^{}]*\})")
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|\\?\$")
_DEGREES = re.compile(r"\^\s*(?:\\circ\b|\{\s*\\(?:circ|degree)\s*\})|\\degree\b")
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_RENAMED = {"leq": "le", "geq": "ge", "leqslant": "le", "geqslant": "ge", "neq": "ne", "lt": "<"}
_RENAMED |= {"gt": ">", "lbrace": "{", "rbrace": "}", "vert": "|", "mid": "|", "land": ","}
_COMMAND = re.compile(r"\\(leqslant|geqslant|leq|geq|neq|lbrace|rbrace|lt|gt|vert|mid|land)\b")
_REPEATING = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{?([0-9]+)\}?")
_SPACED_GROUPS = re.compile(r"(?<![0-9.,/_^])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9/])")
_BLANKS = re.compile(r"\s+")
_MARKUP = " \t\n*`"


def math_answer(text: str) -> str:
    r"""Finds the stated answer of a MATH text (robust verifier, MATH extraction).

    The last balanced `\boxed{..}` or `\fbox{..}`; else what follows the last "answer is" or
    "answer:", inside `$...$` if it starts so and to the end of the sentence if not; else all of it.

    Args:
        text: a prediction or a reference.

    Returns:
        The answer part, possibly empty.
    """
    text = clean_text(text)
    box = last_box(text)
    if box is not None:
        return box
    clause = answer_clause(text)
    return text if clause is None else clause


def answer_clause(text: str) -> str | None:
    """What follows the last "answer is/=/:" of a text; None where there is no such phrase."""
    last = None
    for hit in ANSWER_PHRASE.finditer(text):
        last = hit
    return None if last is None else clause_at(text, last.end())


def clause_at(text: str, start: int) -> str:
    """The formula that starts at an offset, or the rest of that sentence."""
    lead = _LEAD_IN.match(text, start)
    opener = _MATH_OPEN.match(text, lead.end() if lead else start)
    if opener is not None:
        end = text.find(_MATH_CLOSE[opener.group()], opener.end())
        if end > 0:
            return text[opener.end() : end]
    stop = _SENTENCE_END.search(text, start)
    return text[start : stop.start() if stop else len(text)].strip(_MARKUP)


def normalize(text: str) -> str:
    """Reduces the notation of an answer to one form (robust verifier, MATH normalisation).

    Args:
        text: the answer part of a text.

    Returns:
        The answer without delimiters, sizing, spacing, percent, currency and degree signs, with
        text commands as spans; commas that group digits stay (`common.answers.math_values`).
    """
    text = clean_text(text).translate(_SYMBOLS)
    if "\\begin" not in text:
        # "\\frac" from a text that was escaped twice; in a matrix it would be a line break.
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    if "\\" in text:
        text = _latex(text)
    text = text.replace("$", "").replace("%", "").replace("{,}", ",")
    text = _SPACED_GROUPS.sub(lambda hit: hit.group().replace(" ", ""), _BLANKS.sub(" ", text))
    text = text.strip(_MARKUP)
    return text[:-1].rstrip() if text.endswith(".") else text


def _latex(text: str) -> str:
    text = _TEXT.sub(f"{SPAN_OPEN}\\1{SPAN_CLOSE}", text)
    text = _UPRIGHT.sub(_upright, text)
    text = _BARE_TEXT.sub(" ", text)
    text = _SIZING.sub("", text).replace("\\!", "").replace("\\%", "")
    text = _DELIMITER.sub("", text)
    text = _SPACE.sub(" ", text)
    text = _DEGREES.sub("", text)
    text = _FRACTION.sub(r"\\frac", text)
    text = _COMMAND.sub(_rename, text)
    return _REPEATING.sub(_repeating, text)


def _rename(hit: re.Match[str]) -> str:
    name = _RENAMED[hit.group(1)]
    if name in "{}":
        return f"\\{name}"
    return f"\\{name} " if name.isalpha() else name


def _upright(hit: re.Match[str]) -> str:
    name = hit.group(1).strip()
    if "operatorname" in hit.group() and name.isalpha():
        return f"\\{name} "
    return name if len(name) < 2 or "\\" in name else f"{SPAN_OPEN}{name}{SPAN_CLOSE}"


def _repeating(hit: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as a fraction: (16 - 1) / 90."""
    whole, start, period = hit.groups()
    if len(whole) + len(start) + len(period) > 40:
        return hit.group()
    top = int(f"{whole}{start}{period}") - int(f"{whole}{start}" or "0")
    return f"({top}/{'9' * len(period)}{'0' * len(start)})"
