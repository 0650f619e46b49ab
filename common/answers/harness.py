"""The two scores of the lm-evaluation-harness task `gsm8k`, for comparison with published tables.

strict-match takes the first number behind `#### `; flexible-extract the last number-like group
anywhere. Both are compared as strings after commas, dollar signs, everything up to the last `#### `
and a final full stop are removed. They are cruder than our own graders (`18.0` is not `18`).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(re.compile(p) for p in (",", r"\$", r"(?s).*#### ", r"\.$"))
_INVALID = "[invalid]"


class HarnessScores(NamedTuple):
    """Shares of right answers, in [0, 1]."""

    strict_match: float
    flexible_extract: float


def strict_match(prediction: str, gold: str) -> bool:
    """Whether the first `#### number` of a prediction is that of the gold answer."""
    found = _STRICT.findall(prediction)
    return _plain(found[0] if found else _INVALID) == _plain(gold)


def flexible_extract(prediction: str, gold: str) -> bool:
    """Whether the last number-like group of a prediction is the gold answer's number."""
    groups = [next(group for group in match if group) for match in _FLEXIBLE.findall(prediction)]
    return _plain(groups[-1].strip() if groups else _INVALID) == _plain(gold)


def harness_scores(predictions: Sequence[str], golds: Sequence[str]) -> HarnessScores:
    """Both scores over a set; golds end in `#### number`. At least one pair."""
    pairs = list(zip(predictions, golds, strict=True))
    return HarnessScores(
        sum(strict_match(*pair) for pair in pairs) / len(pairs),
        sum(flexible_extract(*pair) for pair in pairs) / len(pairs),
    )


def _plain(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()
