"""Run directories: where they lie, atomic writes, JSON lines that survive a crash, one writer."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.json_files import Fields, NotJson, check_fields, parse_json


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file so that readers see the old content or the new, never a part.

    Args:
        path: the file; its directory is made where it is missing.
        content: text (stored as UTF-8) or bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result should be as readable as any other new file.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_directory(path.parent)


def atomic_write_json(path: str | Path, obj: Any, indent: int | None = 2) -> None:
    """Writes one JSON document atomically; see `json_text` for what is converted."""
    atomic_write(path, json_text(obj, indent) + "\n")


def json_text(obj: Any, indent: int | None = None) -> str:
    """Serialises to strict JSON: arrays become lists, paths strings, non-finite numbers null."""
    return json.dumps(_plain(obj), indent=indent, ensure_ascii=False, allow_nan=False)


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Appends one row to a JSON-lines file, after cutting a line torn by an earlier crash."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if _ends_torn(path):
        repair_jsonl(path)
    line = (json_text(row) + "\n").encode()
    # One write on an append-mode descriptor: a concurrent reader never sees interleaved rows.
    with open(path, "ab", buffering=0) as file:
        file.write(line)


def read_jsonl(path: str | Path, fields: Fields | None = None) -> list[dict[str, Any]]:
    """Reads the rows of a JSON-lines file this program writes.

    A last line that is not finished (a crash, or a writer at work) is left out.

    Args:
        path: the file.
        fields: what every row must hold.

    Returns:
        The rows in file order; an empty list for an empty file.

    Raises:
        UserError: if the file is missing, a line other than the last is bad (`file:line`), or a
            row lacks a field.
    """
    return _scan_jsonl(Path(path), fields)[0]


def repair_jsonl(path: str | Path) -> int:
    """Cuts a torn last line off a JSON-lines file, so that appending is safe again.

    Args:
        path: the file; a missing one counts as whole.

    Returns:
        How many bytes were cut.

    Raises:
        UserError: if a line other than the last is bad (`file:line`).
    """
    path = Path(path)
    if not path.exists():
        return 0
    _, good_bytes, needs_newline = _scan_jsonl(path, None)
    size = path.stat().st_size
    if good_bytes < size:
        with path.open("r+b") as file:
            file.truncate(good_bytes)
            os.fsync(file.fileno())
    if needs_newline:
        with path.open("ab") as file:
            file.write(b"\n")
    return size - good_bytes


def _scan_jsonl(path: Path, fields: Fields | None) -> tuple[list[dict[str, Any]], int, bool]:
    """Returns (rows, bytes that are good, whether the last good row lacks its newline)."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the command that writes it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); move it away") from None
    *whole, rest = raw.split(b"\n")
    lines = [line + b"\n" for line in whole] + ([rest] if rest else [])
    rows: list[dict[str, Any]] = []
    good = 0
    for number, line in enumerate(lines, start=1):
        row: Any = None
        if line.strip():
            with contextlib.suppress(NotJson):
                row = parse_json(line)
            if not isinstance(row, dict):
                # A crash leaves the beginning of a row, or blocks that were never written.
                torn = line.lstrip(b"\0")[:1] in (b"{", b"", b"\n")
                if number == len(lines) and torn:
                    return rows, good, False
                raise UserError(f"{path}:{number}: not a JSON object; remove or mend this line")
            if problem := check_fields(row, fields or {}):
                raise UserError(f"{path}:{number}: the row {problem}; remove or mend this line")
            rows.append(row)
        good += len(line)
    return rows, good, bool(raw) and not raw.endswith(b"\n")


def _ends_torn(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    raise TypeError(f"cannot be written as JSON: {type(value).__name__}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    # Without this the rename itself may be lost when the machine (not only the process) dies.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclasses.dataclass(frozen=True)
class RunDir:
    """One run's directory; the same directory resumes.

    Attributes:
        path: absolute path of the directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Where the resolved config is written before any work."""
        return self.path / "config_resolved.json"

    @property
    def checkpoints(self) -> Path:
        """Orbax steps."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """`iter{i}_step{j}.json` files."""
        return self.path / "samples"

    @property
    def viz(self) -> Path:
        """Pictures and tables drawn from the run."""
        return self.path / "viz"

    @property
    def metrics(self) -> Path:
        """One JSON object per iteration."""
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return (self.path / "DONE").exists()

    def finish(self) -> None:
        """Marks the run as finished."""
        (self.path / "DONE").touch()

    @classmethod
    def create(
        cls,
        root: str | Path,
        exp_name: str,
        workdir: str | Path = "",
        now: datetime.datetime | None = None,
    ) -> "RunDir":
        """Makes the directory of a run (again, where `workdir` names one that exists).

        Args:
            root: directory of all runs.
            exp_name: name of the experiment, one path component.
            workdir: an explicit directory, used as it is; the same value resumes the same run.
            now: the time that names a new run, for tests.

        Returns:
            `workdir` if given, else a new `root/exp_name/<YYYYmmdd-HHMMSS>` which the symbolic
            link `root/exp_name/latest` then points to.

        Raises:
            UserError: if the directory cannot be made.
        """
        try:
            if workdir:
                run = cls(Path(workdir).expanduser().resolve())
                run.path.mkdir(parents=True, exist_ok=True)
            else:
                run = cls(_new_directory(Path(root), exp_name, now or datetime.datetime.now()))
                point_latest(run.path)
            for directory in (run.checkpoints, run.samples, run.viz):
                directory.mkdir(exist_ok=True)
        except OSError as error:
            where = error.filename or workdir or root
            raise UserError(
                f"cannot make the run directory {where} ({error.strerror}); "
                "choose another one with --workdir"
            ) from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunDir":
        """Opens a run that exists, for example `runs/name/latest`.

        Raises:
            UserError: if there is no such directory.
        """
        resolved = Path(path).expanduser().resolve()
        if not resolved.is_dir():
            raise UserError(f"{path}: no such run directory; train first or name another one")
        return cls(resolved)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run directory for this process, so that no second one writes into it.

        The lock belongs to the process: it vanishes with it, however it ends.

        Raises:
            UserError: if another process holds it; names that process.
        """
        import fcntl

        with open(self.path / ".lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"{self.path} is being written by {holder}; "
                    "wait for it, stop it, or choose another --workdir"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


def _new_directory(root: Path, exp_name: str, now: datetime.datetime) -> Path:
    if exp_name in ("", ".", "..") or Path(exp_name).name != exp_name:
        raise UserError(f"the experiment name must be one path component, got {exp_name!r}")
    parent = root.expanduser().resolve() / exp_name
    parent.mkdir(parents=True, exist_ok=True)
    stamp = now.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        path = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise UserError(f"{parent}: too many runs started in the same second")


def point_latest(path: Path) -> None:
    """Makes the link `latest` beside a run point to it."""
    temporary = path.parent / f".latest.{os.getpid()}.tmp"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(path.name)
    os.replace(temporary, path.parent / "latest")
