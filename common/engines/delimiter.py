"""Where a delimiter ends in a stream of tokens: its string automaton, lifted from bytes to tokens.

State s of the Knuth-Morris-Pratt automaton = how many bytes of the delimiter the text ends with.
Tables over (token, state) are made once per vocabulary, so that decoding costs one gather per step,
whatever the delimiter and however it is cut into tokens. Occurrences do not overlap and are found
from left to right, as `str.find` finds them; bytes of a token behind the delimiter count towards
the next one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.errors import require


class Automaton(NamedTuple):
    """Tables over V tokens and the n = len(delimiter) states; a text begins in state 0.

    Attributes:
        next: [V, n] int32, state behind the token.
        hit: [V, n] bool, whether the delimiter is completed within the token.
    """

    next: np.ndarray
    hit: np.ndarray


def build_automaton(
    token_bytes: Sequence[bytes], delimiter: str, vocab_size: int | None = None
) -> Automaton:
    """Tables of one vocabulary and delimiter.

    Args:
        token_bytes: What each token adds to the text; b"" for special tokens.
        delimiter: Not empty; compared as UTF-8.
        vocab_size: V where the model has more ids than the tokenizer; the others add nothing.

    Returns:
        The tables.

    Raises:
        UserError: The delimiter is empty, or the model has fewer ids than the tokenizer.
    """
    require(bool(delimiter), "the delimiter is empty: no segment would ever end")
    size = len(token_bytes) if vocab_size is None else vocab_size
    require(
        size >= len(token_bytes),
        f"the tokenizer has {len(token_bytes)} tokens, the model only {size}: "
        "does the tokenizer belong to this model?",
    )
    step, completed = _byte_tables(delimiter.encode())
    lengths = np.zeros(size, np.int64)
    lengths[: len(token_bytes)] = [len(piece) for piece in token_bytes]
    starts = np.cumsum(lengths) - lengths
    state = np.tile(np.arange(step.shape[1], dtype=np.int32), (size, 1))  # [V, n]
    hit = np.zeros(state.shape, bool)
    # Tokens by falling length: those that have an i-th byte are a prefix, so the work is the text.
    order = np.argsort(-lengths, kind="stable")
    joined = np.frombuffer(b"".join(token_bytes), np.uint8)
    for i in range(int(lengths.max(initial=0))):
        tokens = order[: int(np.searchsorted(-lengths[order], -i, side="left"))]
        byte = joined[starts[tokens] + i][:, None]  # [v, 1]
        before = state[tokens]
        hit[tokens] |= completed[byte, before]
        state[tokens] = step[byte, before]
    return Automaton(state, hit)


class Automata:
    """The tables of one vocabulary, made once per delimiter."""

    def __init__(self, token_bytes: Sequence[bytes], vocab_size: int) -> None:
        """Args: token_bytes, vocab_size: as in `build_automaton`."""
        self._token_bytes, self._vocab_size = token_bytes, vocab_size
        self._made: dict[str, Automaton] = {}

    def of(self, delimiter: str) -> Automaton:
        """As `build_automaton`."""
        if delimiter not in self._made:
            self._made[delimiter] = build_automaton(self._token_bytes, delimiter, self._vocab_size)
        return self._made[delimiter]


def find_ends(automaton: Automaton, token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token indices at which the delimiter is completed, per sequence, in rising order.

    These are the ends of segments as a stream sees them: a token that completes two delimiters is
    one end.

    Args:
        automaton: Tables.
        token_ids: B sequences that begin in state 0 (answers without their prompts).

    Returns:
        B lists of indices.
    """
    width = max((len(ids) for ids in token_ids), default=0)
    padded = np.zeros((len(token_ids), width), np.int64)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    hits = np.zeros(padded.shape, bool)
    state = np.zeros(len(token_ids), np.int32)
    for t in range(width):
        hits[:, t] = automaton.hit[padded[:, t], state]
        state = automaton.next[padded[:, t], state]
    return [
        np.flatnonzero(row[: len(ids)]).tolist() for row, ids in zip(hits, token_ids, strict=True)
    ]


def _byte_tables(pattern: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Next state and completion, [256, n] each; a completed pattern starts over."""
    n = len(pattern)
    step = np.zeros((256, n), np.int32)
    completed = np.zeros((256, n), bool)
    fallback = 0  # state reached by the text without its first byte
    for s in range(n):
        if s:
            step[:, s] = step[:, fallback]
        step[pattern[s], s] = s + 1
        if s:
            fallback = int(step[pattern[s], fallback])
    completed[pattern[-1], n - 1] = True
    step[pattern[-1], n - 1] = 0
    return step, completed
