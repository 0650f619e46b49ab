"""Data sets on disk: where they lie, how one is found, and `--mode=prep`, which writes them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from common import hub
from common.data import read_records
from common.errors import UserError
from common.problems_math import SUBJECTS as MATH_SUBJECTS
from common.rundir import atomic_write, json_text
from reoac_jax.records import FieldNames, Prepared, Record, check_task, prepare, toy_records

SPLITS = ("train", "test")
GENERATED = "generated"
HUB_SOURCES = {
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("EleutherAI/hendrycks_math", ""),
}
_PATH_KEYS = {"train": "dataset.train_path", "test": "dataset.eval_path"}
_RAW_KEYS = {"train": "dataset.raw_train_path", "test": "dataset.raw_eval_path"}


@dataclass(frozen=True)
class DatasetOptions:
    """What to do where a file of a data set is missing, and how its rows are read.

    Attributes:
        root: directory that relative paths and `dataset/` are under.
        fields: names of the fields looked for first.
        allow_toy: make toy problems when nothing else is there.
        download_on_missing: ask the hub for missing data.
        hf_dataset: name on the hub; empty takes the usual source of the task.
        hf_config: its configuration; used with `hf_dataset` only.
        math_subjects: configurations of the MATH source.
        dump_math_subjects: also keep one raw file per subject.
        math_subject_root: directory of those files.
        toy_size: number of toy problems of a split.
        seed: seed of the toy problems.
    """

    root: Path = Path()
    fields: FieldNames = field(default_factory=FieldNames)
    allow_toy: bool = False
    download_on_missing: bool = False
    hf_dataset: str = ""
    hf_config: str = ""
    math_subjects: tuple[str, ...] = MATH_SUBJECTS
    dump_math_subjects: bool = False
    math_subject_root: str = "dataset/raw/math"
    toy_size: int = 64
    seed: int = 0

    def resolve(self, path: str | Path) -> Path:
        """Returns a path with `~` expanded; a relative one is under `root`."""
        return self.root / Path(path).expanduser()

    def processed_path(self, task: str, split: str) -> Path:
        """Where the records of a split lie unless the config says otherwise."""
        return self.root / "dataset" / "processed" / f"{task}_{split}.jsonl"

    def raw_path(self, task: str, split: str) -> Path:
        """Where the untouched rows of a split lie unless the config says otherwise."""
        return self.root / "dataset" / "raw" / task / f"{split}.jsonl"


class PrepReport(NamedTuple):
    """What `run_prep` did for one split.

    Attributes:
        split: "train" or "test".
        source: where the rows came from.
        records: number of records; 0 where nothing had to be done.
        dropped: number of rows with an empty prompt or answer.
        path: the processed file.
    """

    split: str
    source: str
    records: int
    dropped: int
    path: Path


def dataset_options(config: Any) -> DatasetOptions:
    """Reads the options from a config.

    Args:
        config: the whole config; the environment variable REOAC_DATA_ROOT goes before its
            `dataset.data_root`.

    Returns:
        The options.
    """
    section = config.dataset
    root = os.environ.get("REOAC_DATA_ROOT") or section.get("data_root") or "."
    return DatasetOptions(
        root=Path(root).expanduser(),
        fields=FieldNames(
            prompt=section.get("prompt_field", "prompt"),
            answer=section.get("answer_field", "target_answer"),
            task=section.get("task_field", "task"),
        ),
        allow_toy=bool(section.get("allow_toy", False)),
        download_on_missing=bool(section.get("download_on_missing", False)),
        hf_dataset=section.get("hf_dataset") or "",
        hf_config=section.get("hf_config") or "",
        math_subjects=tuple(section.get("math_subjects") or MATH_SUBJECTS),
        dump_math_subjects=bool(section.get("dump_math_subjects", False)),
        math_subject_root=section.get("math_subject_root") or "dataset/raw/math",
        toy_size=int(section.get("toy_size", 64)),
        seed=int(config.get("seed", 0)),
    )


def load_split(config: Any, split: str, limit: int = 0) -> list[Record]:
    """Loads a split from the file the config names; see `load_dataset`.

    Args:
        config: the whole config; `dataset.train_path` or `dataset.eval_path` must name a file,
            "generated" (the problem generator) is the business of its own module.
        split: "train" or "test".
        limit: the most records to return, 0 for all.

    Returns:
        Processed records.

    Raises:
        UserError: as `load_dataset`.
    """
    _check_split(split)
    name = "train" if split == "train" else "eval"
    return load_dataset(
        config.dataset.get(f"{name}_path", ""),
        config.dataset.task,
        split,
        raw_path=config.dataset.get(f"raw_{name}_path", ""),
        options=dataset_options(config),
        limit=limit,
    )


def load_dataset(
    path: str | Path,
    task: str,
    split: str = "train",
    *,
    raw_path: str | Path = "",
    options: DatasetOptions | None = None,
    limit: int = 0,
) -> list[Record]:
    """Finds a split and returns its records.

    Looked at in this order: `path` (processed records or raw rows, any format of
    `common.data.read_records`), the raw file, the hub if `download_on_missing`, toy problems if
    `allow_toy` (data rule, lookup order). Nothing is written.

    Args:
        path: the file; empty takes `dataset/processed/<task>_<split>.jsonl`.
        task: "gsm8k" or "math".
        split: "train" or "test".
        raw_path: raw file looked at second; empty takes `dataset/raw/<task>/<split>.jsonl`.
        options: where paths start and what is allowed when files are missing.
        limit: the most records to return, 0 for all.

    Returns:
        Processed records with unique ids, at least one.

    Raises:
        UserError: if there is no data, it cannot be read, or it holds no usable row.
    """
    check_task(task)
    _check_split(split)
    options = options or DatasetOptions()
    first = options.resolve(path) if path else options.processed_path(task, split)
    second = options.resolve(raw_path) if raw_path else options.raw_path(task, split)
    for file in (first, second):
        if file.exists():
            records = _usable(read_records(file), str(file), task, split, options).records
            return records[:limit] if limit else records
    if options.download_on_missing:
        try:
            rows = download(task, split, options)
        except UserError as error:
            if not options.allow_toy:
                raise
            logging.warning("%s; toy problems are used, as dataset.allow_toy asks", error)
        else:
            records = _usable(rows, hub_name(task, options), task, split, options).records
            return records[:limit] if limit else records
    if options.allow_toy:
        logging.warning("no data at %s or %s; toy problems are used", first, second)
        records = toy_records(task, options.toy_size, options.seed, split)
        return records[:limit] if limit else records
    raise UserError(
        f"no {task} {split} data: neither {first} nor {second} exists; set {_PATH_KEYS[split]} to "
        f"a local file (or to {GENERATED}), or run --mode=prep"
    )


def download(task: str, split: str, options: DatasetOptions) -> list[dict[str, Any]]:
    """Gets the raw rows of a split from the hub.

    Args:
        task: "gsm8k" or "math".
        split: "train" or "test" (the sources have no split called eval).
        options: names of the source.

    Returns:
        Raw rows with their `source`, "owner/name@commit", added; MATH rows also with their
        `subject`, subject after subject.

    Raises:
        UserError: if the source cannot be reached or has no such split.
    """
    name, config = hub_source(task, options)
    subjects = options.math_subjects if task == "math" else ("",)
    rows: list[dict[str, Any]] = []
    try:
        for subject in subjects:
            part = hub.load_rows(name, subject or config, split)
            extra = {"subject": subject} if subject else {}
            # A branch moves, a commit does not: every record says which it came from.
            extra["source"] = f"{hub.split_revision(name)[0]}@{part.commit}"
            rows.extend({**row, **extra} for row in part.rows)
    except Exception as error:  # the client raises whatever its own layers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot get {hub_name(task, options)} ({split}) from the hub: {reason}; set "
            f"{_PATH_KEYS[split]} to a local file, or to {GENERATED} for the built-in problems"
        ) from error
    return rows


def hub_source(task: str, options: DatasetOptions) -> tuple[str, str]:
    """Returns (name, configuration) of the source of a task on the hub."""
    return (options.hf_dataset, options.hf_config) if options.hf_dataset else HUB_SOURCES[task]


def hub_name(task: str, options: DatasetOptions) -> str:
    """Returns the source of a task as one readable name."""
    name, config = hub_source(task, options)
    return f"{name} ({config})" if config and task != "math" else name


def run_prep(
    config: Any, splits: Sequence[str] = SPLITS, show_progress: bool = True
) -> list[PrepReport]:
    """Writes `dataset/raw/..` and `dataset/processed/<task>_<split>.jsonl` under the data root.

    The rows come from `dataset.raw_{train,eval}_path`, else from the file that
    `dataset.{train,eval}_path` names, else from an earlier raw copy, else from the hub. Where none
    of these is there and `dataset.allow_toy` is set without `dataset.download_on_missing`, toy
    problems are written to `dataset/processed/toy_<task>_<split>.jsonl`: under another name, so
    that they never stand in for real data. Files are replaced atomically.

    Args:
        config: the whole config.
        splits: which splits to prepare.
        show_progress: show a bar on standard error.

    Returns:
        One report per split.

    Raises:
        UserError: if the data cannot be found, read or written, or holds no usable row.
    """
    task = config.dataset.task
    check_task(task)
    options = dataset_options(config)
    reports = []
    for split in splits:
        _check_split(split)
        try:
            reports.append(_prepare_split(config, task, split, options, show_progress))
        except OSError as error:
            raise UserError(
                f"cannot write under {options.root / 'dataset'} ({error.strerror}); "
                "set REOAC_DATA_ROOT to a directory that can be written"
            ) from error
    return reports


def _prepare_split(
    config: Any, task: str, split: str, options: DatasetOptions, show_progress: bool
) -> PrepReport:
    target = options.processed_path(task, split)
    raw_copy = options.raw_path(task, split)
    file = _local_source(config, split, target, raw_copy, options)
    if file is not None:
        rows, source = read_records(file), str(file)
    elif target.exists():
        return PrepReport(split, "already prepared", 0, 0, target)
    elif options.allow_toy and not options.download_on_missing:
        records = toy_records(task, options.toy_size, options.seed, split)
        target = target.with_name(f"toy_{target.name}")
        _write_lines(target, records)
        return PrepReport(split, "toy problems", len(records), 0, target)
    else:
        rows, source = download(task, split, options), hub_name(task, options)
        if task == "math" and options.dump_math_subjects:
            _dump_subjects(rows, split, options)
    if file is None or file.resolve() != raw_copy.resolve():
        _write_lines(raw_copy, rows)
    shown = _progress(rows, f"{task} {split}", show_progress)
    prepared = _usable(shown, source, task, split, options)
    _write_lines(target, prepared.records)
    return PrepReport(split, source, len(prepared.records), prepared.dropped, target)


def _local_source(
    config: Any, split: str, target: Path, raw_copy: Path, options: DatasetOptions
) -> Path | None:
    """Returns the file to prepare a split from, None if there is none."""
    name = "train" if split == "train" else "eval"
    explicit = config.dataset.get(f"raw_{name}_path", "")
    if explicit:
        file = options.resolve(explicit)
        if not file.exists():
            raise UserError(
                f"{_RAW_KEYS[split]}={explicit}: no such file ({file}); set it to a local file"
            )
        return file
    named = config.dataset.get(f"{name}_path", "")
    if named and named != GENERATED:
        file = options.resolve(named)
        if file.exists() and file.resolve() != target.resolve():
            return file
    return raw_copy if raw_copy.exists() else None


def _usable(
    rows: Iterable[Mapping[str, Any]], source: str, task: str, split: str, options: DatasetOptions
) -> Prepared:
    prepared = prepare(rows, task, split, fields=options.fields)
    if not prepared.records:
        raise UserError(
            f"{source}: none of its {prepared.dropped} rows has both a prompt and an answer; set "
            "dataset.prompt_field and dataset.answer_field to the names of its fields"
        )
    if prepared.dropped:
        logging.warning("%s: dropped %d rows without text", source, prepared.dropped)
    return prepared


def _dump_subjects(rows: list[dict[str, Any]], split: str, options: DatasetOptions) -> None:
    root = options.resolve(options.math_subject_root)
    for subject in options.math_subjects:
        part = [row for row in rows if row["subject"] == subject]
        _write_lines(root / subject / f"{split}.jsonl", part)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    atomic_write(path, "".join(json_text(row) + "\n" for row in rows))


def _progress(
    rows: list[dict[str, Any]], description: str, enabled: bool
) -> Iterable[dict[str, Any]]:
    from tqdm import tqdm

    return tqdm(rows, desc=description, unit="row", disable=not enabled)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
