"""The delimiter automaton against a plain search in the text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.engines.delimiter import build_automaton, find_ends
from common.errors import UserError

PIECES = st.lists(st.binary(max_size=4).map(lambda b: bytes(x % 3 + 97 for x in b)), min_size=1)


def plain_ends(pieces, delimiter):
    """Tokens within which a non-overlapping occurrence of the delimiter ends."""
    text = b"".join(pieces)
    edges = np.cumsum([len(piece) for piece in pieces])
    ends, start = [], 0
    while (found := text.find(delimiter, start)) >= 0:
        start = found + len(delimiter)
        ends.append(int(np.searchsorted(edges, start)))
    return sorted(set(ends))


@given(PIECES, st.text("abc", min_size=1, max_size=5))
def test_equals_string_search(pieces, delimiter):
    """Three letters only, so that delimiters overlap themselves and straddle tokens."""
    automaton = build_automaton(pieces, delimiter)
    assert find_ends(automaton, [range(len(pieces))]) == [plain_ends(pieces, delimiter.encode())]


@given(st.lists(st.binary(max_size=3), min_size=1, max_size=20), st.binary(min_size=1, max_size=2))
def test_random_bytes(pieces, delimiter):
    """Bytes that are no text at all; the delimiter is compared as bytes."""
    text = delimiter.decode("latin-1")
    encoded = [piece.decode("latin-1").encode() for piece in pieces]
    found = find_ends(build_automaton(encoded, text), [range(len(pieces))])
    assert found == [plain_ends(encoded, text.encode())]


def test_rows_of_different_lengths():
    automaton = build_automaton([b"x", b"\n", b"\n\n", b"\n\n\n"], "\n\n", vocab_size=6)
    rows = [[1, 1, 0, 2], [], [3, 1], [5, 1, 5, 1]]
    assert find_ends(automaton, rows) == [[1, 3], [], [0, 1], [3]]
    assert automaton.next.shape == (6, 2)


def test_refusals():
    with pytest.raises(UserError, match="empty"):
        build_automaton([b"x"], "")
    with pytest.raises(UserError, match="belong"):
        build_automaton([b"x", b"y"], "x", vocab_size=1)
