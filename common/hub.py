"""The hub: whatever is downloaded is named by the commit it came from.

A branch moves; a run that names one must be able to say later what it really read. A name without
a commit is therefore settled first (`commit_of`), the download asks for that commit and no other,
and the caller writes it down. Nothing here runs code from the hub.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_IN_ADDRESS = re.compile(r"@([0-9a-f]{40})/")


class HubRows(NamedTuple):
    """A split of a data set.

    Attributes:
        rows: as the library gives them.
        commit: it was read from.
    """

    rows: Any
    commit: str


def split_revision(name: str) -> tuple[str, str]:
    """ "owner/name@revision" as name and revision ("" = the default branch)."""
    plain, _, revision = name.partition("@")
    return plain, revision


def commit_of(name: str, revision: str = "", kind: str = "model") -> str:
    """The commit a branch or tag stands for now.

    Args:
        name: "owner/name".
        revision: branch, tag or commit; "" = the default branch.
        kind: "model" | "dataset".

    Returns:
        40 hexadecimal digits. Where the hub cannot be asked, the commit of the copy in its cache.

    Raises:
        Exception: whatever the client raises, and there is no copy.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().repo_info(name, revision=revision or None, repo_type=kind).sha)
    except Exception:  # offline, unknown and gated names raise a dozen types
        cached = _cached_commit(name, revision, kind)
        if not cached:
            raise
        return cached


def download_model(name: str, revision: str, patterns: Sequence[str]) -> Path:
    """Files of a model in the hub's cache; the directory is called like the commit.

    Args:
        name: "owner/name".
        revision: branch, tag or commit; "" = the default branch.
        patterns: which files; never code.

    Raises:
        Exception: whatever the client raises, by cause.
    """
    from huggingface_hub import snapshot_download

    commit = commit_of(name, revision)
    return Path(snapshot_download(name, revision=commit, allow_patterns=list(patterns)))


def load_rows(name: str, config: str, split: str, revision: str = "") -> HubRows:
    """A split of a data set, from the library's cache where it was loaded before.

    Args:
        name: "owner/name", perhaps with "@revision".
        config: its configuration; "" = the only one.
        split: split.
        revision: branch, tag or commit, where the name has none.

    Raises:
        Exception: whatever the client raises, by cause.
    """
    import datasets

    plain, own = split_revision(name)
    try:
        commit = commit_of(plain, own or revision, "dataset")
    except Exception as error:
        # The library keeps copies of its own, which say where they came from.
        rows = datasets.load_dataset(plain, config or None, split=split)
        commit = _commit_of_rows(rows)
        if not commit:
            raise UserError(
                f"the copy of '{plain}' in the cache does not say which commit it is, and the hub "
                f"cannot be asked ({error}); name one: {plain}@COMMIT"
            ) from error
        return HubRows(rows, commit)
    return HubRows(
        datasets.load_dataset(plain, config or None, split=split, revision=commit), commit
    )


def _cached_commit(name: str, revision: str, kind: str) -> str:
    from huggingface_hub import constants

    folder = f"{kind}s--{name.replace('/', '--')}"
    path = Path(constants.HF_HUB_CACHE) / folder / "refs" / (revision or "main")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _commit_of_rows(rows: Any) -> str:
    """The commit in the addresses a cached data set was downloaded from."""
    checksums = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    found = {match.group(1) for address in checksums if (match := _IN_ADDRESS.search(address))}
    return found.pop() if len(found) == 1 else ""
