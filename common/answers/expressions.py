r"""A bounded recursive-descent parser for the mathematics people write in answers.

Read are LaTeX and plain notation alike: numbers, single-letter and Greek variables (with
subscripts), + - * / ^ !, implicit products, `\frac`, `\sqrt`, n-th roots, `\binom`, logarithms
with a base, trigonometric functions, absolute values, floors and ceilings, pi, e, i, infinity. An
integer directly before a proper fraction is a mixed number. Words do not parse: "tea" is no
product.
"""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_TOKENS = 300
MAX_DEPTH = 80  # of the parser's own recursion; a bracket takes three
MAX_NUMBER_DIGITS = 400


class Node(NamedTuple):
    """One node of an expression tree.

    Attributes:
        op: "num", "var", "const", "neg", "add", "mul", "div", "pow", "fact" or a function's name.
        args: the operands.
        value: the exact number of a "num", the name of a "var" or "const".
    """

    op: str
    args: tuple["Node", ...] = ()
    value: Fraction | str | None = None


class ParseError(ValueError):
    """The text is no expression of this grammar."""


_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z.]))?"
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>{_NUMBER})|(?P<command>\\[A-Za-z]+)|(?P<word>[A-Za-z]+)"
    r"|(?P<sign>\*\*|[-+*/^!_(){}\[\]|']))"
)

_GREEK_TEXT = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi "
    "Omega ell"
)
GREEK = frozenset(_GREEK_TEXT.split())
_FUNCTIONS_TEXT = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp"
FUNCTIONS = frozenset(_FUNCTIONS_TEXT.split())
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_CONSTANTS = {"pi": "pi", "infty": "oo", "infinity": "oo"}
_PRODUCT_SIGNS = frozenset(["*", "\\cdot", "\\times", "\\ast"])
_QUOTIENT_SIGNS = frozenset(["/", "\\div"])
_PLAIN_WORDS = FUNCTIONS | {"sqrt", "pi", "infinity"}
# Two-letter words that are answers of their own and no products of variables.
_SHORT_WORDS_TEXT = "am as at be by do if in is it no of on or pm so to up us we"
_SHORT_WORDS = frozenset(_SHORT_WORDS_TEXT.split())
_CLOSERS = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_END = ""


def parse_expression(text: str) -> Node:
    """Parses one expression.

    Args:
        text: normalised text (see `common.answers.math_text`), without relation signs.

    Returns:
        The tree.

    Raises:
        ParseError: the text is no expression, or it is larger than the bounds of this module.
    """
    return _Parser(_tokens(text)).parse()


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position = 0
    end = len(text.rstrip())
    while position < end:
        hit = _TOKEN.match(text, position)
        if hit is None or len(tokens) >= MAX_TOKENS:
            raise ParseError
        position = hit.end()
        word = hit.group("word")
        if word is None:
            tokens.append(hit.group("number") or hit.group("command") or hit.group("sign"))
        else:
            tokens.extend(_letters(word))
    return tokens


def _letters(word: str) -> list[str]:
    """Splits a run of letters into variables; a known word becomes its command."""
    if word in _PLAIN_WORDS:
        return [f"\\{word}"]
    if len(word) > 2 or word.lower() in _SHORT_WORDS:
        raise ParseError
    return list(word)


def _number(text: str) -> Node:
    if len(text) > MAX_NUMBER_DIGITS:
        raise ParseError
    return Node("num", value=Fraction(text.removesuffix(".")))


def _is_integer(node: Node) -> bool:
    return node.op == "num" and isinstance(node.value, Fraction) and node.value.denominator == 1


def _is_proper_fraction(node: Node) -> bool:
    if node.op != "div" or not all(_is_integer(part) for part in node.args):
        return False
    top, bottom = (part.value for part in node.args)
    return isinstance(top, Fraction) and isinstance(bottom, Fraction) and 0 < top < bottom


class _Parser:
    """Recursive descent over a token list."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = [*tokens, _END]
        self.at = 0
        self.depth = 0
        self.open_bars = 0

    def parse(self) -> Node:
        node = self.sum()
        if self.tokens[self.at] != _END:
            raise ParseError
        return node

    def peek(self) -> str:
        return self.tokens[self.at]

    def take(self) -> str:
        token = self.tokens[self.at]
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise ParseError

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError
        node = self.term()
        while self.peek() in ("+", "-"):
            sign = self.take()
            right = self.term()
            node = Node("add", (node, right if sign == "+" else Node("neg", (right,))))
        self.depth -= 1
        return node

    def term(self) -> Node:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        node = self.factor()
        after_number = _is_integer(node)
        while True:
            token = self.peek()
            if token in _PRODUCT_SIGNS:
                self.take()
                node = Node("mul", (node, self.signed_factor()))
                after_number = False
            elif token in _QUOTIENT_SIGNS:
                self.take()
                node = Node("div", (node, self.signed_factor()))
                after_number = False
            elif self.starts_factor(token):
                node = self.implicit(node, after_number)
                after_number = False
            else:
                return Node("neg", (node,)) if negative else node

    def implicit(self, node: Node, after_number: bool) -> Node:
        """A product without a sign, or a mixed number."""
        literal = self.peek()[0].isdigit() or self.peek()[0] == "."
        right = self.factor()
        if literal:
            # "3 1/2": two numbers side by side mean nothing else.
            if not after_number or not _is_integer(right) or self.peek() != "/":
                raise ParseError
            self.take()
            right = Node("div", (right, self.factor()))
            if not _is_proper_fraction(right):
                raise ParseError
        if after_number and _is_proper_fraction(right):
            return Node("add", (node, right))
        return Node("mul", (node, right))

    def starts_factor(self, token: str) -> bool:
        if token == "|":
            return self.open_bars == 0
        if token in ("(", "[", "{") or token[:1].isalnum() or token[:1] == ".":
            return True
        return token.startswith("\\") and token not in ("\\rfloor", "\\rceil", "\\rvert")

    def signed_factor(self) -> Node:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        node = self.factor()
        return Node("neg", (node,)) if negative else node

    def factor(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError
        node = self.postfix(self.base())
        self.depth -= 1
        return node

    def postfix(self, node: Node) -> Node:
        node = self.factorial(node)
        if self.peek() in ("^", "**"):
            self.take()
            node = self.factorial(Node("pow", (node, self.exponent())))
        return node

    def factorial(self, node: Node) -> Node:
        if self.peek() != "!":
            return node
        self.take()
        # "3!!" is another function than (3!)!.
        if self.peek() == "!":
            raise ParseError
        return Node("fact", (node,))

    def exponent(self) -> Node:
        if self.peek() in ("+", "-"):
            return self.signed_factor()
        # Right associative through `factor`: 2^3^2 = 2^9.
        return self.factor()

    def base(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError
        node = self.atom()
        self.depth -= 1
        return node

    def atom(self) -> Node:
        token = self.take()
        if token == _END:
            raise ParseError
        if token[0].isdigit() or token[0] == ".":
            return _number(token)
        if token in _CLOSERS:
            bars, self.open_bars = self.open_bars, 0
            node = self.sum()
            self.expect(_CLOSERS[token])
            self.open_bars = bars
            return Node(token[1:], (node,)) if token.startswith("\\") else node
        if token in ("|", "\\lvert"):
            self.open_bars += 1
            node = self.sum()
            self.expect("|" if token == "|" else "\\rvert")
            self.open_bars -= 1
            return Node("abs", (node,))
        if token.startswith("\\"):
            return self.command(token[1:])
        if token.isalpha():
            return self.variable(token)
        raise ParseError

    def variable(self, name: str) -> Node:
        if name in ("i", "e") and self.peek() != "_":
            return Node("const", value=name)
        if self.peek() == "_":
            self.take()
            name = f"{name}_{self.subscript()}"
        while self.peek() == "'":
            name += self.take()
        return Node("var", value=name)

    def subscript(self) -> str:
        token = self.take()
        if token == "{":
            parts = []
            while self.peek() not in ("}", _END):
                parts.append(self.take())
            self.expect("}")
            return "".join(parts)
        if token == _END or not (token[0].isalnum() or token.startswith("\\")):
            raise ParseError
        return token

    def argument(self) -> Node:
        r"""One TeX argument: a group, or a single digit or letter (`\frac12`)."""
        token = self.peek()
        if token == "{":
            return self.base()
        if token[:1].isdigit():
            if token.isdigit() and len(token) > 1:
                self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
            return _number(self.take())
        return self.base()

    def command(self, name: str) -> Node:
        if name in _CONSTANTS:
            return Node("const", value=_CONSTANTS[name])
        if name in GREEK:
            return self.variable(f"\\{name}")
        if name == "frac":
            return Node("div", (self.argument(), self.argument()))
        if name == "binom":
            return Node("binom", (self.argument(), self.argument()))
        if name == "sqrt":
            return self.root()
        if name == "abs":
            return Node("abs", (self.base(),))
        if name in FUNCTIONS:
            return self.function(name)
        raise ParseError

    def root(self) -> Node:
        if self.peek() == "[":
            self.take()
            index = self.sum()
            self.expect("]")
            return Node("root", (index, self.argument()))
        return Node("root", (Node("num", value=Fraction(2)), self.argument()))

    def function(self, name: str) -> Node:
        base: Node | None = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.argument()
        power: Node | None = None
        if self.peek() == "^":
            self.take()
            power = self.signed_factor()
        if power == Node("neg", (Node("num", value=Fraction(1)),)) and name in _INVERSE:
            name, power = _INVERSE[name], None
        argument = self.function_argument()
        node = Node(name, (argument,) if base is None else (base, argument))
        return node if power is None else Node("pow", (node, power))

    def function_argument(self) -> Node:
        """What a function without parentheses takes: a product up to the next function or sign."""
        if self.peek() in ("(", "[", "{"):
            return self.postfix(self.base())
        negative = self.peek() == "-"
        if negative:
            self.take()
        node = self.factor()
        while True:
            token = self.peek()
            if token[1:] in FUNCTIONS and token.startswith("\\"):
                break
            if token == "/":
                self.take()
                node = Node("div", (node, self.factor()))
            elif token in ("(", "[") or token == "|" or not self.starts_factor(token):
                break
            else:
                node = Node("mul", (node, self.factor()))
        return Node("neg", (node,)) if negative else node
