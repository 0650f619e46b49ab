"""Data sets as lists of `TaskExample`: local files in the hub's layout first, the hub itself last.

`problems` needs no file: it is the generator of one-step word problems.
"""

import dataclasses
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.answers.choices import LETTERS
from common.data import read_records
from common.errors import UserError
from common.hub import load_rows
from common.json_files import kind_of
from common.problems_one_step import OneStepProblemSet

PROBLEMS_SIZE = 1000  # generated problems of a split; the whole set of an index never changes


@dataclasses.dataclass(frozen=True)
class TaskExample:
    """One question with its reference answer; read-only.

    Attributes:
        task: canonical name of the data set.
        id: unique within its split.
        question: the text that is asked, without instructions or options.
        answer: the reference as the graders expect it (`common.answers.grade_task`): worked
            solution for GSM8K and MATH, number, letter, or Yes/No.
        meta: split, the commit where it came from the hub, and what else the data set gives:
            "answer" (bare), "options" ((letter, text), ...), subject, level, url, year.
    """

    task: str
    id: str
    question: str
    answer: str
    meta: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Name that is unique over data sets and splits: `task/split/id`."""
        return f"{self.task}/{self.meta['split']}/{self.id}"


Row = Mapping[str, Any]
Maker = Callable[[Row, int], tuple[str, str, str, dict[str, Any]]]  # id, question, answer, meta


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a data set lies and how a row becomes an example.

    Attributes:
        files: paths under the data root, tried in order; "{split}" and globs allowed.
        make: (row, row number) to (id, question, answer, meta).
        hub: name and configuration on the hub; "" = nowhere.
        fixed_split: the only split there is; "" = as asked for.
    """

    files: tuple[str, ...]
    make: Maker
    hub: tuple[str, str] = ("", "")
    fixed_split: str = ""


def _gsm8k(row: Row, number: int) -> tuple[str, str, str, dict[str, Any]]:
    return str(number), _text(row, "question"), _text(row, "answer"), {}


def _svamp(row: Row, number: int) -> tuple[str, str, str, dict[str, Any]]:
    question = f"{_text(row, 'Body')}\n{_text(row, 'Question')}"
    return str(number), question, _text(row, "Answer"), {}


def _math(row: Row, number: int) -> tuple[str, str, str, dict[str, Any]]:
    bare = row.get("answer")
    solution = row.get("solution") or (f"$\\boxed{{{bare}}}$" if bare else "")
    meta = {name: row[name] for name in ("answer", "subject", "type", "level") if row.get(name)}
    identity = row.get("unique_id") or row.get("id") or number
    return str(identity), _text(row, "problem"), str(solution), meta


def _contest(row: Row, number: int) -> tuple[str, str, str, dict[str, Any]]:
    question = "problem" if "problem" in row else "question"
    meta = {name: row[name] for name in ("year", "url") if row.get(name)}
    return str(row.get("id", number)), _text(row, question), _text(row, "answer"), meta


def _choice(row: Row, number: int) -> tuple[str, str, str, dict[str, Any]]:
    choices = row.get("choices")
    if not isinstance(choices, Mapping) or len(choices["label"]) != len(choices["text"]):
        raise UserError(f"row {number}: choices must be {{label: [..], text: [..]}} of one length")
    labels = [str(label) for label in choices["label"]]
    if len(labels) > len(LETTERS):
        raise UserError(f"row {number}: {len(labels)} options; at most {len(LETTERS)} are possible")
    # Labels can be digits: letters by position, for the options and the key alike.
    letters = dict(zip(labels, LETTERS, strict=False))
    key = str(row.get("answerKey") or "")
    if key and key not in letters:
        raise UserError(f"row {number}: answerKey {key!r} is none of its labels {labels}")
    options = tuple(zip(letters.values(), map(str, choices["text"]), strict=True))
    question = "question_stem" if "question_stem" in row else "question"
    answer = letters[key] if key else ""
    return str(row.get("id", number)), _text(row, question), answer, {"options": options}


def _yes_no(row: Row, number: int) -> tuple[str, str, str, dict[str, Any]]:
    value = str(row.get("answer")).strip().lower()
    answer = {"true": "Yes", "yes": "Yes", "1": "Yes", "false": "No", "no": "No", "0": "No"}
    if value not in answer:
        raise UserError(f"row {number}: answer {row.get('answer')!r} is neither yes nor no")
    identity = row.get("qid") or row.get("id") or number
    return str(identity), _text(row, "question"), answer[value], {}


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if value is None:
        raise UserError(
            f"field {field!r} is missing; fields are {', '.join(sorted(row))}: rename or mend them"
        )
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise UserError(f"field {field!r} is {kind_of(value)}, not a text; mend the row")
    return str(value)


_PARQUET = "{split}-00000-of-00001.parquet"
_SOURCES: dict[str, _Source] = {
    "gsm8k": _Source(
        (f"openai/gsm8k/main/{_PARQUET}", "openai/gsm8k/{split}.jsonl", "gsm8k/{split}.jsonl"),
        _gsm8k,
        ("openai/gsm8k", "main"),
    ),
    "svamp": _Source(
        ("svamp/{split}.jsonl", "ChilleD/SVAMP/{split}.jsonl"), _svamp, ("ChilleD/SVAMP", "")
    ),
    "math500": _Source(
        ("HuggingFaceH4/MATH-500/test.jsonl",), _math, ("HuggingFaceH4/MATH-500", ""), "test"
    ),
    "math": _Source(
        ("math/{split}.jsonl", "competition_math/{split}.jsonl"),
        _math,
        ("qwedsacf/competition_math", ""),
    ),
    "aime_2024": _Source(
        ("HuggingFaceH4/aime_2024/data/train-00000-of-00001.parquet",),
        _contest,
        ("HuggingFaceH4/aime_2024", ""),
        "train",
    ),
    "aime25": _Source(("math-ai/aime25/test.jsonl",), _contest, ("math-ai/aime25", ""), "test"),
    "amc23": _Source(
        (f"math-ai/amc23/{_PARQUET}", "math-ai/amc23/{split}-*.parquet"),
        _contest,
        ("math-ai/amc23", ""),
    ),
    "arc-c": _Source(
        (f"allenai/ai2_arc/ARC-Challenge/{_PARQUET}",),
        _choice,
        ("allenai/ai2_arc", "ARC-Challenge"),
    ),
    "openbookqa": _Source(
        (f"allenai/openbookqa/main/{_PARQUET}",), _choice, ("allenai/openbookqa", "main")
    ),
    "commonsense_qa": _Source(
        (f"tau/commonsense_qa/data/{_PARQUET}",), _choice, ("tau/commonsense_qa", "")
    ),
    "strategyqa": _Source(
        ("strategyqa/{split}.jsonl", "ChilleD/StrategyQA/{split}.jsonl"),
        _yes_no,
        ("ChilleD/StrategyQA", ""),
    ),
}
PROBLEMS = "problems"
DATASETS = (*_SOURCES, PROBLEMS)
_ALIASES = {
    "math-500": "math500",
    "competition_math": "math",
    "aime2024": "aime_2024",
    "aime_25": "aime25",
    "aime_2025": "aime25",
    "amc_23": "amc23",
    "amc_2023": "amc23",
    "arc": "arc-c",
    "arc_challenge": "arc-c",
    "arc-challenge": "arc-c",
    "openbook_qa": "openbookqa",
    "commonsenseqa": "commonsense_qa",
    "strategy_qa": "strategyqa",
}


def check_dataset(name: str) -> str:
    """The canonical name of a data set.

    Args:
        name: a canonical name, an alias, or a path-like name (`HuggingFaceH4/MATH-500`), of which
            the last part counts; upper and lower case are one.

    Raises:
        UserError: there is no such data set.
    """
    short = name.strip().rstrip("/").rpartition("/")[2].lower()
    canonical = _ALIASES.get(short, short)
    if canonical not in DATASETS:
        raise UserError(f"task.dataset={name!r} is unknown; use one of {', '.join(DATASETS)}")
    return canonical


def split_of(name: str, split: str) -> str:
    """The split that is read: data sets with a single one have no other."""
    canonical = check_dataset(name)
    return _SOURCES[canonical].fixed_split or split if canonical in _SOURCES else split


def load_examples(
    name: str,
    split: str,
    data_root: str | Path = "datasets",
    *,
    offset: int = 0,
    limit: int = 0,
    split_seed: int = -1,
    seed: int = 0,
) -> list[TaskExample]:
    """Reads examples of a split.

    Args:
        name: data set (`check_dataset`).
        split: split; data sets with a single one ignore it.
        data_root: directory with local files.
        offset: rows skipped.
        limit: the most examples, 0 = all.
        split_seed: shuffles the rows before `offset`; negative = file order.
        seed: of the generated problems.

    Returns:
        Examples, at least one; ids are those of the rows, whatever the order.

    Raises:
        UserError: there is no such data or it cannot be read; the split holds no answers; `offset`
            leaves nothing.
    """
    canonical = check_dataset(name)
    actual = split_of(canonical, split)
    if canonical == PROBLEMS:
        examples = _generated(actual, seed)
    else:
        examples = _from_rows(canonical, actual, Path(data_root).expanduser())
    if split_seed >= 0:
        random.Random(split_seed).shuffle(examples)
    chosen = examples[offset : offset + limit if limit else None]
    if not chosen:
        raise UserError(
            f"task.dataset={name}: its split {actual} has {len(examples)} rows, none behind offset "
            f"{offset}; lower the offset or the number of rows before it"
        )
    return chosen


def _generated(split: str, seed: int) -> list[TaskExample]:
    return [
        TaskExample(
            PROBLEMS,
            record["id"],
            record["prompt"],
            record["target_answer"],
            MappingProxyType({"split": split, "ops": record["metadata"]["ops"]}),
        )
        for record in OneStepProblemSet(split, PROBLEMS_SIZE, seed)
    ]


def _from_rows(name: str, split: str, root: Path) -> list[TaskExample]:
    source = _SOURCES[name]
    rows, where, commit = _rows(name, source, split, root)
    origin = {"commit": commit} if commit else {}
    examples = []
    for number, row in enumerate(rows):
        try:
            identity, question, answer, meta = source.make(row, number)
        except UserError as error:
            raise UserError(f"{where}: row {number}: {error}") from error
        frozen = MappingProxyType({"split": split, **origin, **meta})
        examples.append(TaskExample(name, identity, question, answer, frozen))
    if not any(example.answer for example in examples):
        raise UserError(f"{where}: this split holds no answers; use another (validation, train)")
    return examples


def _rows(name: str, source: _Source, split: str, root: Path) -> tuple[Sequence[Row], str, str]:
    """Rows, where they lie, and the commit they were downloaded from ("" for local files)."""
    for pattern in source.files:
        path = root / pattern.format(split=split)
        found = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
        for file in found:
            if file.exists():
                return read_records(file), str(file), ""
    present = _present_splits(source, root)
    if present:
        raise UserError(
            f"task.dataset={name}: {root} holds its splits {', '.join(present)}, not {split}; set "
            "task.train_split and task.eval_split"
        )
    return _download(name, source, split, root)


def _present_splits(source: _Source, root: Path) -> list[str]:
    """Splits of a data set that lie under the data root."""
    found = set()
    for pattern in source.files:
        path = root / pattern
        before, _, after = path.name.partition("{split}")
        if after:
            for file in path.parent.glob(path.name.replace("{split}", "*")):
                found.add(file.name.removeprefix(before).split("-0000")[0].removesuffix(".jsonl"))
    return sorted(found)


def _download(name: str, source: _Source, split: str, root: Path) -> tuple[Sequence[Row], str, str]:
    """The rows on the hub, unless the environment forbids going there."""
    expected = root / source.files[0].format(split=split)
    advice = f"put it at {expected} or set task.data_root"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise UserError(f"task.dataset={name}: no file for split {split}; {advice}")
    hub, config = source.hub
    try:
        found = load_rows(hub, config, split)
        return [dict(row) for row in found.rows], f"{hub}@{found.commit}", found.commit
    except Exception as error:  # the client raises whatever its own layers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"task.dataset={name}: no local file for split {split}, and {hub} cannot be had from "
            f"the hub ({reason}); {advice}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of a split: where they start and how many (0 = all behind that)."""

    split: str
    offset: int
    limit: int


@dataclasses.dataclass(frozen=True)
class Parts:
    """Rows that are mined, tuned on and evaluated; disjoint unless offsets say otherwise."""

    train: Part
    dev: Part
    eval: Part


def plan_parts(
    dataset: str,
    train: Part,
    dev: Part,
    evaluation: Part,
    use_dev: bool = True,
) -> Parts:
    """Settles negative offsets so that the three parts share no row.

    A part with a negative offset starts behind the earlier parts of the same split; data sets with
    one split have all three in it.

    Args:
        dataset: data set.
        train, dev, evaluation: parts as configured; an empty dev split is the training split.
        use_dev: rows are tuned on, so evaluation must leave them out.

    Returns:
        Parts with actual splits and offsets of at least 0.

    Raises:
        UserError: a part that has to end before another one takes all rows.
    """
    first = _settled(dataset, train, [])
    middle = _settled(dataset, dataclasses.replace(dev, split=dev.split or train.split), [first])
    before = [first, middle] if use_dev else [first]
    return Parts(first, middle, _settled(dataset, evaluation, before))


def _settled(dataset: str, part: Part, before: Sequence[Part]) -> Part:
    split = split_of(dataset, part.split)
    if part.offset >= 0:
        return dataclasses.replace(part, split=split)
    same = [earlier for earlier in before if earlier.split == split]
    if any(earlier.limit == 0 for earlier in same):
        raise UserError(
            f"task.dataset={dataset}: all rows of split {split} are mined or tuned on, none is "
            "left; set task.max_train_examples and task.max_dev_examples"
        )
    offset = max((earlier.offset + earlier.limit for earlier in same), default=0)
    return dataclasses.replace(part, split=split, offset=offset)


def check_disjoint(
    used: Iterable[str], evaluated: Iterable[str], allow_overlap: bool = False
) -> int:
    """Makes sure that no mined question is evaluated.

    Args:
        used: keys (`TaskExample.key`) of mined or tuned questions.
        evaluated: keys of questions to evaluate.
        allow_overlap: count them only.

    Returns:
        How many questions are in both.

    Raises:
        UserError: there are some and they are not allowed.
    """
    shared = sorted(set(used) & set(evaluated))
    if shared and not allow_overlap:
        raise UserError(
            f"{len(shared)} of the evaluated questions were mined (first: {shared[0]}); set "
            "task.eval_offset behind them, or task.allow_overlap=True to report it anyway"
        )
    return len(shared)
