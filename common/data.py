"""Reading records from local files, and shuffled indices whose whole state is one integer."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.json_files import NotJson, kind_of, parse_json

SUFFIXES = (".jsonl", ".json", ".parquet")


def read_records(path: str | Path, limit: int = 0) -> list[dict[str, Any]]:
    """Reads the records of a `.jsonl`, `.json` (one list of objects) or `.parquet` file.

    Args:
        path: the file; its suffix decides the format.
        limit: the most records to return, 0 for all.

    Returns:
        One plain dict per record, in file order; never empty.

    Raises:
        UserError: if the file is missing, empty, truncated, not UTF-8, or holds something that
            is not an object; names the file and, where there is one, the line.
    """
    path = Path(path)
    if limit < 0:
        raise UserError(f"limit must be 0 (all) or a positive number of records, got {limit}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown file type; use one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        what = "is a directory, not a file" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; name a file with records")
    try:
        if path.suffix == ".jsonl":
            records = _read_jsonl(path, limit)
        elif path.suffix == ".json":
            records = _read_json(path)
        else:
            records = _read_parquet(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); mend it or copy it again") from error
    if not records:
        raise UserError(f"{path}: holds no records; name a file with some, or write it again")
    return records[:limit] if limit else records


def _read_jsonl(path: Path, limit: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, raw in _numbered_lines(file):
            where = f"{path}:{number}"
            try:
                record = parse_json(raw)
            except NotJson as error:
                cut = "" if raw.endswith(b"\n") else " (the last line; is the file truncated?)"
                raise UserError(f"{where}: {error}{cut}; mend the line or copy the file") from None
            records.append(_as_object(record, where))
            if limit and len(records) == limit:
                break
    return records


def _numbered_lines(file: Any) -> Iterator[tuple[int, bytes]]:
    for number, raw in enumerate(file, start=1):
        if raw.strip():
            yield number, raw


def _read_json(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    if not raw.strip():
        return []
    try:
        content = parse_json(raw)
    except NotJson as error:
        where = f"{path}:{error.line}" if error.line else str(path)
        raise UserError(f"{where}: {error}; mend the line or copy the file") from None
    if not isinstance(content, list):
        raise UserError(
            f"{path}: must hold one list of objects, not {kind_of(content)}; put [ and ] around "
            "the records, or write one a line into a .jsonl file"
        )
    return [_as_object(record, f"{path}: record {i}") for i, record in enumerate(content)]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs the package pyarrow") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a readable parquet file: {reason}; mend it or copy it again"
        ) from None


def _as_object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object, not {kind_of(record)}; remove or mend it")
    return record


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    # The counter-based generator is keyed by (seed, epoch): nothing carries over between epochs.
    key = np.array([seed, epoch], dtype=np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(size)
    order.setflags(write=False)
    return order


@dataclasses.dataclass(frozen=True)
class IndexShuffler:
    """Endless stream of record indices, a pure function of (seed, position).

    Every epoch visits each record once; epoch e uses the permutation drawn from (seed, e).

    Attributes:
        size: number of records.
        seed: which stream, 0 .. 2**64 - 1.
        shuffle: False gives file order in every epoch.
    """

    size: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"there are no records to draw from (size {self.size})")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed must be in 0 .. 2**64 - 1, got {self.seed}")

    def indices(self, position: int, n: int) -> np.ndarray:
        """Returns the `n` record indices from `position` on; the next position is `position + n`.

        Args:
            position: how many indices were drawn before, >= 0.
            n: how many to draw; may cross any number of epochs.

        Returns:
            int64 [n].

        Raises:
            ValueError: if `position` or `n` is negative.
        """
        if position < 0 or n < 0:
            raise ValueError(f"position and n must not be negative: {position}, {n}")
        out = np.empty(n, dtype=np.int64)
        filled = 0
        while filled < n:
            epoch, offset = divmod(position + filled, self.size)
            take = min(n - filled, self.size - offset)
            if self.shuffle:
                part = _permutation(self.size, self.seed, epoch)[offset : offset + take]
            else:
                part = np.arange(offset, offset + take)
            out[filled : filled + take] = part
            filled += take
        return out

    def epoch(self, position: int) -> float:
        """Returns how many passes over the records `position` stands for."""
        return position / self.size
