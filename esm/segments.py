"""Where the segments of an answer end, and its text.

In tokens a segment ends with the token that completes the delimiter, which is kept whole
(`common.engines.delimiter.find_ends`); its position is the control point.
"""

from collections.abc import Sequence


def end_offsets(text: str, delimiter: str) -> list[int]:
    """Ends (exclusive, in characters) of the delimiters, left to right, without overlap."""
    ends: list[int] = []
    start = 0
    while (found := text.find(delimiter, start)) >= 0:
        start = found + len(delimiter)
        ends.append(start)
    return ends


def text_of(token_ids: Sequence[int], token_bytes: Sequence[bytes]) -> str:
    """The text of an answer; bytes that are no UTF-8 show as replacement characters."""
    return b"".join(token_bytes[token] for token in token_ids).decode("utf-8", errors="replace")
