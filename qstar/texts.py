"""Generated columns to token ids and text, and stop strings."""

import dataclasses
from typing import Any

import numpy as np

from qstar.backend import Output


@dataclasses.dataclass(frozen=True)
class Detokenizer:
    """Reads generated tokens with pi_theta's tokenizer.

    Attributes:
        tokenizer: `decode(ids, skip_special_tokens=True)`.
        ids: [U] int32, the tokenizer's id of each column; None = the column itself.
        stop_strings: texts that end a sample; they are cut off together with what follows.
    """

    tokenizer: Any
    ids: np.ndarray | None = None
    stop_strings: tuple[str, ...] = ()

    def token_ids(self, columns: np.ndarray) -> list[int]:
        """The tokenizer's ids of generated columns [n]."""
        found = columns if self.ids is None else self.ids[columns]
        return [int(i) for i in found]

    def text(self, columns: np.ndarray, ended: bool = False) -> str:
        """Text of columns [n] without special tokens, and without the end token if `ended`."""
        ids = self.token_ids(columns[: len(columns) - ended])
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def answer(self, output: Output) -> str:
        """Text of a finished output, up to the first stop string."""
        text = self.text(output.columns, output.stopped)
        places = [text.find(stop) for stop in self.stop_strings]
        return text[: min((p for p in places if p >= 0), default=len(text))]

    def stop_length(self, columns: np.ndarray) -> int | None:
        """Tokens up to the one that completes a stop string; None = there is none yet."""

        def contains(length: int) -> bool:
            text = self.text(columns[:length])
            return any(stop in text for stop in self.stop_strings)

        if not self.stop_strings or not contains(len(columns)):
            return None
        low, high = 1, len(columns)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if contains(middle) else (middle + 1, high)
        return low

    def cut(self, output: Output) -> Output | None:
        """The output cut behind a stop string, or None if it holds none."""
        length = self.stop_length(output.columns)
        return None if length is None else truncate(output, length)


def truncate(output: Output, length: int) -> Output:
    """The first tokens of an output, as one that has stopped in text (no end token)."""
    values = {name: value[:length] for name, value in output.values.items()}
    # `stopped` says that the last token is an end token; cut earlier, it is none.
    whole = length == len(output.columns) and output.stopped
    return Output(output.columns[:length], whole, False, values)
