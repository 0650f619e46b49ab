"""How examples of every task are written for people: one mark per cell, token, number or answer."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from halting_jax.datasets import maze_tokens
from halting_jax.tasks import addition, logic, sequences

UNKNOWN = "?"
DIFFICULTY_UNITS = {
    "maze": "moves",
    "sudoku": "empty cells",
    "parity": "bits",
    "addition": "digits",
    "logic": "gates",
    "sort": "items",
    "copy": "symbols",
    "reverse": "symbols",
    "string_addition": "digits",
}


class Mark(NamedTuple):
    """What stands at one place.

    Attributes:
      text: the symbol that is shown, perhaps "".
      kind: what it is, one word that names its colour.
      name: what it is, for tooltips and readers.
    """

    text: str
    kind: str
    name: str


Marks = tuple[Mark, ...]

_MAZE = {
    maze_tokens.PAD: Mark("·", "pad", "padding"),
    maze_tokens.WALL: Mark("", "wall", "wall"),
    maze_tokens.OPEN: Mark("", "open", "open"),
    maze_tokens.START: Mark("S", "start", "start"),
    maze_tokens.GOAL: Mark("G", "goal", "goal"),
    maze_tokens.PATH: Mark("o", "path", "path"),
}
_CONTROL = {
    sequences.PAD: Mark("·", "pad", "padding"),
    sequences.BOS: Mark("^", "control", "begin"),
    sequences.EOS: Mark("$", "control", "end"),
}


class Inputs(NamedTuple):
    """The part of an example that is shown as its question.

    Attributes:
      marks: in order.
      positions: of each mark along the sequence, S or T.
    """

    marks: Marks
    positions: tuple[int, ...]


def grid_mark(task: str, token: int) -> Mark:
    """The mark of a grid token; sudoku ids are the digit plus one, 0 is an empty cell."""
    unknown = Mark(UNKNOWN, "unknown", f"unknown token {token}")
    if task == "maze":
        return _MAZE.get(token, unknown)
    if token == 0:
        return _MAZE[maze_tokens.PAD]
    if token == 1:
        return Mark("", "open", "empty")
    return Mark(str(token - 1), "digit", str(token - 1)) if token <= 10 else unknown


def token_mark(task: str, token: int) -> Mark:
    """The mark of a token of copy, reverse and string addition."""
    if token in _CONTROL:
        return _CONTROL[token]
    if task == "string_addition":
        text = "+" if token == sequences.PLUS else str(token - sequences.FIRST_DIGIT)
        known = token < sequences.ADDITION_VOCAB
    else:
        text, known = str(token - sequences.FIRST_SYMBOL), True
    if not known or token < 0:
        return Mark(UNKNOWN, "unknown", f"unknown token {token}")
    return Mark(text, "symbol", text)


def number_text(places: Sequence[int]) -> str:
    """Digits of addition's answer; "_" for a blank between digits, nothing for those behind."""
    kept = list(places)
    while kept and kept[-1] == addition.BLANK:
        kept.pop()
    return "".join("_" if digit == addition.BLANK else str(digit) for digit in kept) or "none"


def input_marks(task: str, encoding: str, row: np.ndarray, mask: np.ndarray) -> Inputs:
    """Writes the question of one example.

    Args:
      task: `task.name`.
      encoding: `task.encoding`, of logic and sort.
      row: int32 [S], float32 [bits] or [T, features].
      mask: bool [S | bits | T], True = part of the question.

    Returns:
      the marks of the masked positions; grids keep all of them.
    """
    if task in ("maze", "sudoku"):
        return Inputs(tuple(grid_mark(task, int(token)) for token in row), tuple(range(len(row))))
    if task == "parity":
        # Bits at random places keep the zeros between them.
        end = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
        return Inputs(tuple(_bit(value) for value in row[:end]), tuple(range(end)))
    write = _FRAMES.get(task, lambda encoding, token: token_mark(task, int(token)))
    positions = tuple(int(i) for i in np.flatnonzero(mask))
    return Inputs(tuple(write(encoding, row[i]) for i in positions), positions)


def answer_marks(task: str, answers: np.ndarray, positions: Sequence[int]) -> Marks:
    """Writes answers, a label or a prediction.

    Args:
      task: `task.name`.
      answers: int [places of an answer sheet, ...] as `Batch.targets` of one row; parity [1].
      positions: which ones are shown.
    """
    return tuple(_answer(task, answers[i]) for i in positions)


def joined(task: str, marks: Marks) -> str:
    """Marks as one line of text."""
    if task in ("maze", "sudoku"):
        return " ".join(mark.name for mark in marks)
    if task in ("parity", "copy", "reverse", "string_addition"):
        return "".join(mark.text for mark in marks if mark.kind != "control")
    return {"addition": " + ", "logic": " | "}.get(task, ", ").join(mark.text for mark in marks)


def answers_joined(task: str, marks: Marks) -> str:
    """Answers as one line of text."""
    return (
        joined(task, marks)
        if task not in ("addition", "logic")
        else ", ".join(mark.text for mark in marks)
    )


def _bit(value: float) -> Mark:
    if value == 0:
        return Mark("·", "pad", "no bit")
    return Mark("+", "plus", "+1") if value > 0 else Mark("-", "minus", "-1")


def _answer(task: str, answer: np.ndarray) -> Mark:
    if task in ("maze", "sudoku"):
        return grid_mark(task, int(answer))
    if task == "parity":
        text = "odd" if int(answer) else "even"
        return Mark(text, "symbol", text)
    if task == "addition":
        text = number_text([int(digit) for digit in answer])
        return Mark(text, "symbol", text)
    if task in ("logic", "sort"):
        text = str(int(answer))
        return Mark(text, "symbol", text if task == "logic" else f"item {text}")
    return token_mark(task, int(answer))


def _addend(encoding: str, frame: np.ndarray) -> Mark:
    del encoding
    blocks = frame.reshape(-1, 10)
    text = "".join(str(int(block.argmax())) for block in blocks if block.any())
    return Mark(text, "symbol", text)


def _gates(encoding: str, frame: np.ndarray) -> Mark:
    first, second = (int(value) for value in frame[:2])
    blocks = frame[2:].reshape(-1, logic.GATES)
    if encoding == "paper":
        names = list(logic.PAPER_GATES)
        used = [names[int(block.argmax())] for block in blocks if block.any()]
    else:
        used = [list(logic.ORIGINAL_GATES)[int(blocks[:, 0].argmax())]]
    text = f"{first}{second} " + " ".join(used)
    return Mark(text, "symbol", f"bits {first} and {second}, then {', '.join(used)}")


def _number(encoding: str, frame: np.ndarray) -> Mark:
    del encoding
    text = f"{float(frame[0]):+.2f}"
    return Mark(text, "symbol", text)


_FRAMES: dict[str, Callable[[str, np.ndarray], Mark]] = {
    "addition": _addend,
    "logic": _gates,
    "sort": _number,
}
