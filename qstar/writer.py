"""Append-only outputs of a generation run: samples, diagnostics, errors, and what is done already.

A sample is committed by its data line. Its diagnostics line is written before, so a crash can leave
diagnostics without data but never the reverse; on start a torn last line is cut and diagnostics
without data are dropped. What is done follows from the data lines of all shards alone.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from common.errors import UserError, require
from common.json_files import Fields, check_version, read_json_object
from common.rundir import atomic_write, atomic_write_json, json_text, read_jsonl, repair_jsonl

SYNC_SECONDS = 2.0
BESIDE = ("diagnostics", "tokens")  # files with a line per sample, written before its data line
Done = tuple[int, int]  # sample_idx, repeat
LINE: Fields = {"sample_idx": int}
VERSION = 1  # of the meaning of a manifest; older ones cannot be continued


def output_paths(output: str | Path, shard: tuple[int, int] = (0, 1)) -> dict[str, Path]:
    """The files of one shard: data, diagnostics, tokens, errors, metrics, manifest, lock.

    Args:
        output: the data file, or its name without ".jsonl".
        shard: (index, count); with one shard the names are plain.
    """
    base = Path(output)
    stem = base.name.removesuffix(".jsonl")
    index, count = shard
    part = "" if count == 1 else f".shard-{index}-of-{count}"
    return {
        "data": base.with_name(f"{stem}{part}.jsonl"),
        "diagnostics": base.with_name(f"{stem}{part}.diagnostics.jsonl"),
        "tokens": base.with_name(f"{stem}{part}.tokens.jsonl"),
        "errors": base.with_name(f"{stem}{part}.errors.jsonl"),
        "metrics": base.with_name(f"{stem}{part}.metrics"),
        "manifest": base.with_name(f"{stem}.manifest.json"),
        "lock": base.with_name(f".{stem}{part}.lock"),
    }


def all_data_files(output: str | Path) -> list[Path]:
    """The data files of every shard that ever wrote to this output."""
    plain = output_paths(output)["data"]
    stem = plain.name.removesuffix(".jsonl")
    shards = plain.parent.glob(f"{stem}.shard-*-of-*.jsonl")
    suffixes = tuple(f".{name}.jsonl" for name in ("diagnostics", "tokens", "errors"))
    return [plain, *sorted(p for p in shards if not p.name.endswith(suffixes))]


def row_key(row: Mapping[str, Any]) -> Done:
    """(sample_idx, repeat) of a data or diagnostics line."""
    return int(row["sample_idx"]), int(row.get("repeat", 0))


def done_samples(output: str | Path) -> set[Done]:
    """What the data files of all shards hold already; unfinished last lines do not count."""
    return {
        row_key(row)
        for path in all_data_files(output)
        if path.exists()
        for row in read_jsonl(path, LINE)
    }


class Journal:
    """The open output files of one shard; a second process is refused.

    Use as a context manager.
    """

    def __init__(
        self,
        output: str | Path,
        shard: tuple[int, int] = (0, 1),
        overwrite: bool = False,
        complete: Collection[str] = (),
    ) -> None:
        """Takes the lock, mends what a crash left behind and reads what is done.

        Args:
            output: the data file.
            shard: (index, count).
            overwrite: discards this shard's files.
            complete: which of BESIDE must have a line for every sample; a sample without one is
                made again. A file that is gone altogether was taken away by someone.

        Raises:
            UserError: if another process writes to this shard, or a file is damaged.
        """
        self.paths = output_paths(output, shard)
        try:
            self.paths["data"].parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run.output: cannot make '{self.paths['data'].parent}' ({error.strerror})"
            ) from error
        self._lock = _take_lock(self.paths["lock"], self.paths["data"])
        self._files: dict[str, int] = {}
        try:
            if overwrite:
                for name in ("data", *BESIDE, "errors"):
                    self.paths[name].unlink(missing_ok=True)
            repair_jsonl(self.paths["data"])
            for name in BESIDE:
                found = self.paths[name].exists()
                if found and (repair_jsonl(self.paths[name]) or name in complete):
                    self._drop_samples_without(name)
            for name in BESIDE:
                self._drop_orphans(name)
            self.done = done_samples(output)
            # Errors are tried again, so those of the last run are void.
            self.paths["errors"].unlink(missing_ok=True)
        except BaseException:
            os.close(self._lock)
            raise
        self._last_sync = time.monotonic()

    def _drop_samples_without(self, name: str) -> None:
        """Takes back the samples whose line beside them a crash of the machine tore off.

        The disk may keep a data line and lose the one that was written before it.
        """
        data = self.paths["data"]
        rows = read_jsonl(data, LINE) if data.exists() else []
        beside = {row_key(row) for row in read_jsonl(self.paths[name], LINE)}
        kept = [row for row in rows if row_key(row) in beside]
        if len(kept) != len(rows):
            atomic_write(data, "".join(json_text(row) + "\n" for row in kept))

    def _drop_orphans(self, name: str) -> None:
        """Rewrites the diagnostics or tokens without the lines that have no sample."""
        path = self.paths[name]
        if not path.exists():
            return
        repair_jsonl(path)
        data = self.paths["data"]
        known = {row_key(row) for row in read_jsonl(data, LINE)} if data.exists() else set()
        rows = read_jsonl(path, LINE)
        # After a crash between both lines the sample is generated again: the last line counts.
        kept = {row_key(row): row for row in rows if row_key(row) in known}
        if len(kept) != len(rows):
            atomic_write(path, "".join(json_text(row) + "\n" for row in kept.values()))

    def write(
        self,
        row: Mapping[str, Any],
        diagnostics: Mapping[str, Any] | None = None,
        tokens: Mapping[str, Any] | None = None,
    ) -> None:
        """Commits one sample: the lines of its diagnostics and tokens, then its data line."""
        for name, line in (("tokens", tokens), ("diagnostics", diagnostics)):
            if line is not None:
                self._append(name, line)
        self._append("data", row)
        self.done.add(row_key(row))
        if time.monotonic() - self._last_sync >= SYNC_SECONDS:
            self.sync()

    def write_error(self, key: Done, stage: str, message: str, repeats: int = 1) -> None:
        """Records that a sample could not be made; with several per row, which one."""
        which = {"sample_idx": key[0]} | ({"repeat": key[1]} if repeats > 1 else {})
        self._append("errors", {**which, "stage": stage, "message": message})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        """One line in one write to an append-mode descriptor."""
        line = (json_text(row) + "\n").encode()
        path = self.paths[name]
        try:
            if name not in self._files:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                self._files[name] = os.open(path, flags, 0o666)
            written = os.write(self._files[name], line)
            if written != len(line):
                os.ftruncate(self._files[name], os.fstat(self._files[name]).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise unwritable(path, error) from error

    def sync(self) -> None:
        """Makes everything written so far survive a power cut; what goes with data before data."""
        for name in sorted(self._files, key=lambda name: name == "data"):
            try:
                os.fsync(self._files[name])
            except OSError as error:
                raise unwritable(self.paths[name], error) from error
        self._last_sync = time.monotonic()

    def close(self) -> None:
        """Syncs and lets the files and the lock go."""
        if self._lock < 0:
            return
        try:
            self.sync()
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files = {}
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        """The journal itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()


def sort_output(output: str | Path, shard: tuple[int, int] = (0, 1)) -> None:
    """Rewrites a shard's data and diagnostics in the order of sample and repeat, atomically."""
    paths = output_paths(output, shard)
    for name in ("data", *BESIDE):
        if paths[name].exists():
            rows = sorted(read_jsonl(paths[name], LINE), key=row_key)
            atomic_write(paths[name], "".join(json_text(row) + "\n" for row in rows))


def data_row(
    messages: Iterable[Mapping[str, str]],
    text: str,
    metadata: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The data line of a sample: the prompt's messages with the answer, then the metadata.

    Args:
        messages: the prompt's history.
        text: what was generated, without special tokens.
        metadata: `sample_idx` and `original_*`.
        extra: reference, finish_reason, n_tokens, repeat; None = the plain schema.
    """
    answer = {"role": "assistant", "content": text}
    return {"messages": [*map(dict, messages), answer], **metadata, **(extra or {})}


# --------------------------------------------------------------------------------------- manifest
# Settings that may change between two starts of one run.
FREE_KEYS = (
    "start_idx",
    "num_samples",
    "shard",
    "slots",
    "burst",
    "prefill_rows",
    "overwrite",
    "sort_output",
    "dry_run",
    "output",
    "metrics",
    "log_seconds",
    "platform",
)


def semantic_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides what is generated."""
    kept = {key: dict(v) if isinstance(v, Mapping) else v for key, v in config.items()}
    if isinstance(kept.get("run"), dict):
        kept["run"] = {k: v for k, v in kept["run"].items() if k not in FREE_KEYS}
    return kept


def check_manifest(
    path: str | Path,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Writes the manifest of a new run, or compares it with the one that is being continued.

    Args:
        path: the manifest file.
        manifest: whatever decides what is generated, in nested dicts.
        overwrite: the old run is discarded.
        info: kept as "info" and not compared: versions, index range, the rest of the config.

    Raises:
        UserError: if a key differs; lists the keys.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        compare_manifest(path, manifest)
    full = {**manifest, **({} if info is None else {"info": dict(info)})}
    if overwrite or not path.exists() or read_manifest(path) != json.loads(json_text(full)):
        try:
            atomic_write_json(path, full)
        except OSError as error:
            raise unwritable(path, error) from error


def refuse_foreign(output: str | Path, shard: tuple[int, int], manifest: Mapping[str, Any]) -> None:
    """Looks at what stands at an output before anything there is touched, or mended.

    Raises:
        UserError: it was begun with other settings, or was not written by this command at all.
    """
    paths = output_paths(output, shard)
    if paths["manifest"].exists():
        compare_manifest(paths["manifest"], manifest)
        return
    data = paths["data"]
    # The manifest is written before the first sample.
    require(
        not data.exists() or (data.is_file() and data.stat().st_size == 0),
        f"{data} exists, but {paths['manifest'].name} beside it, which would say how it was made, "
        "does not; choose another run.output, or set run.overwrite=True to replace it",
    )


def compare_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compares the manifest of an output with that of a command that wants to continue it.

    Raises:
        UserError: if a key differs, listing the keys; the manifest is damaged or of a newer format.
    """
    found = read_manifest(path)
    old = _flat({k: v for k, v in found.items() if k != "info"})
    new = _flat(manifest)
    changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    shown = ", ".join(f"{k} ({_short(old.get(k))} -> {_short(new.get(k))})" for k in changed[:6])
    require(
        not changed,
        f"{path}: this output was begun with other settings: {shown}; use the same, another "
        "run.output, or run.overwrite=True",
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The one JSON object of a file.

    Raises:
        UserError: if it holds none, or one of a newer version.
    """
    cure = "choose another run.output, or set run.overwrite=True to start anew"
    found = read_json_object(path, cure)
    check_version(found, path, ("version", VERSION), cure)
    return found


def _short(text: str | None) -> str:
    """A JSON value in a message."""
    shown = "none" if text is None else text
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Nested dicts as dotted keys with JSON texts."""
    if isinstance(tree, Mapping) and tree:
        return {
            k: v
            for name, value in tree.items()
            for k, v in _flat(value, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: json_text(tree)}


def unwritable(path: Path, error: OSError) -> UserError:
    """What to do about a file that cannot be written."""
    return UserError(
        f"{path}: {error.strerror or error}; make room and run the same command again: it "
        "continues behind the last whole sample"
    )


def _take_lock(path: Path, data: Path) -> int:
    """An open descriptor that holds the shard's lock.

    Raises:
        UserError: if another process holds it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(
            f"{data}: another process is writing to it; wait or use run.shard"
        ) from None
    return descriptor
