"""Where the segments of a text end.

In tokens a segment ends with the token that completes the delimiter, which is kept whole
(`common.engines.delimiter.find_ends`); its position is the control point.
"""


def end_offsets(text: str, delimiter: str) -> list[int]:
    """Ends (exclusive, in characters) of the delimiters, left to right, without overlap."""
    ends: list[int] = []
    start = 0
    while (found := text.find(delimiter, start)) >= 0:
        start = found + len(delimiter)
        ends.append(start)
    return ends
