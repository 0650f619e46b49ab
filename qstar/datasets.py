"""Where rows come from: generated problems, local files, saved or hub data sets."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from common import hub
from common.data import SUFFIXES, read_records
from common.errors import UserError, require

PROBLEMS = "problems"


class Rows(NamedTuple):
    """A data set.

    Attributes:
        rows: by row number; a `column_names` attribute is the schema.
        fingerprint: equal for equal contents.
    """

    rows: Sequence[Mapping[str, Any]]
    fingerprint: str


class ProblemRows(Sequence[dict[str, Any]]):
    """Generated one-step word problems, made when they are read.

    Attributes:
        column_names: question, answer (a worked solution), hint (the equation), id.
    """

    column_names = ("id", "question", "answer", "hint")

    def __init__(self, split: str, size: int, seed: int) -> None:
        """Describes the set."""
        from common.problems_one_step import OneStepProblemSet

        self._set = OneStepProblemSet(split, size, seed)

    def __len__(self) -> int:
        """Number of problems."""
        return len(self._set)

    def __getitem__(self, index: Any) -> Any:
        """One problem, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        record = self._set[index]
        a, sign, b, result = record["metadata"]["chain"][0]
        return {
            "id": record["id"],
            "question": record["prompt"],
            "answer": record["target_answer"],
            "hint": f"{a} {sign} {b} = {result}",
        }


def load_rows(config: ConfigDict) -> Rows:
    """The rows of `data.name`.

    Args:
        config: section `data` counts.

    Raises:
        UserError: if there is no such data set or split.
    """
    name, data = config.data.name, config.data
    if name == PROBLEMS:
        rows = ProblemRows(data.split, data.size, data.seed)
        return Rows(rows, f"{PROBLEMS}-{data.split}-{data.size}-{data.seed}")
    path = Path(name).expanduser()
    if path.suffix in SUFFIXES or path.is_file():
        records = read_records(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Rows(records, digest)
    if path.is_dir():
        return _saved(path, data.split)
    return _from_hub(name, data.split)


def _saved(path: Path, split: str) -> Rows:
    """A folder written by `save_to_disk`, with or without splits."""
    datasets = _library()
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # a dozen types, by the part that is damaged
        raise UserError(f"data.name: '{path}' is no saved data set ({_first(error)})") from error
    if isinstance(found, datasets.DatasetDict):
        require(split in found, f"data.split {split!r}: '{path}' has {', '.join(map(str, found))}")
        found = found[split]
    return Rows(found, str(found._fingerprint))


def _from_hub(name: str, split: str) -> Rows:
    """A data set of the Hugging Face hub, from its cache where it was loaded before."""
    _library()
    try:
        found, commit = hub.load_rows(name, "", split)
    except Exception as error:  # the client raises a dozen types for a dozen causes
        raise UserError(
            f"data.name: no file '{name}' here, and the hub gave no data set of that name with "
            f"split {split!r} ({_first(error)})"
        ) from error
    # The manifest keeps it: a branch moves, a commit does not.
    return Rows(found, f"{hub.split_revision(name)[0]}@{commit} {found._fingerprint}")


def _library() -> Any:
    """The `datasets` package; takes a second to import."""
    try:
        import datasets
    except ImportError:
        raise UserError("saved and hub data sets need the package datasets; install it") from None
    datasets.disable_progress_bars()
    return datasets


def _first(error: Exception) -> str:
    """First line of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
