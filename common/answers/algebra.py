"""Computer algebra of MATH grading. For grading workers only: SymPy may run for ever.

`sympy_algebra` decides the pairs that numbers cannot; `grade_math` is the grading function of a
pool whose workers may use it in place.
"""

import functools
import re
from typing import Any

import sympy

from common.answers import mathematics
from common.answers.expressions import Node
from common.answers.math_equal import Match, equal
from common.answers.math_values import Value, readings
from common.answers.symbolic import DIFFERENT, EQUAL, UNDECIDED

# A package of its own, and the only way to sums and integrals: without it they stay undecided.
try:
    from latex2sympy2_extended import latex2sympy
except ImportError:
    latex2sympy = None

MAX_EXPONENT = 10_000
_SAFE_TEXT = re.compile(r"[A-Za-z0-9\\{}^_+\-*/=().,<>|!\[\] ]*")
_SAME_NAMES = "sin cos tan cot sec csc sinh cosh tanh"


def prepare() -> None:
    """Makes the first real pair as fast as later ones."""
    algebra_score("0.1428571428571428571", "\\frac17")
    algebra_score("\\sum_{k=1}^{2} k", "3")


def grade_math(prediction: str | None, gold: str | None, **options: Any) -> float:
    """`common.answers.grade_math` with computer algebra in this process."""
    return mathematics.grade_math(prediction, gold, isolated=True, **options)


def algebra_score(first: str, second: str) -> float:
    """Grading function of the worker: 1 equal, 0 different, 0.5 undecided."""
    match = equal(readings(first), readings(second), sympy_algebra)
    return {Match.EQUAL: EQUAL, Match.DIFFERENT: DIFFERENT}.get(match, UNDECIDED)


def sympy_algebra(first: Value, second: Value) -> Match:
    """Compares two values by SymPy. May run for ever: call it in a worker only.

    Args:
        first, second: scalars, or texts in LaTeX that need sums, products, limits or integrals.

    Returns:
        EQUAL if the difference simplifies to zero, DIFFERENT if it is another number or SymPy
        disproves it, else UNKNOWN.
    """
    a, b = _expression(first), _expression(second)
    if a is None or b is None:
        return Match.UNKNOWN
    difference = sympy.simplify(a - b)
    if difference == 0:
        return Match.EQUAL
    if difference.is_number and difference.is_finite:
        # 50 digits: enough to tell a long decimal from an irrational number.
        return Match.DIFFERENT if abs(sympy.N(difference, 50)) > 1e-40 else Match.UNKNOWN
    answer = difference.equals(0)
    return Match.UNKNOWN if answer is None else Match.EQUAL if answer else Match.DIFFERENT


def _expression(value: Value) -> Any:
    """A value as a SymPy expression, None where it has no such form."""
    if value.kind == "scalar" and value.node is not None:
        return _of_node(value.node)
    if value.kind != "text" or not _SAFE_TEXT.fullmatch(value.text):
        return None
    if latex2sympy is None:
        return None
    try:
        expression = latex2sympy(value.text)
    except Exception:  # the parser raises whatever its generated code raises
        return None
    return expression.doit() if hasattr(expression, "doit") else None


@functools.cache
def _functions() -> dict[str, Any]:
    return {
        "add": lambda a, b: a + b,
        "neg": lambda a: -a,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "root": lambda n, a: sympy.real_root(a, n) if a.is_negative else sympy.root(a, n),
        "abs": sympy.Abs,
        "fact": sympy.factorial,
        "binom": sympy.binomial,
        "lfloor": sympy.floor,
        "lceil": sympy.ceiling,
        "arcsin": sympy.asin,
        "arccos": sympy.acos,
        "arctan": sympy.atan,
        "ln": sympy.log,
        "lg": lambda a: sympy.log(a, 10),
        "log": lambda *v: sympy.log(v[0], 10) if len(v) == 1 else sympy.log(v[1], v[0]),
        "exp": sympy.exp,
        "pi": sympy.pi,
        "e": sympy.E,
        "i": sympy.I,
        "oo": sympy.oo,
        **{name: getattr(sympy, name) for name in _SAME_NAMES.split()},
    }


def _of_node(node: Node) -> Any:
    if node.op == "num":
        fraction: Any = node.value
        return sympy.Rational(fraction.numerator, fraction.denominator)
    if node.op == "var":
        return sympy.Symbol(str(node.value))
    if node.op == "const":
        return _functions()[str(node.value)]
    parts = [_of_node(part) for part in node.args]
    if any(part is None for part in parts):
        return None
    if node.op == "pow":
        base, exponent = parts
        if exponent.is_number and not abs(exponent) <= MAX_EXPONENT:
            return None
        return base**exponent
    if node.op in ("fact", "binom") and any(p.is_number and p > MAX_EXPONENT for p in parts):
        return None
    return _functions()[node.op](*parts)
