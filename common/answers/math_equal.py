"""Equality of typed MATH values without computer algebra; what it cannot decide it says."""

import cmath
import enum
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from common.answers.evaluation import TooLarge, exact_value, numeric_value, variables
from common.answers.expressions import Node
from common.answers.math_values import Value

MAX_VARIABLES = 8
_CLOSE = 1e-9
_TINY = 1e-13
# A rational with a denominator beyond this was written as a long decimal: agreement to nine digits
# with an irrational number proves nothing then.
_SHORT_DENOMINATOR = 10**6
# What programs print where there is no value.
_NO_ANSWERS = frozenset(["nan", "inf", "none", "null"])


class Match(enum.Enum):
    """Outcome of a comparison."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNKNOWN = "unknown"  # needs computer algebra


_MAX_FORMULA = 200
_ALGEBRAIC = ("\\int", "\\sum", "\\prod", "\\lim")
_FORMULA = re.compile(r"[A-Za-z0-9\\{}^_+\-*/=().,<>|!\[\] ]+")

# Points of evaluation: positive reals, complex numbers near them, one negative real. The angles of
# a few factors do not add up to pi, so identities of positive numbers hold there.
_BASES = (
    complex(0.7368062997280773),
    complex(1.618033988749895),
    complex(1.1447298858494, 0.2720196495140),
    complex(0.4812118250596, -0.1931471805599),
    complex(2.3025850929940, 0.5772156649015),
)
_STEPS = (0.1415926535, 0.3302585093, 0.2214618034, 0.1303352853, 0.4177151059)


Algebra = Callable[[Value, Value], Match]


def undecided(first: Value, second: Value) -> Match:
    """The algebra of a process that has none: leaves open what needs one."""
    return Match.UNKNOWN


def equal(first: Sequence[Value], second: Sequence[Value], algebra: Algebra = undecided) -> Match:
    """Compares all readings of two answers.

    Args:
        first, second: readings (`common.answers.math_values.readings`).
        algebra: decides between two scalars, relations or texts where numbers cannot.

    Returns:
        EQUAL if any pair of readings agrees; UNKNOWN if none does but one could not be decided.
    """
    return _any(compare(a, b, algebra) for a in first for b in second)


def compare(a: Value, b: Value, algebra: Algebra = undecided) -> Match:
    """Compares two values by their types."""
    if a == b and a.kind != "text":
        return Match.EQUAL
    if a.kind == b.kind:
        return _SAME_KIND[a.kind](a, b, algebra)
    return _any(_mixed(x, y, algebra) for x, y in ((a, b), (b, a)))


def _any(matches: Iterable[Match]) -> Match:
    result = Match.DIFFERENT
    for match in matches:
        if match is Match.EQUAL:
            return match
        if match is Match.UNKNOWN:
            result = match
    return result


def _all(matches: Iterable[Match]) -> Match:
    result = Match.EQUAL
    for match in matches:
        if match is Match.DIFFERENT:
            return match
        if match is Match.UNKNOWN:
            result = match
    return result


def _mixed(a: Value, b: Value, algebra: Algebra) -> Match:
    """Values of two kinds that can still state the same answer."""
    if a.kind == "relation":
        assigned = assignment(a)
        if assigned is not None:
            return compare(assigned, b, algebra)
        if b.kind in ("tuple", "union"):
            interval = _interval(a)
            return compare(interval, b, algebra) if interval else Match.DIFFERENT
    if a.kind == "list" and len(a.parts) == 1:
        return compare(a.parts[0], b, algebra)
    if a.kind == "text" and _needs_algebra(a.text) and b.kind in ("scalar", "text"):
        return algebra(a, b)
    return Match.DIFFERENT


def assignment(value: Value) -> Value | None:
    """The last side of `v = ...` where v is one variable, f(x) or a number; None otherwise."""
    left = value.parts[0].node
    if left is None or set(value.text.split()) != {"="}:
        return None
    right = value.parts[-1]
    if right.node is not None and right.node.op == "var" and not variables(left):
        return value.parts[0]  # "5 = x"
    named = left.op == "var"
    applied = left.op == "mul" and all(part.op == "var" for part in left.args)
    # "f(x)" reads as a product of two variables; a real product "xy = 5" is an equation.
    if applied and left.args[0].value in ("f", "g", "h", "p", "q", "P"):
        named = True
    # "2 + 2 = 4" states a value, "x^2 = 4" does not.
    return right if named or not variables(left) else None


def _interval(value: Value) -> Value | None:
    """A chain of inequalities around one variable as an interval."""
    signs, sides = _ascending(value)
    if signs is None or len(signs) > 2:
        return None
    infinity = Value("scalar", node=Node("const", value="oo"))
    minus = Value("scalar", node=Node("neg", (Node("const", value="oo"),)))
    nodes = [side.node for side in sides]
    if len(signs) == 2 and nodes[1] is not None and nodes[1].op == "var":
        ends, brackets = (sides[0], sides[2]), _open(signs[0]) + _close(signs[1])
    elif len(signs) == 1 and nodes[0] is not None and nodes[0].op == "var":
        ends, brackets = (minus, sides[1]), "(" + _close(signs[0])
    elif len(signs) == 1 and nodes[1] is not None and nodes[1].op == "var":
        ends, brackets = (sides[0], infinity), _open(signs[0]) + ")"
    else:
        return None
    return Value("tuple", ends, text=brackets)


def _open(sign: str) -> str:
    return "(" if sign == "<" else "["


def _close(sign: str) -> str:
    return ")" if sign == "<" else "]"


def _ascending(value: Value) -> tuple[list[str] | None, tuple[Value, ...]]:
    """Signs `<` and `\\le` of a chain of inequalities, turned around if it falls."""
    signs = value.text.split()
    if all(sign in ("<", "\\le") for sign in signs):
        return signs, value.parts
    if all(sign in (">", "\\ge") for sign in signs):
        turned = ["<" if sign == ">" else "\\le" for sign in reversed(signs)]
        return turned, value.parts[::-1]
    return None, value.parts


def _texts(a: Value, b: Value, algebra: Algebra) -> Match:
    first, second = _plain(a.text), _plain(b.text)
    if first and first == second and first not in _NO_ANSWERS:
        return Match.EQUAL
    if _needs_algebra(a.text) or _needs_algebra(b.text):
        return algebra(a, b)
    return Match.DIFFERENT


def _plain(text: str) -> str:
    text = "".join(text.casefold().split())
    if len(text) == 3 and text[0] == "(" and text[2] == ")":
        text = text[1]
    return text.strip(".,;:")


def _needs_algebra(text: str) -> bool:
    """Tells whether a text looks like a sum, product, limit or integral."""
    if len(text) > _MAX_FORMULA or not any(name in text for name in _ALGEBRAIC):
        return False
    return _FORMULA.fullmatch(text) is not None and text.count("{") == text.count("}")


def _tuples(a: Value, b: Value, algebra: Algebra) -> Match:
    if a.text != b.text or len(a.parts) != len(b.parts):
        return Match.DIFFERENT
    return _all(compare(x, y, algebra) for x, y in zip(a.parts, b.parts, strict=True))


def _unordered(a: Value, b: Value, algebra: Algebra) -> Match:
    if len(a.parts) != len(b.parts):
        return Match.DIFFERENT
    left = list(b.parts)
    result = Match.EQUAL
    for part in a.parts:
        matches = [compare(part, other, algebra) for other in left]
        if Match.EQUAL in matches:
            left.pop(matches.index(Match.EQUAL))
        elif Match.UNKNOWN in matches:
            left.pop(matches.index(Match.UNKNOWN))
            result = Match.UNKNOWN
        else:
            return Match.DIFFERENT
    return result


def _bases(a: Value, b: Value, algebra: Algebra) -> Match:
    return Match.EQUAL if a.text == b.text else Match.DIFFERENT


def _relations(a: Value, b: Value, algebra: Algebra) -> Match:
    first, second = assignment(a), assignment(b)
    if (
        first is not None
        and second is not None
        and compare(a.parts[0], b.parts[0], algebra) is Match.EQUAL
    ):
        return compare(first, second, algebra)
    signs, sides = _ascending(a)
    other_signs, other_sides = _ascending(b)
    if signs is not None and signs == other_signs:
        pairs = zip(sides, other_sides, strict=True)
        same = _all(compare(x, y, algebra) for x, y in pairs)
        if same is not Match.DIFFERENT or len(signs) > 1:
            return same
        return _proportional(sides, other_sides, True, algebra)
    if a.text == b.text and len(a.parts) == 2:
        return _proportional(a.parts, b.parts, False, algebra)
    if a.text == b.text and len(a.parts) == len(b.parts):
        return _all(compare(x, y, algebra) for x, y in zip(a.parts, b.parts, strict=True))
    return Match.DIFFERENT


def _proportional(
    a: Sequence[Value], b: Sequence[Value], positive: bool, algebra: Algebra
) -> Match:
    """Same zero set of left - right, up to a nonzero (positive) factor."""
    sides = [value.node for value in (*a, *b)]
    if any(node is None for node in sides):
        return _all(compare(x, y, algebra) for x, y in zip(a, b, strict=True))
    left, right, other_left, other_right = (node for node in sides if node is not None)
    f = Node("add", (left, Node("neg", (right,))))
    g = Node("add", (other_left, Node("neg", (other_right,))))
    names = sorted(variables(f) | variables(g))
    if len(names) > MAX_VARIABLES or not names:
        return Match.DIFFERENT
    ratios = []
    for point in _points(names):
        try:
            ratios.append(numeric_value(f, point) / numeric_value(g, point))
        except (ArithmeticError, ValueError):
            continue
    if len(ratios) < 2:
        return Match.UNKNOWN
    first = ratios[0]
    if not cmath.isfinite(first) or abs(first) < _TINY:
        return Match.DIFFERENT
    if any(abs(ratio - first) > 1e-8 * abs(first) for ratio in ratios):
        return Match.DIFFERENT
    if positive and (abs(first.imag) > 1e-8 * abs(first) or first.real <= 0):
        return Match.DIFFERENT
    return Match.EQUAL


def _points(names: Sequence[str]) -> list[dict[str, complex]]:
    return [
        {name: base + step * index * (1 - 0.25 * index) for index, name in enumerate(names)}
        for base, step in zip(_BASES, _STEPS, strict=True)
    ]


def _scalars(a: Value, b: Value, algebra: Algebra) -> Match:
    assert a.node is not None and b.node is not None
    if _same_letter(a.node, b.node):
        return Match.EQUAL
    try:
        first, second = exact_value(a.node), exact_value(b.node)
    except TooLarge:
        first = second = None
    if first is not None and second is not None:
        return Match.EQUAL if first == second else Match.DIFFERENT
    names = sorted(variables(a.node) | variables(b.node))
    if len(names) > MAX_VARIABLES:
        return algebra(a, b)
    agreed = too_large = 0
    for point in _points(names) if names else [{}]:
        values = [_value_at(node, point) for node in (a.node, b.node)]
        if any(isinstance(value, str) for value in values):
            if values.count("large") == 1:
                # One side is finite or undefined there, the other beyond 1e308.
                return Match.DIFFERENT
            too_large += values.count("large") == 2
            continue
        if not _near(*values):  # type: ignore[arg-type]
            return Match.DIFFERENT
        agreed += 1
    if agreed == 0 or (names and agreed < 2):
        return algebra(a, b) if too_large or agreed else Match.DIFFERENT
    if any(
        value is not None and value.denominator > _SHORT_DENOMINATOR for value in (first, second)
    ):
        return algebra(a, b)
    return Match.EQUAL


def _same_letter(a: Node, b: Node) -> bool:
    """Single letters are choices or names: their case does not matter."""
    names = [str(node.value) for node in (a, b) if node.op == "var"]
    return len(names) == 2 and names[0].lower() == names[1].lower() and len(names[0]) == 1


def _value_at(node: Node, point: dict[str, complex]) -> complex | str:
    try:
        value = numeric_value(node, point)
    except TooLarge:
        return "large"
    except (ArithmeticError, ValueError):
        return "undefined"
    return "undefined" if cmath.isnan(value) else value


def _near(u: complex, v: complex) -> bool:
    if cmath.isinf(u) or cmath.isinf(v):
        return u.real == v.real and u.imag == v.imag
    difference = abs(u - v)
    return difference <= _CLOSE * max(abs(u), abs(v)) or difference < _TINY


_SAME_KIND: dict[str, Callable[[Value, Value, Algebra], Match]] = {
    "scalar": _scalars,
    "tuple": _tuples,
    "matrix": _tuples,
    "list": _unordered,
    "union": _unordered,
    "relation": _relations,
    "base": _bases,
    "text": _texts,
}


def rational(value: Value) -> Fraction | None:
    """The exact value of a scalar without variables where it is rational and small."""
    if value.node is None or value.kind not in ("scalar", "base"):
        return None
    try:
        return exact_value(value.node)
    except TooLarge:
        return None
