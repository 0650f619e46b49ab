"""SymPy's reading of Python-like text without its call of `eval`.

SymPy turns text into Python source and evaluates that. Here the source is made in the same way,
but its syntax tree is walked: names of mathematical objects, calls of mathematical functions,
operators, comparisons and literals; no attributes, subscripts, keywords, or other names. Text
inside text ("len('abc')") stays text, or is read by the same walker where a function takes an
expression.
"""

import ast
import functools
import operator
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 60

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
# Functions of SymPy that are not classes, and built-ins that compute from literals.
_FUNCTION_NAMES = (
    "sqrt cbrt root real_root simplify expand factor cancel together apart diff integrate limit "
    "summation product gcd lcm binomial factorint Matrix"
)
_BUILTINS = {"abs": abs, "len": len, "round": round, "sum": sum, "pow": pow, "divmod": divmod}
_NAMES_OF_TEXT = ("Symbol", "Function", "Integer", "Float", "Rational", "Dummy", "Wild")


def read_sympy(text: str) -> Any:
    """Reads a text as `sympy.sympify` does.

    Args:
        text: any text.

    Returns:
        A SymPy object, or a number, tuple, list or set of them.

    Raises:
        Exception: the text has no such reading (syntax, an unknown construct, or whatever SymPy
            raises while it builds the object).
    """
    from sympy import sympify
    from sympy.parsing.sympy_parser import convert_xor, standard_transformations, stringify_expr

    source = stringify_expr(
        text.strip().replace("\n", ""), {}, _namespace(), (*standard_transformations, convert_xor)
    )
    value = _walk(ast.parse(source.strip(), mode="eval").body, 0)
    if isinstance(value, str):
        raise ValueError(text)
    return sympify(value)


@functools.cache
def _namespace() -> dict[str, Any]:
    """What SymPy's parser knows when it decides which names are symbols."""
    import builtins
    import types

    import sympy

    names = {name: getattr(sympy, name) for name in sympy.__all__}
    for name, value in vars(builtins).items():
        if isinstance(value, types.BuiltinFunctionType):
            names[name] = value
    return names | {"max": sympy.Max, "min": sympy.Min}


@functools.cache
def _callables() -> dict[str, Any]:
    """Names that may be called."""
    import sympy

    namespace = _namespace()
    allowed = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, type) and issubclass(value, (sympy.Basic, sympy.Function))
    }
    allowed |= {name: namespace[name] for name in _FUNCTION_NAMES.split() if name in namespace}
    return allowed | _BUILTINS | {"Float": sympy.Float}


def _walk(node: ast.AST, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    below = depth + 1
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool)):
        return node.value
    if isinstance(node, ast.Name):
        return _name(node.id)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left, below), _value(node.right, below))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, below))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left, right = _value(node.left, below), _value(node.comparators[0], below)
        return _COMPARE[type(node.ops[0])](left, right)
    if isinstance(node, ast.Tuple):
        return tuple(_value(part, below) for part in node.elts)
    if isinstance(node, ast.List):
        return [_value(part, below) for part in node.elts]
    if isinstance(node, ast.Set):
        return {_value(part, below) for part in node.elts}
    if isinstance(node, ast.Call):
        return _call(node, below)
    raise ValueError(f"{type(node).__name__} has no mathematical reading")


def _name(name: str) -> Any:
    import sympy

    value = _namespace().get(name)
    if isinstance(value, (sympy.Basic, type)):
        return value
    raise ValueError(f"the name {name} has no mathematical reading")


def _value(node: ast.AST, depth: int) -> Any:
    """An operand: text has no place there."""
    value = _walk(node, depth)
    if isinstance(value, str):
        raise ValueError("text is no operand")
    return value


def _call(node: ast.Call, depth: int) -> Any:
    if node.keywords:
        raise ValueError("keyword arguments have no mathematical reading")
    if isinstance(node.func, ast.Call):
        # Function('f')(x): an undefined function that is applied.
        inner = node.func.func
        if not (isinstance(inner, ast.Name) and inner.id == "Function"):
            raise ValueError("only a named function is called")
        function, name = _walk(node.func, depth), ""
    elif isinstance(node.func, ast.Name) and node.func.id in _callables():
        name = node.func.id
        function = _callables()[name]
    else:
        raise ValueError("only a known function is called")
    arguments = [_walk(part, depth) for part in node.args]
    if name not in _NAMES_OF_TEXT and name not in _BUILTINS:
        # SymPy would read text by itself, that is, evaluate it.
        arguments = [read_sympy(a) if isinstance(a, str) else a for a in arguments]
    return function(*arguments)
