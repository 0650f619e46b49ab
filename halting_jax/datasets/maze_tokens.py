"""The token ids of maze files: one character and one id per cell."""

import numpy as np

from common.errors import UserError

PAD, WALL, OPEN, START, GOAL, PATH = range(6)
VOCAB_SIZE = 6
CHARSET = "# SGo"

_ID_OF_BYTE = np.zeros(256, np.uint8)
_ID_OF_BYTE[np.frombuffer(CHARSET.encode(), np.uint8)] = np.arange(1, VOCAB_SIZE)
_BYTE_OF_ID = np.frombuffer(("?" + CHARSET).encode(), np.uint8)


def encode(text: str) -> np.ndarray:
    """Turns a maze written in `CHARSET` into ids.

    Args:
        text: S characters, row by row.

    Returns:
        uint8 [S].

    Raises:
        UserError: names the first character that is not part of the charset.
    """
    # Latin-1 keeps one byte per character; anything beyond it becomes "?", which has no id.
    ids = _ID_OF_BYTE[np.frombuffer(text.encode("latin-1", "replace"), np.uint8)]
    if not ids.all():
        place = int(np.argmin(ids))
        raise UserError(f"unknown character {text[place]!r} at position {place + 1}")
    return ids


def decode(tokens: np.ndarray) -> str:
    """Turns ids [S] into characters, row by row; the padding id becomes `?`."""
    return _BYTE_OF_ID[np.asarray(tokens, np.uint8)].tobytes().decode()
