r"""The two verifiers of MATH answers: `robust` (typed values) and `paper` (as published).

robust decides nearly every pair by text, exact rationals or agreement at several points; computer
algebra has the last word on the few others, in an isolated process with a time limit.
"""

from common.answers import symbolic
from common.answers.gsm8k import MODES, VERIFIERS
from common.answers.math_equal import Match, equal
from common.answers.math_text import math_answer
from common.answers.math_values import readings
from common.answers.paper_parsers import check_parser
from common.errors import UserError

_PAPER_GRADER = "common.answers.paper_math:paper_score"


class UndecidedError(ArithmeticError):
    """Computer algebra could not tell whether two answers are equal."""


def grade_math(
    prediction: str | None,
    gold: str | None,
    mode: str = "strict",
    verifier: str = "robust",
    parser: str = "sympy",
    isolated: bool = False,
) -> float:
    r"""Scores a prediction against the reference solution of a MATH problem.

    robust pays 1 for equal answers and 0 otherwise in both modes: nearness of expressions has no
    meaning. paper pays, in shaped mode, 0.1 where one text contains the other and 0.05 for any
    text.

    Args:
        prediction: the text of the model; None counts as empty.
        gold: the reference: an answer, or a solution with its box; None (missing) scores 0.
        mode: "strict" or "shaped".
        verifier: "robust" or "paper".
        parser: of the paper verifier (`common.answers.paper_parsers.PARSERS`).
        isolated: this process is a grading worker that may be killed, so computer algebra runs
            here; otherwise it runs in a worker of its own, started when the first pair needs it.

    Returns:
        A score in [0, 1]. Where computer algebra gives no answer in time: 0, counted and logged by
        `common.answers.symbolic`.

    Raises:
        UserError: if `mode`, `verifier` or `parser` is unknown, or the parser is not installed.
        UndecidedError: isolated and computer algebra gives no answer (the pool counts it).
    """
    if verifier not in VERIFIERS:
        raise UserError(f"unknown verifier {verifier!r}; use one of {', '.join(VERIFIERS)}")
    if mode not in MODES:
        raise UserError(f"unknown reward mode {mode!r}; use one of {', '.join(MODES)}")
    if gold is None:
        return 0.0
    if verifier == "paper":
        return _grade_paper(prediction or "", gold, mode, parser, isolated)
    answer, truth = math_answer(prediction or ""), math_answer(gold)
    if not answer.strip() or not truth.strip():
        return 0.0
    match, reason = equal_answers(answer, truth, isolated)
    if match is Match.UNKNOWN and isolated:
        raise UndecidedError(reason)
    return float(match is Match.EQUAL)


def equal_answers(first: str, second: str, isolated: bool = False) -> tuple[Match, str | None]:
    """Tells whether two answer parts state the same answer.

    Args:
        first, second: answers without the text around them.
        isolated: as for `grade_math`.

    Returns:
        The outcome, and why it is UNKNOWN ("timeout", "crash", "undecided").
    """
    left, right = readings(first), readings(second)
    match = equal(left, right)
    if match is not Match.UNKNOWN:
        return match, None
    if not isolated:
        return symbolic.decide(first, second)
    # SymPy belongs in workers only.
    from common.answers.algebra import sympy_algebra

    match = equal(left, right, sympy_algebra)
    return match, "undecided" if match is Match.UNKNOWN else None


def _grade_paper(prediction: str, gold: str, mode: str, parser: str, isolated: bool) -> float:
    check_parser(parser)
    if isolated:
        from common.answers.paper_math import paper_score

        return paper_score(prediction, gold, mode, parser)
    options = {"mode": mode, "parser": parser}
    score, reason = symbolic.isolated_score(_PAPER_GRADER, prediction, gold, options)
    if reason is not None:
        symbolic.report(reason, prediction, gold)
    return score
