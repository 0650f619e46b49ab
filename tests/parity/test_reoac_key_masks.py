"""Key tokens of prompts against the recorded spans and masks."""

import json

import numpy as np
import pytest

from reoac_jax.key_tokens import key_mask, key_spans, whitespace_offsets
from tests.parity.fixtures import fixture_root

CASES = [
    case
    for path in sorted((fixture_root() / "reoac").glob("key_masks*.json"))
    for case in json.loads(path.read_text(encoding="utf-8"))["cases"]
]


def test_cases_exist() -> None:
    assert CASES


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_spans_and_masks(case: dict) -> None:
    text = case["text"]
    assert [list(span) for span in key_spans(text)] == case["spans"]
    assert [list(pair) for pair in whitespace_offsets(text)] == case["whitespace_offsets"]
    np.testing.assert_array_equal(key_mask(text), np.asarray(case["whitespace_mask"], bool))
    if "vocab_offsets" in case:
        expected = np.asarray(case["vocab_mask"], bool)
        np.testing.assert_array_equal(key_mask(text, case["vocab_offsets"]), expected)
        padded = key_mask(text, case["vocab_offsets"], length=len(expected) + 3)
        np.testing.assert_array_equal(padded, np.pad(expected, (0, 3)))
