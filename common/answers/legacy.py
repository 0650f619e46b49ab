r"""The lenient rules behind older tables of steering methods, kept so that such tables can be read.

They are known to be wrong in many ways (a box is ignored for competition tasks, "Cannot" reads as
option C, matrices collapse to a word); `common.answers.tasks` holds the rules to use.
"""

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from common.answers.evaluation import TooLarge, exact_value
from common.answers.expressions import Node, ParseError, parse_expression
from common.answers.extract import last_box
from common.answers.math_equal import Match, compare
from common.answers.math_values import Value
from common.answers.verdicts import Verdict

_NUMBER = r"[-+]?[0-9][0-9,]*(?:\.[0-9]+)?"
_MARKED_NUMBER = re.compile(rf"####\s*({_NUMBER})")
_ANY_NUMBER = re.compile(_NUMBER)
_MARKED_LETTER = re.compile(r"####\s*([A-Ea-e])")
_ANY_LETTER = re.compile(r"\b([A-E])\b")
_MARKED_WORD = re.compile(r"####\s*(yes|no)", re.IGNORECASE)
_ANY_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_ANSWER_LINE = re.compile(r"[*\s]*(?:final\s+)?answer\s*:[*\s]*(.*?)[*\s]*", re.IGNORECASE)
_INLINE = re.compile(r"answer\s*(?:is|=|:)\s*(.+)", re.IGNORECASE)
_MAX_EXPONENT = 400
_MAX_SPAN = 400  # characters of an answer; patterns below are not linear in it


def grade_legacy(kind: str, response: str, gold_field: str, from_solution: bool) -> Verdict:
    """Grades by the legacy rules.

    Args:
        kind: "numeric", "math", "choice" or "yes_no".
        response: the text of the model; why it stopped plays no part here.
        gold_field: the reference as its data set stores it.
        from_solution: a numeric reference is a worked solution with a marker.

    Returns:
        The verdict.
    """
    if kind == "numeric":
        pred = _last_number(response)
        gold = _last_number(gold_field) if from_solution else normalize_number(gold_field)
        return Verdict(pred, gold, pred is not None and pred == gold)
    if kind == "choice":
        letter = _last(response, _MARKED_LETTER, _ANY_LETTER)
        label = gold_field.strip().upper()
        return Verdict(
            letter and letter.upper(), label, letter is not None and _same(letter, label)
        )
    if kind == "yes_no":
        word = _last(response, _MARKED_WORD, _ANY_WORD)
        truth = gold_field.strip().capitalize()
        return Verdict(word and word.capitalize(), truth, word is not None and _same(word, truth))
    answer = normalize_math(_math_span(response)) if response.strip() else None
    box = last_box(gold_field)
    reference = None if box is None else normalize_math(box)
    if answer is None or reference is None:
        return Verdict(answer, reference, False)
    return Verdict(answer, reference, _equivalent(answer, reference))


def normalize_number(text: str) -> str:
    """Canonical form of a number string: no commas, plain minus, no trailing zeros.

    Args:
        text: any text.

    Returns:
        The form; text that is no finite decimal comes back stripped.
    """
    plain = text.strip().replace(",", "").replace("\u2212", "-")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return plain
    if not value.is_finite() or abs(value.adjusted()) > _MAX_EXPONENT:
        return plain
    exact = Fraction(value)
    if exact.denominator == 1:
        return str(exact.numerator)
    return f"{value:f}".rstrip("0")


def normalize_label(text: str) -> str:
    """Canonical form of a label: lower case, nothing but letters and digits at its end."""
    return re.sub(r"[\W_]+$", "", text.strip().lower())


def _same(first: str, second: str) -> bool:
    return normalize_label(first) == normalize_label(second)


def _last(text: str, marked: re.Pattern[str], anywhere: re.Pattern[str]) -> str | None:
    for pattern in (marked, anywhere):
        found = pattern.findall(text)
        if found:
            return found[-1]
    return None


def _last_number(text: str) -> str | None:
    found = _last(text, _MARKED_NUMBER, _ANY_NUMBER)
    return None if found is None else normalize_number(found)


def _math_span(text: str) -> str:
    r"""Box; first answer line; last inline "answer is"; marker; last line."""
    box = last_box(text)
    if box is not None:
        return box
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        hit = _ANSWER_LINE.fullmatch(line) if len(line) <= _MAX_SPAN else None
        if hit is not None:
            after = lines[number + 1] if number + 1 < len(lines) else ""
            return hit.group(1) or after
    inline = _INLINE.findall(text)
    if inline:
        return inline[-1]
    marked = _MARKED_NUMBER.findall(text)
    return marked[-1] if marked else lines[-1]


_TEXT = re.compile(r"\\(?:text|textbf|mbox|mathrm)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9])\s*([0-9])")
_ROOT = re.compile(r"\\sqrt\s*\{([^{}]*)\}|\\sqrt\s*([0-9A-Za-z])")
_SIMPLE = re.compile(r"-?\\?[A-Za-z0-9.]+")
_COUNTED = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)\s*[A-Za-z][A-Za-z ]*")
_BARE_LIST = re.compile(r"[\[\]0-9,.\s]*,[\[\]0-9,.\s]*")
_SENTENCE = re.compile(r"[A-Za-z]{5,}.*\s|\s.*[A-Za-z]{5,}", re.DOTALL)
_NOT_PROSE = re.compile(r"\\(?:infty|times|theta|alpha|lambda|right|left)")
_RATIONAL = re.compile(r"[-+]?(?:[0-9]+(?:/[0-9]+)?|[0-9]*\.[0-9]+)")
_ASSIGNMENT = re.compile(r"(?:so|thus|hence|therefore)?\s*[A-Za-z]\s*=(.*)", re.IGNORECASE)


def normalize_math(text: str) -> str:
    r"""The legacy normal form of a MATH answer, its faults included.

    Fractions become `a/b`, roots `sqrt(a)`, plain numbers exact fractions; units behind a number
    go; a list of plain numbers and a sentence keep their last word; braces, backslashes and
    underscores are dropped.
    """
    text = text.strip().strip("$*").strip()
    if len(text) > _MAX_SPAN:
        return text
    text = text.replace("\\$", "").replace("$", "").replace("\\!", "").replace("\\,", " ")
    text = re.sub(r"\\left(?![A-Za-z])|\\right(?![A-Za-z])", "", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\%|%", "", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("{,}", ",")
    text = re.sub(r"\s*degrees?$", "", _TEXT.sub(r"\1", text).rstrip(".").strip())
    if " and " in text:
        text = text.split(" and ", 1)[0].strip()
    counted = _COUNTED.fullmatch(text)
    if counted is not None and " or " not in text and re.search(r"[A-Za-z]{2}|\s", text):
        text = counted.group(1)
    if _BARE_LIST.fullmatch(text):
        groups = re.findall(r"[0-9.]+", text)
        text = groups[-1] if groups else text
    elif _SENTENCE.search(_NOT_PROSE.sub("", text)):
        text = text.split()[-1]
    assigned = _ASSIGNMENT.fullmatch(text)
    if assigned is not None and assigned.group(1).count("=") == 0:
        text = assigned.group(1)
    return _plain_form(text)


def _plain_form(text: str) -> str:
    text = _SHORT_FRACTION.sub(r"\1/\2", text)
    for _ in range(4):
        text = _ROOT.sub(lambda hit: f"sqrt({hit.group(1) or hit.group(2)})", text)
        text = _FRACTION.sub(lambda hit: "/".join(map(_grouped, hit.groups())), text)
    text = text.replace("\\times", "*").replace("\\cdot", "*").replace("\\pm", "+-")
    text = re.sub(r"(?<=[0-9])_(?=[0-9])", "", text)
    text = re.sub(r"\\(?=[A-Za-z{}])", "", text)
    text = re.sub(r"[{}\s]", "", text)
    if text.isalpha():
        return text.lower()
    if len(text) > 64 or not _RATIONAL.fullmatch(text):
        return text
    try:
        return str(Fraction(text))
    except ZeroDivisionError:
        return text


def _grouped(part: str) -> str:
    part = part.strip()
    return part if _SIMPLE.fullmatch(part) else f"({part})"


def _equivalent(first: str, second: str) -> bool:
    """Equal strings, or equal right sides; lists of comma-separated parts in any order."""
    if first == second:
        return True
    left, right = first.rpartition("=")[2], second.rpartition("=")[2]
    parts, others = left.split(","), right.split(",")
    nodes = [_node(part) for part in parts]
    candidates = [_node(part) for part in others]
    if len(nodes) != len(candidates) or None in nodes or None in candidates:
        return False
    for node in nodes:
        match = next((n for n, other in enumerate(candidates) if _nodes_agree(node, other)), None)
        if match is None:
            return False
        candidates.pop(match)
    return True


def _node(text: str) -> Node | None:
    try:
        return parse_expression(re.sub(r"(?<=[0-9])_(?=[0-9])", "", text))
    except ParseError:
        return None


def _nodes_agree(first: Node | None, second: Node | None) -> bool:
    if first is None or second is None:
        return False
    if first.op == second.op == "var":
        return first == second
    try:
        values = exact_value(first), exact_value(second)
    except TooLarge:
        return False
    if None not in values:
        return values[0] == values[1]
    match = compare(Value("scalar", node=first), Value("scalar", node=second))
    return match is Match.EQUAL
