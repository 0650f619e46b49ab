"""Records of a data set: one prompt with its reference answer, made from rows of any known form."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError

TASKS = ("gsm8k", "math")
Record = dict[str, Any]  # {"id", "prompt", "target_answer", "task": str, "metadata": dict}

_PROMPT_NAMES = ("prompt", "question", "problem", "input")
# MATH keeps the full solution as the target; its bare answer, where given, becomes metadata.
_ANSWER_NAMES = {
    "gsm8k": ("target_answer", "answer", "output", "solution"),
    "math": ("target_answer", "solution", "answer", "output"),
}
_ID_NAMES = ("id", "qid", "idx")


@dataclass(frozen=True)
class FieldNames:
    """Names looked for before the usual ones.

    Attributes:
        prompt: field of the prompt.
        answer: field of the reference answer.
        task: field of the task name.
    """

    prompt: str = "prompt"
    answer: str = "target_answer"
    task: str = "task"


class Prepared(NamedTuple):
    """Records and what became of the rows that gave none.

    Attributes:
        records: {id, prompt, target_answer, task, metadata}, ids unique.
        dropped: number of rows with an empty prompt or answer.
    """

    records: list[Record]
    dropped: int


def check_task(task: str) -> None:
    """Raises UserError if the task is unknown."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; set dataset.task to one of {', '.join(TASKS)}")


def record_of(
    row: Mapping[str, Any],
    task: str,
    index: int | None = None,
    split: str = "",
    subject: str = "",
    fields: FieldNames | None = None,
) -> Record:
    """Turns one row into a record (data rule of the trainer section).

    Args:
        row: a raw GSM8K row {question, answer}, a raw MATH row {problem, solution, level, type}, a
            generic row {question|input, answer|output, id|qid|idx}, or a processed record.
        task: "gsm8k" or "math", unless the row names its own.
        index: number of the row for its id `<task>[-<subject>][-<split>]-<index>`; None leaves the
            id of a row without one empty.
        split: part of the id, so that ids of two splits never collide; may be empty.
        subject: subject of a MATH row that does not say; part of the id and metadata.
        fields: names looked for first.

    Returns:
        {id, prompt, target_answer, task, metadata}; fields without a role go to metadata.

    Raises:
        UserError: if the task is unknown.
    """
    check_task(task)
    fields = fields or FieldNames()
    rest = dict(row)
    prompt = _take(rest, (fields.prompt, *_PROMPT_NAMES))
    answer = _take(rest, (fields.answer, *_ANSWER_NAMES[task]))
    own_task = _take(rest, (fields.task,))
    own_id = _take(rest, _ID_NAMES)
    metadata = rest.pop("metadata", None)
    metadata = {**rest, **(metadata if isinstance(metadata, Mapping) else {})}
    if subject:
        metadata.setdefault("subject", subject)
    task = own_task or task
    place = [task, slug(metadata.get("subject")) if task == "math" else "", split]
    if own_id and not own_id.isdecimal():
        name = own_id
    elif own_id or index is not None:
        # A bare number is the row's place in some file: it says nothing without the split.
        name = "-".join([*filter(None, place), own_id or str(index)])
    else:
        name = ""
    return {
        "id": name,
        "prompt": prompt,
        "target_answer": answer,
        "task": task,
        "metadata": metadata,
    }


def prepare(
    rows: Iterable[Mapping[str, Any]],
    task: str,
    split: str = "",
    subject: str = "",
    fields: FieldNames | None = None,
) -> Prepared:
    """Turns rows into records; see `record_of` for the forms and the ids.

    Args:
        rows: rows in file order; MATH rows are numbered per subject, others as they come.
        task: "gsm8k" or "math".
        split: name of the split for the ids; may be empty.
        subject: subject of all rows, for MATH.
        fields: names looked for first.

    Returns:
        The records in file order, and how many rows were dropped.

    Raises:
        UserError: if the task is unknown.
    """
    check_task(task)
    records: list[Record] = []
    dropped = 0
    numbers: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for row in rows:
        part = slug(row.get("subject") or subject) if task == "math" else ""
        record = record_of(row, task, numbers[part], split, subject, fields)
        numbers[part] += 1
        if not record["prompt"].strip() or not record["target_answer"].strip():
            dropped += 1
            continue
        seen[record["id"]] += 1
        if seen[record["id"]] > 1:
            record["id"] += f"#{seen[record['id']]}"
        records.append(record)
    return Prepared(records, dropped)


def slug(name: Any) -> str:
    """Returns a name as lower-case words joined by `_` ("Counting & Probability")."""
    words = str(name or "").lower().replace("&", " and ")
    return re.sub(r"[^a-z0-9]+", "_", words).strip("_")


def toy_example(task: str, index: int, a: int, b: int) -> tuple[str, str]:
    """Returns (prompt, answer) of one toy problem; even and odd indices use different wordings.

    Raises:
        UserError: if the task is unknown.
    """
    check_task(task)
    even = index % 2 == 0
    if task == "gsm8k" and even:
        return f"If you have {a} apples and get {b} more, how many apples do you have?", str(a + b)
    if task == "gsm8k":
        text = f"Each box has {a} pencils. If you have {b} boxes, how many pencils total?"
        return text, str(a * b)
    if even:
        return f"Solve for x: x + {a} = {b}.", str(b - a)
    return f"Compute {a}^2 + {b}^2.", str(a * a + b * b)


def toy_records(task: str, count: int, seed: int = 0, split: str = "") -> list[Record]:
    """Makes toy problems with operands uniform in 1..12.

    Args:
        task: "gsm8k" or "math".
        count: how many.
        seed: other seeds give other operands, and so do other splits.
        split: part of the id `toy-<task>[-<split>]-<index>`; may be empty.

    Returns:
        Processed records.

    Raises:
        UserError: if the task is unknown.
    """
    check_task(task)
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    prefix = "-".join(filter(None, ["toy", task, split]))
    records = []
    for index, (a, b) in enumerate(rng.integers(1, 13, size=(count, 2)).tolist()):
        prompt, answer = toy_example(task, index, a, b)
        records.append(
            {
                "id": f"{prefix}-{index}",
                "prompt": prompt,
                "target_answer": answer,
                "task": task,
                "metadata": {},
            }
        )
    return records


def _take(rest: dict[str, Any], names: Iterable[str]) -> str:
    """Removes the first field that holds text or a number, and returns it as text."""
    for name in names:
        value = rest.get(name)
        if isinstance(value, (str, int, float)) and value != "":
            del rest[name]
            return str(value)
    # A field that has the role but no usable value is not metadata either.
    for name in names:
        if rest.get(name, ...) in (None, ""):
            del rest[name]
            break
    return ""
