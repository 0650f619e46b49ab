"""What is downloaded has the commit it came from; the hub's client is replaced at its boundary."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from common import hub
from common.errors import UserError

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


class Client:
    """Stands for the hub: one repository whose branch `main` is COMMIT."""

    def __init__(self, reachable: bool = True) -> None:
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.downloaded: list[tuple[str, str]] = []
        self._reachable = reachable

    def repo_info(self, name: str, *, revision: str | None = None, repo_type: str | None = None):  # type: ignore[no-untyped-def]
        self.asked.append((name, revision, repo_type))
        if not self._reachable:
            raise OSError("no connection")
        return types.SimpleNamespace(sha=COMMIT if revision in (None, "main") else OTHER)

    def snapshot_download(self, name: str, *, revision: str, allow_patterns: list[str]) -> str:
        self.downloaded.append((name, revision))
        return f"/cache/{name}/{revision}"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Client:
    import huggingface_hub

    made = Client()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return made


def _cached(root: Path, folder: str, branch: str, commit: str) -> None:
    path = root / folder / "refs" / branch
    path.parent.mkdir(parents=True)
    path.write_text(commit)


@pytest.mark.parametrize(
    ("revision", "commit", "asked"),
    [("", COMMIT, [None]), ("v1", OTHER, ["v1"]), (OTHER, OTHER, [])],
)
def test_a_download_asks_for_a_commit(
    client: Client, revision: str, commit: str, asked: list[str | None]
) -> None:
    path = hub.download_model("owner/name", revision, ("*.json",))
    assert path.name == commit
    assert client.downloaded == [("owner/name", commit)]
    assert client.asked == [("owner/name", one, "model") for one in asked]


def test_without_a_connection_the_cache_says_the_commit(client: Client, tmp_path: Path) -> None:
    client._reachable = False
    with pytest.raises(OSError, match="no connection"):
        hub.commit_of("owner/name")
    _cached(tmp_path, "models--owner--name", "main", OTHER)
    assert hub.commit_of("owner/name") == OTHER
    assert hub.download_model("owner/name", "", ("*.json",)).name == OTHER
    with pytest.raises(OSError, match="no connection"):
        hub.commit_of("owner/name", kind="dataset")


def _library(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str, revision: str | None = None) -> Any:
        calls.append((name, config, split, revision))
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_rows_are_read_from_a_commit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _library(monkeypatch, [1])
    assert hub.load_rows("owner/set", "main", "test") == ([1], COMMIT)
    assert hub.load_rows("owner/set@v1", "", "test") == ([1], OTHER)
    assert calls == [("owner/set", "main", "test", COMMIT), ("owner/set", None, "test", OTHER)]
    assert client.asked[0] == ("owner/set", None, "dataset")


def test_a_cached_copy_must_say_its_commit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client._reachable = False
    rows = types.SimpleNamespace(info=types.SimpleNamespace(download_checksums=None))
    _library(monkeypatch, rows)
    with pytest.raises(UserError, match="owner/set@COMMIT"):
        hub.load_rows("owner/set", "", "test")
    rows.info.download_checksums = {f"hf://datasets/owner/set@{OTHER}/data/a.parquet": {}}
    assert hub.load_rows("owner/set", "", "test").commit == OTHER


def test_a_model_records_its_commit(
    client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from common.lm import source

    place = tmp_path / COMMIT
    place.mkdir()
    (place / "config.json").write_text("{}")
    monkeypatch.setattr(source, "locate_model", lambda name, revision: place)
    assert source.resolve("owner/name").record()["revision"] == COMMIT
