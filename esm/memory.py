"""The memory: keys, corrections and what is known about each, in memory and on disk."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import is_full_disk
from common.engines.base import Toolbox
from common.errors import UserError, require
from common.rundir import atomic_write, atomic_write_json, json_text, read_jsonl
from esm.core.retrieval import MIN_NORM, NO_LAYER, PADDING, Entries
from esm.files import (
    ENTRY,
    FORMAT_VERSION,
    LIBRARY_MANIFEST,
    MANIFEST,
    read_array,
    read_object,
    save_array,
)

RANDOM_SUFFIX = "~random"


@dataclasses.dataclass(frozen=True)
class Memory:
    """N entries, row by row.

    Attributes:
        keys: [N, H] float32 unit vectors; a key of norm 0 stays zero.
        vectors: [N, H] float32 corrections; zero where the entry means "do nothing".
        layer: [N] int32.
        point: [N] int32 control point.
        quality: [N] float32.
        is_null: [N] bool.
        ids: [N] tool ids.
        names: [N] tool names, distinct.
    """

    keys: np.ndarray
    vectors: np.ndarray
    layer: np.ndarray
    point: np.ndarray
    quality: np.ndarray
    is_null: np.ndarray
    ids: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Distinct layers, ascending: those whose states are looked up."""
        return tuple(int(x) for x in np.unique(self.layer))

    def entries(self, keys: Any = None) -> Entries:
        """The memory as the lookup wants it; an empty one is a single padding row.

        Args:
            keys: [N, H], in place of the memory's own (centred ones).
        """
        empty = len(self.keys) == 0
        pad = 1 if empty else 0
        slots = {layer: slot for slot, layer in enumerate(self.layers)}
        layer = np.asarray([slots[int(x)] for x in self.layer], np.int32)

        def padded(x: np.ndarray, *value: int) -> Any:
            width = ((0, pad), *[(0, 0)] * (x.ndim - 1))
            return np.pad(x, width, constant_values=value or (0,))

        return Entries(
            keys=padded(self.keys if keys is None else keys),
            layer=padded(layer, NO_LAYER),
            point=padded(self.point, PADDING),
            quality=padded(self.quality),
            is_null=padded(self.is_null),
        )

    def toolbox(self, random_seed: int | None = None) -> Toolbox:
        """Tool i is entry i; with a seed, tool N + i is Gaussian noise of the same length."""
        names, layers, vectors = self.names, self.layer, self.vectors
        if random_seed is not None:
            names = names + tuple(name + RANDOM_SUFFIX for name in names)
            layers = np.concatenate([layers, layers])
            vectors = np.concatenate([vectors, self._random_vectors(random_seed)])
        return Toolbox(names, layers.astype(np.int32), vectors.astype(np.float32))

    def _random_vectors(self, seed: int) -> np.ndarray:
        noise = np.zeros_like(self.vectors)
        for row, tool_id in enumerate(self.ids):
            digest = hashlib.sha256(f"{seed}/{tool_id}".encode()).digest()
            rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            draw = rng.standard_normal(self.vectors.shape[1])
            length = float(np.linalg.norm(self.vectors[row]))
            noise[row] = draw * (length / max(float(np.linalg.norm(draw)), MIN_NORM))
        return noise


def make_memory(keys: np.ndarray, vectors: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> Memory:
    """A memory from library rows.

    Args:
        keys: [N, H], normalised here.
        vectors: [N, H].
        rows: N rows of `library.jsonl`.

    Raises:
        UserError: the parts do not belong together.
    """
    require(
        len(keys) == len(vectors) == len(rows),
        f"the memory has {len(rows)} entries, {len(keys)} keys and {len(vectors)} vectors; run "
        "the stage memory again",
    )
    return Memory(
        keys=normalize(keys),
        vectors=np.asarray(vectors, np.float32),
        layer=np.asarray([row["layer"] for row in rows], np.int32),
        point=np.asarray([row["control_point_m"] for row in rows], np.int32),
        quality=np.asarray([row["quality"] for row in rows], np.float32),
        is_null=np.asarray([not row["has_vector"] for row in rows], bool),
        ids=tuple(int(row["tool_id"]) for row in rows),
        names=tuple(str(row["tool_name"]) for row in rows),
    )


def normalize(keys: np.ndarray) -> np.ndarray:
    """Keys divided by max(norm, 1e-12), float32."""
    wide = np.asarray(keys, np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), MIN_NORM)


def save_memory(
    directory: Path,
    keys: np.ndarray,
    vectors: np.ndarray,
    rows: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    normalize_keys: bool,
) -> None:
    """Writes every file of a memory; the manifest last, so that a memory with one is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    stored = normalize(keys) if normalize_keys else np.asarray(keys, np.float32)
    save_array(directory / "keys.npy", stored)
    save_array(directory / "vectors.npy", np.asarray(vectors, np.float32))
    atomic_write(directory / "entries.jsonl", "".join(json_text(row) + "\n" for row in rows))
    atomic_write(directory / "meta.txt", f"N={keys.shape[0]} H={keys.shape[1]}\n")
    _save_tree(directory / "checkpoint", make_memory(stored, vectors, rows))
    atomic_write_json(
        directory / MANIFEST,
        {
            **manifest,
            "format_version": FORMAT_VERSION,
            "entries": len(rows),
            "hidden_size": int(keys.shape[1]),
        },
    )


def load_memory(directory: Path) -> tuple[Memory, dict[str, Any]]:
    """The memory of a directory and its manifest.

    Raises:
        UserError: it is missing, unfinished, damaged, or of another format.
    """
    manifest = read_manifest(directory)
    rows = read_jsonl(directory / "entries.jsonl", ENTRY)
    keys = read_array(directory / "keys.npy")
    vectors = read_array(directory / "vectors.npy")
    shape = (len(rows), manifest["hidden_size"])
    require(
        len(rows) == manifest["entries"] and keys.shape == vectors.shape == shape,
        f"{directory}: {len(rows)} entries and keys {keys.shape}, vectors {vectors.shape} where "
        f"the manifest says {manifest['entries']} x {manifest['hidden_size']}; run the stage "
        "memory again",
    )
    return make_memory(keys, vectors, rows), manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished memory.

    Raises:
        UserError: there is none.
    """
    path = directory / MANIFEST
    require(
        path.exists(),
        f"no memory at {directory}; run --stage=memory first (or name a run that has one with "
        "--config.eval.artifact_run_dir)",
    )
    return read_object(path, "delete it and run --stage=memory again", LIBRARY_MANIFEST)


def _save_tree(directory: Path, memory: Memory) -> None:
    """The arrays as an Orbax tree, for programs that read checkpoints; none of an empty memory."""
    import shutil

    import orbax.checkpoint as ocp

    shutil.rmtree(directory, ignore_errors=True)
    if not len(memory.keys):
        return  # Orbax stores no arrays without elements
    tree = {
        "keys": memory.keys,
        "vectors": memory.vectors,
        "layer": memory.layer,
        "m": memory.point,
        "quality": memory.quality,
        "is_null": memory.is_null,
    }
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(directory.resolve(), tree)
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"cannot write {directory} (No space left on device); make room and run the same "
            "command again"
        ) from error
