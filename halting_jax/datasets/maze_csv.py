"""Mazes as CSV: one line each with the columns source, question, answer, rating."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError, require
from halting_jax.datasets.maze_solver import side_of
from halting_jax.datasets.maze_tokens import decode, encode

COLUMNS = ("source", "question", "answer", "rating")


class CsvMazes(NamedTuple):
    """The mazes of one file: inputs and labels, uint8 [P, S]."""

    inputs: np.ndarray
    labels: np.ndarray


def read_csv(path: Path) -> CsvMazes:
    """Reads mazes written in the characters `# SGo`.

    Args:
        path: the file.

    Returns:
        Its mazes, in order.

    Raises:
        UserError: names file, line and what is wrong there.
    """
    questions: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            require(
                not missing,
                f"{path}:1: no column {', '.join(missing)}; the first line must be "
                f"{','.join(COLUMNS)}",
            )
            for row in reader:
                line = reader.line_num
                for column, grids in (("question", questions), ("answer", answers)):
                    grids.append(_grid(row[column], f"{path}:{line}: {column}", questions))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; --source must be a directory with train.csv and test.csv"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}:{line + 1}: not CSV ({error}); mend this line") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    require(bool(questions), f"{path} has no mazes below its first line")
    return CsvMazes(np.stack(questions), np.stack(answers))


def write_csv(
    path: Path, source: str, inputs: np.ndarray, labels: np.ndarray, moves: np.ndarray
) -> None:
    """Writes mazes in the form `read_csv` reads.

    Args:
        path: the file.
        source: text of the first column.
        inputs: uint8 [P, S].
        labels: uint8 [P, S].
        moves: int [P], the rating.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for question, answer, rating in zip(inputs, labels, moves, strict=True):
            writer.writerow((source, decode(question), decode(answer), int(rating)))


def _grid(text: str | None, where: str, earlier: list[np.ndarray]) -> np.ndarray:
    require(text is not None, f"{where} is missing; the line has too few columns")
    assert text is not None
    try:
        ids = encode(text)
        side_of(len(ids))
    except UserError as error:
        raise UserError(f"{where}: {error}; mend this line") from None
    if earlier and len(ids) != len(earlier[0]):
        raise UserError(
            f"{where} has {len(ids)} characters, others have {len(earlier[0])}; mend this line"
        )
    return ids
