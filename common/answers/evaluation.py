"""Values of expression trees: exact rationals where there are any, else numbers at fixed points."""

import cmath
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from common.answers.expressions import Node

MAX_BITS = 1 << 16  # of an exact numerator or denominator
MAX_COUNT = 1000  # argument of exact factorials and binomials
MAX_FACTORIAL = 170  # the largest in double precision

Numeric = complex


class TooLarge(ArithmeticError):
    """The value exceeds the bounds of this module."""


def exact_value(node: Node) -> Fraction | None:
    """The value of an expression without variables where it is rational.

    Args:
        node: an expression tree.

    Returns:
        The value; None where it is not (known to be) rational, or undefined.

    Raises:
        TooLarge: an intermediate result exceeds `MAX_BITS`.
    """
    if node.op == "num":
        return node.value if isinstance(node.value, Fraction) else None
    if node.op in ("var", "const"):
        return None
    values = []
    for part in node.args:
        value = exact_value(part)
        if value is None:
            return None
        values.append(value)
    result = _exact(node.op, values)
    if result is not None and _bits(result) > MAX_BITS:
        raise TooLarge
    return result


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _exact(op: str, values: list[Fraction]) -> Fraction | None:
    first = values[0]
    if op == "neg":
        return -first
    if op == "add":
        return first + values[1]
    if op == "mul":
        return first * values[1]
    if op == "div":
        return first / values[1] if values[1] else None
    if op == "pow":
        return _exact_power(first, values[1])
    if op == "root":
        return _exact_root(values[1], first)
    if op == "abs":
        return abs(first)
    if op == "lfloor":
        return Fraction(math.floor(first))
    if op == "lceil":
        return Fraction(math.ceil(first))
    if op in ("fact", "binom"):
        return _exact_count(op, values)
    return None


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        root = _exact_root(base, Fraction(exponent.denominator))
        return None if root is None else _exact_power(root, Fraction(exponent.numerator))
    if base == 0 and exponent <= 0:
        return None
    # The result has at most |base| * |exponent| bits; +-1 stay small whatever the exponent.
    if abs(base) != 1 and _bits(base) * abs(exponent) > 2 * MAX_BITS:
        raise TooLarge
    if abs(base) == 1:
        return base if exponent.numerator % 2 else Fraction(1)
    return base**exponent.numerator


def _exact_root(value: Fraction, index: Fraction) -> Fraction | None:
    if index.denominator != 1 or not 2 <= index <= 64 or value < 0:
        return None
    top = _integer_root(value.numerator, int(index))
    bottom = _integer_root(value.denominator, int(index))
    return None if top is None or bottom is None else Fraction(top, bottom)


def _integer_root(value: int, index: int) -> int | None:
    """The root of a non-negative integer where it is an integer."""
    if index == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    if value < 2:
        return value
    if value.bit_length() > 900:
        return None
    guess = round(value ** (1.0 / index))
    return next((r for r in (guess - 1, guess, guess + 1) if r**index == value), None)


def _exact_count(op: str, values: list[Fraction]) -> Fraction | None:
    if any(value.denominator != 1 or value < 0 for value in values):
        return None
    if any(value > MAX_COUNT for value in values):
        raise TooLarge
    numbers = [int(value) for value in values]
    return Fraction(math.factorial(numbers[0]) if op == "fact" else math.comb(*numbers))


def variables(node: Node) -> frozenset[str]:
    """Names of the variables of an expression."""
    if node.op == "var":
        return frozenset([str(node.value)])
    names: frozenset[str] = frozenset()
    for part in node.args:
        names |= variables(part)
    return names


def numeric_value(node: Node, point: Mapping[str, complex]) -> Numeric:
    """The value of an expression at one point, in double precision.

    Args:
        node: an expression tree.
        point: a value for every variable.

    Returns:
        The value; infinities are allowed.

    Raises:
        TooLarge: a result overflows.
        ArithmeticError: the expression is undefined there.
        ValueError: likewise.
    """
    if node.op == "num":
        assert isinstance(node.value, Fraction)
        try:
            return complex(float(node.value))
        except OverflowError as error:
            raise TooLarge from error
    if node.op == "var":
        return point[str(node.value)]
    if node.op == "const":
        return _CONSTANTS[str(node.value)]
    values = [numeric_value(part, point) for part in node.args]
    try:
        return _NUMERIC[node.op](*values)
    except OverflowError as error:
        raise TooLarge from error


_CONSTANTS = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j, "oo": complex(math.inf)}


def _add(a: complex, b: complex) -> complex:
    value = a + b
    if cmath.isnan(value):
        # inf + 1 is fine, but the imaginary part of products with infinity is not a number.
        raise ArithmeticError
    return value


def _neg(a: complex) -> complex:
    return complex(-a.real, -a.imag if a.imag else 0.0)


def _mul(a: complex, b: complex) -> complex:
    if cmath.isinf(a) or cmath.isinf(b):
        if a.imag or b.imag or not a.real or not b.real:
            raise ArithmeticError
        return complex(a.real * b.real)
    return a * b


def _div(a: complex, b: complex) -> complex:
    if cmath.isinf(b):
        raise ArithmeticError
    return _mul(a, 1 / b)


def _pow(a: complex, b: complex) -> complex:
    if cmath.isinf(a) or cmath.isinf(b):
        raise ArithmeticError
    if a == 0 and b == 0:
        raise ArithmeticError
    if b.imag == 0 and b.real == int(b.real) and abs(b.real) < 1024:
        return a ** int(b.real)
    return a**b


def _root(index: complex, a: complex) -> complex:
    n = index.real
    if index.imag or n != int(n) or n == 0:
        return _pow(a, 1 / index)
    if a.imag == 0 and a.real < 0 and int(n) % 2:
        # Schoolbook convention: odd roots of negative numbers are real.
        return complex(-((-a.real) ** (1.0 / n)))
    return a ** (1.0 / n) if n != 2 else cmath.sqrt(a)


def _log(*values: complex) -> complex:
    if len(values) == 1:
        return cmath.log10(values[0])
    return cmath.log(values[1]) / cmath.log(values[0])


def _fact(a: complex) -> complex:
    if a.imag or a.real < 0:
        raise ArithmeticError
    if a.real > MAX_FACTORIAL:
        raise TooLarge
    return complex(math.gamma(a.real + 1))


def _binom(n: complex, k: complex) -> complex:
    if n.imag or k.imag or n.real != int(n.real) or k.real != int(k.real) or k.real < 0:
        raise ArithmeticError
    if abs(n.real) > MAX_FACTORIAL:
        raise TooLarge
    return complex(math.comb(int(n.real), int(k.real)))


def _floor(a: complex) -> complex:
    if a.imag:
        raise ArithmeticError
    return complex(math.floor(a.real + 1e-12))


def _ceil(a: complex) -> complex:
    if a.imag:
        raise ArithmeticError
    return complex(math.ceil(a.real - 1e-12))


_NUMERIC: dict[str, Callable[..., complex]] = {
    "add": _add,
    "neg": _neg,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "root": _root,
    "abs": lambda a: complex(abs(a)),
    "fact": _fact,
    "binom": _binom,
    "lfloor": _floor,
    "lceil": _ceil,
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda a: 1 / cmath.tan(a),
    "sec": lambda a: 1 / cmath.cos(a),
    "csc": lambda a: 1 / cmath.sin(a),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "ln": cmath.log,
    "lg": cmath.log10,
    "log": _log,
    "exp": cmath.exp,
}
