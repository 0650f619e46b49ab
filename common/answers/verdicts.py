"""What graders return."""

from typing import NamedTuple


class Verdict(NamedTuple):
    """One graded answer.

    Attributes:
        pred: the answer that was read from the response; None where there is none.
        gold: the reference answer; None where the reference states none.
        correct: whether they agree.
        error: None, or why there was nothing to compare ("no_answer", "ambiguous", "unclosed_box",
            "no_gold") or no decision ("timeout", "crash", "undecided", or a missing package).
    """

    pred: str | None
    gold: str | None
    correct: bool
    error: str | None = None
