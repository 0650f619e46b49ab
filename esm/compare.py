"""What a set of answers is like, and how two methods differ on the same questions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.statistics import wilson_interval
from esm.policies import NULL

Rows = Sequence[Mapping[str, Any]]
TRUNCATION_WARNING = 0.2


def diagnose(method: str, rows: Rows) -> dict[str, Any]:
    """Accuracy, lengths and cost of one method.

    Args:
        method: its name in the table.
        rows: of `per_example.jsonl`; those without `budget_used` have no overhead.
    """
    tokens = [row["tokens_used"] for row in rows]
    budgets = [row["budget_used"] for row in rows if "budget_used" in row]
    overhead = [row["budget_used"] - row["tokens_used"] for row in rows if "budget_used" in row]
    steps = [step for row in rows for step in row.get("steps", ())]
    tools = sum(step["chosen"] != NULL for step in steps)
    correct = sum(bool(row["correct"]) for row in rows)
    low, high = wilson_interval(correct, len(rows))
    return {
        "method": method,
        "n": len(rows),
        "acc": _mean([bool(row["correct"]) for row in rows]),
        "pred_none_rate": _mean([row["pred"] is None for row in rows]),
        "hash_rate": _mean(["####" in row["text"] for row in rows]),
        "trunc_rate": _mean([row["finish_reason"] == "length" for row in rows]),
        "tokens_mean": _mean(tokens),
        "tokens_p50": _percentile(tokens, 50),
        "tokens_p90": _percentile(tokens, 90),
        "tokens_max": max(tokens, default=0),
        "budget_mean": _mean(budgets),
        "overhead_mean": _mean(overhead),
        "overhead_p90": _percentile(overhead, 90),
        "overhead_max": max(overhead, default=0),
        "null_step_rate": (len(steps) - tools) / len(steps) if steps else 0.0,
        "tool_step_rate": tools / len(steps) if steps else 0.0,
        "acc_low": low if rows else 0.0,
        "acc_high": high if rows else 0.0,
        "prefill_mean": _mean([row["prefill_tokens"] for row in rows if "prefill_tokens" in row]),
        "positions_mean": _mean(
            [row["forward_positions"] for row in rows if "forward_positions" in row]
        ),
    }


def compare(greedy: Rows, steered: Rows, max_tokens: int, resamples: int = 2000) -> dict[str, Any]:
    """The two methods on the questions both answered; means over nothing are 0.

    Args:
        greedy: rows of greedy decoding.
        steered: rows of the method.
        max_tokens: T, for the table.
        resamples: of the bootstrap.
    """
    pairs = common_rows(greedy, steered)
    right_a = [bool(a["correct"]) for a, _ in pairs]
    right_b = [bool(b["correct"]) for _, b in pairs]
    diff = [b["tokens_used"] - a["tokens_used"] for a, b in pairs]
    outcome = list(zip(right_a, right_b, strict=True))
    count = len(pairs)
    win, lose = outcome.count((False, True)), outcome.count((True, False))
    hard = [i for i in range(count) if not right_a[i]]
    budgets = [b["budget_used"] for _, b in pairs if "budget_used" in b]
    overhead = [b["budget_used"] - b["tokens_used"] for _, b in pairs if "budget_used" in b]
    low, high = paired_interval(right_a, right_b, resamples)
    tokens_low, tokens_high = bootstrap_interval(np.asarray(diff, np.float64), resamples)

    def diff_where(wanted: tuple[bool, bool]) -> float:
        return _mean([d for d, pair in zip(diff, outcome, strict=True) if pair == wanted])

    return {
        "T_max": max_tokens,
        "n": count,
        "acc_greedy": _mean(right_a),
        "acc_esm": _mean(right_b),
        "acc_diff": _mean(right_b) - _mean(right_a),
        "win": win,
        "lose": lose,
        "both_correct": outcome.count((True, True)),
        "both_wrong": outcome.count((False, False)),
        "win_rate": win / count if count else 0.0,
        "lose_rate": lose / count if count else 0.0,
        "net_win": win - lose,
        "tokens_greedy_mean": _mean([a["tokens_used"] for a, _ in pairs]),
        "tokens_esm_mean": _mean([b["tokens_used"] for _, b in pairs]),
        "tokens_diff_mean": _mean(diff),
        "tokens_diff_mean_on_win": diff_where((False, True)),
        "tokens_diff_mean_on_lose": diff_where((True, False)),
        "hard_n": len(hard),
        "acc_esm_on_hard": _mean([right_b[i] for i in hard]),
        "tokens_diff_mean_on_hard": _mean([diff[i] for i in hard]),
        "esm_budget_mean": _mean(budgets),
        "esm_overhead_mean": _mean(overhead),
        "acc_diff_low": low,
        "acc_diff_high": high,
        "mcnemar_p": mcnemar(win, lose),
        "tokens_diff_low": tokens_low,
        "tokens_diff_high": tokens_high,
    }


def common_rows(first: Rows, second: Rows) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Rows of the questions in both, in the order of the first."""
    other = {row["example_id"]: row for row in second}
    return [(row, other[row["example_id"]]) for row in first if row["example_id"] in other]


def paired_interval(
    first: Sequence[bool], second: Sequence[bool], resamples: int
) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same questions."""
    diff = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    return bootstrap_interval(diff, resamples)


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a mean: questions are drawn again with replacement."""
    if len(values) == 0:
        return 0.0, 0.0
    rng = np.random.default_rng(seed)
    means = np.asarray(
        [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mcnemar(win: int, lose: int) -> float:
    """Two-sided exact p that wins and losses are equally likely."""
    total = win + lose
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(min(win, lose) + 1))
    # Whole numbers until the last division: 2^-n underflows for many questions.
    return min(1.0, 2 * tail / (1 << total)) if total < 1000 else _normal_p(win, lose)


def _normal_p(win: int, lose: int) -> float:
    """The same with the normal approximation, for a thousand discordant pairs and more."""
    z = max(0.0, abs(win - lose) - 1) / math.sqrt(win + lose)
    return math.erfc(z / math.sqrt(2))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _percentile(values: Sequence[float], q: float) -> int:
    """Linear percentile, cut to a whole number of tokens."""
    return int(np.percentile(values, q)) if len(values) else 0
