r"""The MATH verifier as published, kept for parity with old numbers.

Its arithmetic is the original's; its way to it is not: where the original evaluated model text as
a Python expression, `common.answers.sympy_reader` walks the syntax tree. SymPy can still run for
ever, so `paper_score` belongs in a grading worker.
"""

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from typing import Any

from common.errors import UserError

PAPER_GRADER = "common.answers.paper_math:paper_score"
PARSERS = ("sympy", "latex2sympy2", "sympy_latex", "extended", "auto")
_ALIASES = {"latex": "sympy_latex", "deepseek": "auto"}
_AUTO_ORDER = ("latex2sympy2", "sympy_latex", "sympy")
_ANTLR = "antlr4-python3-runtime"
_ESCAPED_BOX = re.compile(r"\\\\boxed\{([^}]*)\}")
_TOLERANCE = 1e-4


def parser_name(parser: str) -> str:
    """The canonical name of a parser.

    Raises:
        UserError: the parser is unknown.
    """
    name = _ALIASES.get(parser, parser)
    if name not in PARSERS:
        known = ", ".join((*PARSERS, *_ALIASES))
        raise UserError(f"unknown MATH parser {parser!r}; set eval.math_parser to one of {known}")
    return name


@functools.cache
def missing_parsers(parser: str) -> tuple[str, ...]:
    """Why parts of a parser cannot be used here, one line each.

    Args:
        parser: a name of `PARSERS` or an alias; "auto" has three parts.

    Returns:
        Nothing if all of it is there.

    Raises:
        UserError: the parser is unknown.
    """
    name = parser_name(parser)
    names = _AUTO_ORDER if name == "auto" else (name,)
    return tuple(reason for reason in map(_missing, names) if reason)


def check_parser(parser: str) -> None:
    """Makes sure that a parser can be used.

    Raises:
        UserError: it is unknown or not installed; for "auto", if none of its parts is.
    """
    reasons = missing_parsers(parser)
    if reasons and len(reasons) == (len(_AUTO_ORDER) if parser_name(parser) == "auto" else 1):
        raise UserError("; ".join(reasons))


def _missing(name: str) -> str:
    if importlib.util.find_spec("sympy") is None:
        return f"MATH parser {name} needs the package sympy: pip install sympy"
    antlr = _version(_ANTLR)
    if name == "latex2sympy2":
        if importlib.util.find_spec("latex2sympy2") is None:
            return (
                "MATH parser latex2sympy2 is not installed: pip install latex2sympy2==1.9.1 in an "
                f"environment of its own (it needs {_ANTLR}==4.7.2), or use the parser extended"
            )
        if antlr is None or antlr > (4, 9):
            return f"MATH parser latex2sympy2 does not load beside {_ANTLR} > 4.9: install 4.7.2"
    if name == "sympy_latex" and (antlr is None or antlr[:2] != (4, 11)):
        return f"MATH parser sympy_latex needs {_ANTLR} 4.11: pip install {_ANTLR}==4.11.0"
    if name == "extended" and importlib.util.find_spec("latex2sympy2_extended") is None:
        return "MATH parser extended is not installed: pip install latex2sympy2-extended"
    return ""


def _version(package: str) -> tuple[int, ...] | None:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in version.split(".")[:2])


def paper_answer(text: str) -> str:
    r"""Finds the answer of a text as published (paper verifier, MATH extraction).

    A box counts if it is written with two backslashes, or if the text ends in its brace; otherwise
    all of the text is the answer.
    """
    text = text.strip()
    box = _ESCAPED_BOX.search(text)
    if box is not None:
        text = box.group(1)
    elif text.endswith("}") and "\\boxed" in text:
        text = text.rpartition("\\boxed")[2].strip("{}")
    return text


def paper_score(prediction: str, gold: str, mode: str, parser: str) -> float:
    """Scores one pair by the published rules. May run for ever: call it in a worker only.

    Args:
        prediction, gold: texts.
        mode: "strict" or "shaped".
        parser: a name of `PARSERS` or an alias.

    Returns:
        1 if both parse and their difference simplifies to zero or if both are floats closer than
        1e-4; else strict: equality of the texts; shaped: 0.1 where one contains the other, 0.05 for
        any prediction.
    """
    answer, truth = _plain(paper_answer(prediction)), _plain(paper_answer(gold))
    read = _reader(parser_name(parser))
    left, right = _parsed(read, answer), _parsed(read, truth)
    if left is not None and right is not None:
        agreed = _difference_is_zero(left, right)
        if agreed is not None:
            return float(agreed)
    first, second = _float(answer), _float(truth)
    if first is not None and second is not None:
        return float(abs(first - second) < _TOLERANCE)
    if mode == "strict":
        return float(answer == truth)
    if answer and truth and (answer in truth or truth in answer):
        return 0.1
    return 0.05 if answer else 0.0


def _plain(text: str) -> str:
    return text.replace("$", "").replace("\\\\", "\\").strip()


def _difference_is_zero(left: Any, right: Any) -> bool | None:
    import sympy

    try:
        return bool(sympy.simplify(left - right) == 0)
    except Exception:  # tuples, booleans and relations have no difference
        return None


def _parsed(read: Callable[[str], Any], text: str) -> Any:
    import sympy

    try:
        return sympy.simplify(read(text))
    except Exception:  # each parser raises what its generated code raises
        return None


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _reader(name: str) -> Callable[[str], Any]:
    if name == "sympy":
        from common.answers.sympy_reader import read_sympy

        return read_sympy
    if name == "latex2sympy2":
        from latex2sympy2 import latex2sympy

        return latex2sympy
    if name == "sympy_latex":
        from sympy.parsing.latex import parse_latex

        return parse_latex
    if name == "extended":
        from latex2sympy2_extended import latex2sympy as extended

        return extended
    readers = [_reader(part) for part in _AUTO_ORDER if not _missing(part)]
    return functools.partial(_first_success, readers)


def _first_success(readers: list[Callable[[str], Any]], text: str) -> Any:
    for read in readers:
        try:
            return read(text)
        except Exception:  # the next parser may read it
            continue
    raise ValueError(text)
