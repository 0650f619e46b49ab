"""Pairs that need computer algebra, sent to an isolated worker that starts on first use.

The worker (`common.answers.algebra`, `common.answers.paper_math`) is killed and replaced when a
pair exceeds its time; what could not be decided is counted and logged, never silently wrong.
"""

import collections
import logging
import threading
from typing import Any

from common.answers.math_equal import Match
from common.answers.pool import GradingPool
from common.errors import UserError

TIME_LIMIT_S = 5.0
MEMORY_LIMIT_MB = 4096
EQUAL, DIFFERENT, UNDECIDED = 1.0, 0.0, 0.5  # scores of `common.answers.algebra`
_ALGEBRA = "common.answers.algebra:algebra_score"

failures: collections.Counter[str] = collections.Counter()  # of this process: timeout, crash, ...
_lock = threading.Lock()
_pools: dict[tuple[str, float], GradingPool] = {}


def decide(first: str, second: str, time_limit_s: float = TIME_LIMIT_S) -> tuple[Match, str | None]:
    """Decides in an isolated worker whether two answers agree.

    Args:
        first, second: answer parts (`common.answers.math_text.math_answer`).
        time_limit_s: wall-clock limit; the worker that exceeds it is killed and replaced.

    Returns:
        The outcome, UNKNOWN with a reason ("timeout", "crash", "undecided", or why there is no
        computer algebra). Reasons are counted in `failures` and logged.
    """
    try:
        score, reason = isolated_score(_ALGEBRA, first, second, {}, time_limit_s)
    except UserError as error:  # no SymPy here: this pair has no verdict, others have
        score, reason = UNDECIDED, str(error)
    if reason is None and score == UNDECIDED:
        reason = "undecided"
    if reason is not None:
        report(reason, first, second)
        return Match.UNKNOWN, reason
    return (Match.EQUAL if score == EQUAL else Match.DIFFERENT), None


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
