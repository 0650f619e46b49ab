r"""The MATH verifier as published, kept for parity with old numbers. For grading workers only.

Its arithmetic is the original's; its way to it is not: where the original evaluated model text as
a Python expression, `common.answers.sympy_reader` walks the syntax tree. SymPy can still run for
ever.
"""

import functools
from collections.abc import Callable
from typing import Any

import sympy

from common.answers.paper_parsers import AUTO_ORDER, missing_reason, parser_name
from common.answers.paper_text import plain_answer
from common.answers.sympy_reader import read_sympy

_TOLERANCE = 1e-4


def prepare() -> None:
    """Makes the first real pair as fast as later ones."""
    paper_score("x+1", "1+x", "strict", "sympy")


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
    answer, truth = plain_answer(prediction), plain_answer(gold)
    agreed = _agreement(parser_name(parser), answer, truth)
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


@functools.lru_cache(maxsize=1024)
def _agreement(parser: str, answer: str, truth: str) -> bool | None:
    """Whether the difference of two answers is zero; None where one of them does not parse."""
    read = _reader(parser)
    left, right = _parsed(read, answer), _parsed(read, truth)
    if left is None or right is None:
        return None
    return _difference_is_zero(left, right)


def _difference_is_zero(left: Any, right: Any) -> bool | None:
    try:
        return bool(sympy.simplify(left - right) == 0)
    except Exception:  # tuples, booleans and relations have no difference
        return None


def _parsed(read: Callable[[str], Any], text: str) -> Any:
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
    readers = [_reader(part) for part in AUTO_ORDER if not missing_reason(part)]
    return functools.partial(_first_success, readers)


def _first_success(readers: list[Callable[[str], Any]], text: str) -> Any:
    for read in readers:
        try:
            return read(text)
        except Exception:  # the next parser may read it
            continue
    raise ValueError(text)
