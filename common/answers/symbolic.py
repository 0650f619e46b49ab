"""Computer algebra for the few MATH pairs that numbers cannot decide, in a process that may die.

`sympy_algebra` runs SymPy and must only be called in a process that can be killed: a worker of a
`GradingPool`. `decide` sends a pair to such a worker of its own, which starts on first use.
"""

import collections
import functools
import logging
import re
import threading
from typing import Any

from common.answers.expressions import Node
from common.answers.math_equal import Match, equal
from common.answers.math_values import Value, readings
from common.answers.pool import GradingPool

TIME_LIMIT_S = 5.0
MEMORY_LIMIT_MB = 4096
MAX_EXPONENT = 10_000
_SAFE_TEXT = re.compile(r"[A-Za-z0-9\\{}^_+\-*/=().,<>|!\[\] ]*")
_SAME_NAMES = "sin cos tan cot sec csc sinh cosh tanh"
_EQUAL, _DIFFERENT, _UNDECIDED = 1.0, 0.0, 0.5

failures: collections.Counter[str] = collections.Counter()  # of this process: timeout, crash, ...
_lock = threading.Lock()
_pools: dict[tuple[str, float], GradingPool] = {}


def decide(first: str, second: str, time_limit_s: float = TIME_LIMIT_S) -> tuple[Match, str | None]:
    """Decides in an isolated worker whether two answers agree.

    Args:
        first, second: answer parts (`common.answers.math_text.math_answer`).
        time_limit_s: wall-clock limit; the worker that exceeds it is killed and replaced.

    Returns:
        The outcome, UNKNOWN with a reason ("timeout", "crash", "undecided"). Reasons are counted in
        `failures` and logged.
    """
    score, reason = isolated_score(
        "common.answers.symbolic:algebra_score", first, second, {}, time_limit_s
    )
    if reason is None and score == _UNDECIDED:
        reason = "undecided"
    if reason is not None:
        report(reason, first, second)
        return Match.UNKNOWN, reason
    return (Match.EQUAL if score == _EQUAL else Match.DIFFERENT), None


def isolated_score(
    grader: str,
    prediction: str,
    gold: str,
    options: dict[str, Any],
    time_limit_s: float = TIME_LIMIT_S,
) -> tuple[float, str | None]:
    """Runs one grading function on one pair in a worker that is kept for the next pair.

    Args:
        grader: "module:function" as for `GradingPool`.
        prediction, gold, options: its arguments.
        time_limit_s: wall-clock limit of the pair.

    Returns:
        The score, and None or "timeout" or "crash".
    """
    with _lock:
        pool = _pools.get((grader, time_limit_s))
        if pool is None:
            pool = GradingPool(1, time_limit_s, grader, MEMORY_LIMIT_MB)
            _pools[grader, time_limit_s] = pool
    [verdict] = pool.submit([(prediction, gold, options)]).result()
    reason = "timeout" if verdict.timed_out else "crash" if verdict.crashed else None
    return verdict.score, reason


def report(reason: str, first: str, second: str) -> None:
    """Counts and logs a pair that could not be decided."""
    failures[reason] += 1
    logging.getLogger(__name__).warning(
        "grading: %s on %.80r against %.80r; it counts as wrong", reason, first, second
    )


def algebra_score(first: str, second: str) -> float:
    """Grading function of the worker: 1 equal, 0 different, 0.5 undecided."""
    match = equal(readings(first), readings(second), sympy_algebra)
    return {Match.EQUAL: _EQUAL, Match.DIFFERENT: _DIFFERENT}.get(match, _UNDECIDED)


def sympy_algebra(first: Value, second: Value) -> Match:
    """Compares two values by SymPy. May run for ever: call it in a worker only.

    Args:
        first, second: scalars, or texts in LaTeX that need sums, products, limits or integrals.

    Returns:
        EQUAL if the difference simplifies to zero, DIFFERENT if it is another number or SymPy
        disproves it, else UNKNOWN.
    """
    import sympy

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
    # A package of its own, and the only way to sums and integrals: without it they stay undecided.
    try:
        from latex2sympy2_extended import latex2sympy
    except ImportError:
        return None
    try:
        expression = latex2sympy(value.text)
    except Exception:  # the parser raises whatever its generated code raises
        return None
    return expression.doit() if hasattr(expression, "doit") else None


@functools.cache
def _functions() -> dict[str, Any]:
    import sympy as sp

    return {
        "add": lambda a, b: a + b,
        "neg": lambda a: -a,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "root": lambda n, a: sp.real_root(a, n) if a.is_negative else sp.root(a, n),
        "abs": sp.Abs,
        "fact": sp.factorial,
        "binom": sp.binomial,
        "lfloor": sp.floor,
        "lceil": sp.ceiling,
        "arcsin": sp.asin,
        "arccos": sp.acos,
        "arctan": sp.atan,
        "ln": sp.log,
        "lg": lambda a: sp.log(a, 10),
        "log": lambda *v: sp.log(v[0], 10) if len(v) == 1 else sp.log(v[1], v[0]),
        "exp": sp.exp,
        "pi": sp.pi,
        "e": sp.E,
        "i": sp.I,
        "oo": sp.oo,
        **{name: getattr(sp, name) for name in _SAME_NAMES.split()},
    }


def _of_node(node: Node) -> Any:
    import sympy

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
