"""Parsers of the published MATH verifier: which there are, and which work here."""

import functools
import importlib.metadata
import importlib.util
import logging

from common.errors import UserError

PARSERS = ("sympy", "latex2sympy2", "sympy_latex", "extended", "auto")
_ALIASES = {"latex": "sympy_latex", "deepseek": "auto"}
AUTO_ORDER = ("latex2sympy2", "sympy_latex", "sympy")
_ANTLR = "antlr4-python3-runtime"


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
    names = AUTO_ORDER if name == "auto" else (name,)
    return tuple(reason for reason in map(missing_reason, names) if reason)


def check_parser(parser: str) -> None:
    """Makes sure that a parser can be used.

    Raises:
        UserError: it is unknown or not installed; for "auto", if none of its parts is.
    """
    reasons = missing_parsers(parser)
    if reasons and len(reasons) == (len(AUTO_ORDER) if parser_name(parser) == "auto" else 1):
        raise UserError("; ".join(reasons))
    _warn(reasons)


@functools.cache
def _warn(reasons: tuple[str, ...]) -> None:
    """Says once which parts of "auto" are left out."""
    for reason in reasons:
        logging.getLogger(__name__).warning("%s; auto goes on without it", reason)


def missing_reason(name: str) -> str:
    """Why one parser cannot be used here; nothing if it can."""
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
